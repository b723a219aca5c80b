"""What `cctool compare` can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from cctool.options.common import DataOptions
from cctool.options.inspect.evaluate import SplitName


@dataclass(frozen=True)
class CompareOptions:
    """Options of one comparison.

    Attributes:
        split: which samples accuracy is measured on.
        data: which data set; None takes each checkpoint's last.
    """

    split: SplitName = SplitName.TEST
    data: DataOptions = field(default_factory=DataOptions)
