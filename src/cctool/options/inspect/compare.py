"""What `cctool compare` can be asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cctool.options.common import DataOptions, TaskOptions, judged, wrong_suffix
from cctool.options.fields import Options, nested, option
from cctool.options.inspect.evaluate import SplitName


@dataclass(frozen=True)
class CompareOptions(Options):
    """Options of one comparison; without a data set, each checkpoint's last one is taken."""

    # fmt: off
    split: SplitName = option(SplitName.TEST, "Split to measure on.")
    arch: tuple[str, ...] = option(
        (), "Architecture of those files that record it, as net.py:factory; may be repeated.",
        metavar="TEXT", repeated=True, runs_code=True)
    latency: bool = option(False, "Also time a batch of one on the device, in milliseconds.")
    csv: str | None = option(
        None, "Write the comparison to this file.", metavar="FILE.csv", recorded=False, writes=True)
    xlsx: str | None = option(
        None, "Write the comparison to this workbook.", metavar="FILE.xlsx", recorded=False, writes=True)
    data: DataOptions = nested(DataOptions, without=("val_data", "val_data_arguments"))
    judge: TaskOptions = judged()
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Names that do not fit."""
        return (wrong_suffix("--csv", self.csv, ".csv"), wrong_suffix("--xlsx", self.xlsx, ".xlsx"))
