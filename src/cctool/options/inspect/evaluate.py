"""What `cctool evaluate` can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from cctool.base.errors import UsageError
from cctool.options.common import Choice, DataOptions

__all__ = ["EvaluateOptions", "SplitName"]


class SplitName(Choice):
    """A part of a data set."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of one evaluation.

    Attributes:
        split: what to measure on; None takes ``test``, or where there is none the next best, and says so.
        data: which data, and how much of it at a time.
        predictions: CSV file to write one line an image to.
        loss: the user's ``my.py:function(outputs, labels) -> scalar`` in place of cross-entropy.
        metric: the user's ``my.py:function(outputs, labels) -> number`` over the whole split.
        bitstream: folder to write the coded feature maps of the split to, a file a tap.
        through_bitstream: code each map to bytes, and go on with what these bytes decode to.
        report_file: workbook or table with the figures of each tap.
        histograms: folder of PNG histograms per tap and sub-band.
        zero_bar: draw the bar of the zeros in the histograms, which dwarfs the others.
    """

    split: SplitName | None = None
    data: DataOptions = field(default_factory=DataOptions)
    predictions: str | None = None
    loss: str | None = None
    metric: str | None = None
    bitstream: str | None = None
    through_bitstream: bool = False
    report_file: str | None = None
    histograms: str | None = None
    zero_bar: bool = False

    def __post_init__(self) -> None:
        if self.predictions is not None and not self.predictions.lower().endswith(".csv"):
            raise UsageError(f"--predictions {self.predictions}: a name that ends in .csv is expected")
        if self.zero_bar and self.histograms is None:
            raise UsageError("--zero-bar is for --histograms DIR, which is not given")

    @property
    def asks_for_taps(self) -> bool:
        """Whether something is asked for that only a network with taps has."""
        return self.through_bitstream or any(
            path is not None for path in (self.bitstream, self.report_file, self.histograms)
        )
