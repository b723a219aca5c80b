"""What `cctool compare` can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from cctool.options.common import DataOptions


class CompareSplit(str, Enum):
    """Which samples accuracy is measured on."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True)
class CompareOptions:
    """Options of one comparison.

    Attributes:
        split: which samples accuracy is measured on.
        data: which data set; None takes each checkpoint's last.
    """

    split: CompareSplit = CompareSplit.TEST
    data: DataOptions = field(default_factory=DataOptions)
