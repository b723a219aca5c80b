"""What `cctool evaluate` can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from cctool.errors import UsageError
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
    """

    split: SplitName | None = None
    data: DataOptions = field(default_factory=DataOptions)
    predictions: str | None = None
    loss: str | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.predictions is not None and not self.predictions.lower().endswith(".csv"):
            raise UsageError(f"--predictions {self.predictions}: a name that ends in .csv is expected")
