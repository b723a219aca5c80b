"""From a method's name on the command line to the encoding that it stores tensors with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import JsonValue

from cctool.checkpoint.encoding import Encoding
from cctool.options.quantize import QuantizeMethod, QuantizeOptions
from cctool.quantization.affine import AFFINE_U8
from cctool.quantization.half import BF16, FP16
from cctool.quantization.selection import Selected

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """An encoding, and its parameters for a tensor: (tensor, options) -> parameters."""

    encoding: Encoding
    parameters: Callable[[Selected, QuantizeOptions], dict[str, JsonValue]]


def _none(selected: Selected, options: QuantizeOptions) -> dict[str, JsonValue]:
    return {}


def _axis(selected: Selected, options: QuantizeOptions) -> dict[str, JsonValue]:
    return {"axis": selected.channels if options.per_channel else None}


METHODS: dict[QuantizeMethod, Method] = {
    QuantizeMethod.FP16: Method(FP16, _none),
    QuantizeMethod.BF16: Method(BF16, _none),
    QuantizeMethod.UINT8: Method(AFFINE_U8, _axis),
}
