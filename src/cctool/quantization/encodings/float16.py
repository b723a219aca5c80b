"""Storage as 16-bit floating point: IEEE half (``fp16``) and bfloat16 (``bf16``), rounded half to even."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import JsonValue
from torch import Tensor

from cctool.base.errors import QuantizationError
from cctool.checkpoint.encoding import EncodedTensor, Encoding
from cctool.quantization.encodings.parts import (
    RowEncoding,
    decoded_dtype,
    floating_name,
    part,
    refuse_nonfinite,
    require_parts,
    row_length,
)

_VALUES = "values"


def _half(name: str, stored: torch.dtype) -> Encoding:
    def encode(tensor: Tensor, parameters: Mapping[str, JsonValue]) -> EncodedTensor:
        dtype = floating_name(tensor, name)
        refuse_nonfinite(tensor, name)
        values = tensor.detach().cpu().to(stored, memory_format=torch.contiguous_format)
        # Finite values above the largest 16-bit number became infinite.
        if not torch.isfinite(values).all():
            raise QuantizationError(
                f"{name} holds magnitudes up to {torch.finfo(stored).max:.4g}, "
                f"the tensor has {float(tensor.abs().max()):.4g}; bf16 or uint8 may hold it"
            )
        return EncodedTensor(name, tuple(tensor.shape), dtype, {_VALUES: values})

    def decode(encoded: EncodedTensor) -> Tensor:
        dtype = decoded_dtype(encoded)
        require_parts(encoded, {_VALUES})
        return part(encoded, _VALUES, stored, encoded.shape).to(dtype, copy=True)

    def take(encoded: EncodedTensor, dim: int, indices: Tensor) -> EncodedTensor:
        values = encoded.parts[_VALUES].index_select(dim, indices.cpu())
        return replace(encoded, shape=tuple(values.shape), parts={_VALUES: values})

    return Encoding(name, encode, decode, take)


FP16 = _half("fp16", torch.float16)
BF16 = _half("bf16", torch.bfloat16)


def _half_rows(encoding: Encoding) -> RowEncoding:
    def encode(
        values: Tensor, shape: tuple[int, ...], mask: Tensor | None, parameters: Mapping[str, JsonValue]
    ) -> EncodedTensor:
        return replace(encoding.encode(values, parameters), shape=shape)

    def decode(encoded: EncodedTensor, mask: Tensor | None) -> Tensor:
        return encoding.decode(replace(encoded, shape=(row_length(encoded.shape, mask),)))

    return RowEncoding(encoding.name, _VALUES, lambda encoded: None, encode, decode, lambda *cut: {})


FP16_ROWS = _half_rows(FP16)
BF16_ROWS = _half_rows(BF16)
