"""What `cctool evaluate` can be asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cctool.options.common import (
    DataOptions,
    TaskOptions,
    histograms_option,
    report_file_option,
    zero_bar_option,
)
from cctool.options.fields import Choice, nested, option


class SplitName(Choice):
    """A part of a data set."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


_TAPS = "Coded feature maps (after transform --target features)"


@dataclass(frozen=True)
class EvaluateOptions(TaskOptions):
    """Options of one evaluation."""

    # fmt: off
    split: SplitName | None = option(
        None, "Split to measure on.", unset="test, or the next best if there is none")
    data: DataOptions = nested(DataOptions)
    predictions: str | None = option(
        None, "Write one row per image; works without labels, too.", metavar="FILE.csv")
    bitstream: str | None = option(
        None, "Write the coded feature maps of the split, one file per tap, for `cctool decode`.",
        metavar="DIR", panel=_TAPS)
    through_bitstream: bool = option(
        False, "Encode each map to bytes and continue with the decoded map.", panel=_TAPS)
    report_file: str | None = report_file_option(_TAPS)
    histograms: str | None = histograms_option(_TAPS)
    zero_bar: bool = zero_bar_option(_TAPS)
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Names that do not fit, and a detail of pictures that are not drawn."""
        predictions = self.predictions or ".csv"
        # fmt: off
        return (
            (not predictions.lower().endswith(".csv"),
             f"--predictions {predictions}: a name that ends in .csv is expected"),
            (self.zero_bar and self.histograms is None,
             "--zero-bar is for --histograms DIR, which is not given"),
        )
        # fmt: on

    @property
    def asks_for_taps(self) -> bool:
        """Whether an option is given that is about coded feature maps (taps)."""
        return self.through_bitstream or any(
            path is not None for path in (self.bitstream, self.report_file, self.histograms)
        )
