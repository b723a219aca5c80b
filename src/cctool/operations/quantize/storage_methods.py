"""From a method's name on the command line to the encoding that it stores tensors with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import JsonValue

from cctool.checkpoint.encoding import Encoding
from cctool.options.quantize.choices import INTEGERS, QuantizeMethod
from cctool.options.quantize.options import QuantizeOptions
from cctool.quantization.encodings.apot_levels import default_terms
from cctool.quantization.encodings.codebook import CODEBOOK
from cctool.quantization.encodings.float16 import BF16, FP16
from cctool.quantization.encodings.intn import INTN
from cctool.quantization.encodings.uint8 import AFFINE_U8
from cctool.quantization.network.tensors import SelectedTensor

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """An encoding, and its parameters for a tensor: (tensor, options, seed) -> parameters."""

    encoding: Encoding
    parameters: Callable[[SelectedTensor, QuantizeOptions, int], dict[str, JsonValue]]


def _none(selected: SelectedTensor, options: QuantizeOptions, seed: int) -> dict[str, JsonValue]:
    return {}


def _axis(selected: SelectedTensor, options: QuantizeOptions, seed: int) -> dict[str, JsonValue]:
    return {"axis": selected.channels if options.channelwise else None}


def _integers(selected: SelectedTensor, options: QuantizeOptions, seed: int) -> dict[str, JsonValue]:
    return {
        "bits": options.bits,
        "symmetric": not options.asymmetric,
        "axis": selected.channels if options.channelwise else None,
        "group": options.group,
    }


def _clusters(selected: SelectedTensor, options: QuantizeOptions, seed: int) -> dict[str, JsonValue]:
    return {"kind": "kmeans", "bits": options.bits, "axis": None, "init": str(options.init), "seed": seed}


def _powers(selected: SelectedTensor, options: QuantizeOptions, seed: int) -> dict[str, JsonValue]:
    axis = selected.channels if options.channelwise else None
    terms = options.terms or default_terms(options.bits)
    return {"kind": "apot", "bits": options.bits, "axis": axis, "terms": terms}


METHODS: dict[QuantizeMethod, Method] = {
    QuantizeMethod.FP16: Method(FP16, _none),
    QuantizeMethod.BF16: Method(BF16, _none),
    QuantizeMethod.UINT8: Method(AFFINE_U8, _axis),
    QuantizeMethod.CODEBOOK: Method(CODEBOOK, _clusters),
    QuantizeMethod.APOT: Method(CODEBOOK, _powers),
    **dict.fromkeys(INTEGERS, Method(INTN, _integers)),
}
