"""What `cctool compare` can be asked."""

from __future__ import annotations

from dataclasses import dataclass

from cctool.options.common import DataOptions
from cctool.options.fields import Options, nested, option
from cctool.options.inspect.evaluate import SplitName


@dataclass(frozen=True)
class CompareOptions(Options):
    """Options of one comparison; without a data set, each checkpoint's last one is taken."""

    # fmt: off
    split: SplitName = option(SplitName.TEST, "Split to measure accuracy on.")
    data: DataOptions = nested(DataOptions, without=("val_data", "val_data_arguments"))
    # fmt: on
