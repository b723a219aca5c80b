"""What `cctool evaluate` can be asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cctool.options.common import (
    DataOptions,
    TaskOptions,
    histograms_option,
    report_file_option,
    wrong_suffix,
    zero_bar_option,
)
from cctool.options.fields import Choice, Idle, nested, option


class SplitName(Choice):
    """A part of a data set."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


_PICTURES = (".png", ".csv", ".xlsx")
_TAPS = "Coded feature maps (after transform --target features)"


_OF_CLASSES = Idle(lambda o: not o.per_class, "it is for the table of --per-class, which is not given")


@dataclass(frozen=True)
class EvaluateOptions(TaskOptions):
    """Options of one evaluation."""

    # fmt: off
    split: SplitName | None = option(
        None, "Split to measure on.", unset="test, or the next best if there is none")
    data: DataOptions = nested(DataOptions)
    predictions: str | None = option(
        None, "Write one row per image; works without labels, too.", metavar="FILE.csv", writes=True)
    per_class: bool = option(
        False, "Also measure each class: accuracy or IoU, and how many samples it has.", recorded=False)
    csv: str | None = option(
        None, "Write the table of classes to this file.", metavar="FILE.csv", idle=_OF_CLASSES,
        recorded=False, writes=True)
    xlsx: str | None = option(
        None, "Write the table of classes to this workbook.", metavar="FILE.xlsx",
        idle=_OF_CLASSES, recorded=False, writes=True)
    confusion: str | None = option(
        None, "Write which class was taken for which: as a picture, or as counts.",
        metavar="FILE.png|.csv|.xlsx", recorded=False, writes=True)
    bitstream: str | None = option(
        None, "Write the coded feature maps of the split, one file per tap, for `cctool decode`.",
        metavar="DIR", panel=_TAPS, writes=True)
    through_bitstream: bool = option(
        False, "Encode each map to bytes and continue with the decoded map.", panel=_TAPS)
    report_file: str | None = report_file_option(_TAPS)
    histograms: str | None = histograms_option(_TAPS)
    zero_bar: bool = zero_bar_option(_TAPS)
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Names that do not fit, and a detail of pictures that are not drawn."""
        # fmt: off
        return (
            wrong_suffix("--predictions", self.predictions, ".csv"),
            wrong_suffix("--csv", self.csv, ".csv"),
            wrong_suffix("--xlsx", self.xlsx, ".xlsx"),
            wrong_suffix("--confusion", self.confusion, *_PICTURES),
            (self.zero_bar and self.histograms is None,
             "--zero-bar is for --histograms DIR, which is not given"),
        )
        # fmt: on

    @property
    def asks_for_classes(self) -> bool:
        """Whether an option is given that needs to know which class was taken for which."""
        return self.per_class or self.confusion is not None

    @property
    def asks_for_taps(self) -> bool:
        """Whether an option is given that is about coded feature maps (taps)."""
        return self.through_bitstream or any(
            path is not None for path in (self.bitstream, self.report_file, self.histograms)
        )
