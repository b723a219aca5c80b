"""What `cctool quantize` can be asked: methods and the options of one run, with their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cctool.errors import UsageError
from cctool.options.common import Choice, DataOptions

__all__ = ["PRESETS", "QuantizeMethod", "QuantizeOptions", "QuantizePreset", "preset_options"]


class QuantizeMethod(Choice):
    """How weights are stored."""

    FP16 = "fp16"
    BF16 = "bf16"
    UINT8 = "uint8"


class QuantizePreset(Choice):
    """A published procedure, reproduced formula by formula."""

    LHY_HW7 = "lhy-hw7"


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of one quantization.

    Attributes:
        method: how weights are stored.
        per_channel: a range for each output channel instead of one for the tensor; uint8 only.
        include_1d: take 1-D tensors too: biases, batch norm's scales and running statistics.
        include: glob patterns; where given, only tensors that match one are taken. A pattern that is a
            tensor's whole name takes it whatever it is.
        exclude: glob patterns of tensors that are left as they are; they win over `include`.
        preset: the published method that these options were taken from; see `preset_options`.
        data: what the network is measured on, before and after.
    """

    method: QuantizeMethod = QuantizeMethod.UINT8
    per_channel: bool = False
    include_1d: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    preset: QuantizePreset | None = None
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        if self.per_channel and self.method is not QuantizeMethod.UINT8:
            raise UsageError(
                f"--per-channel sets ranges, which {self.method} does not have; use it with --method uint8"
            )


PRESETS: dict[QuantizePreset, dict[str, Any]] = {
    # H.-Y. Lee's ML2020 homework 7: every tensor but single numbers, batch norm's among them, 8-bit min-max
    # over the whole tensor.
    QuantizePreset.LHY_HW7: {"method": QuantizeMethod.UINT8, "per_channel": False, "include_1d": True},
}
"""The options that each preset sets."""


def preset_options(preset: QuantizePreset | None, **given: Any) -> QuantizeOptions:
    """Make options as a preset sets them, except for those that are given."""
    chosen = PRESETS[preset] if preset is not None else {}
    return QuantizeOptions(**(chosen | given), preset=preset)
