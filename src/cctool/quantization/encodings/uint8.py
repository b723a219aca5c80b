"""Affine (min-max) quantization: evenly spaced levels from the smallest to the largest value.

    q = round((w - min) / (max - min) * (levels - 1)),    w' = q / (levels - 1) * (max - min) + min

rounded half to even. The arithmetic is float64, whose error is far below half a step of the stored type; so
min and max are reproduced exactly, and encoding what was decoded gives the same integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import JsonValue
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError, QuantizationError
from cctool.checkpoint.encoding import EncodedTensor, Encoding
from cctool.quantization.encodings.parts import (
    RowEncoding,
    at,
    decoded_dtype,
    floating_name,
    is_axis,
    part,
    refuse_nonfinite,
    require_parts,
    row_length,
)
from cctool.quantization.encodings.scale_groups import ScaleGroups

_NAME = "affine-u8"
_TOP = 255


def min_max(tensor: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, both of shape () or (size of ``axis``,), of the tensor's type.

    Args:
        tensor: any shape.
        axis: dimension whose slices have separate ranges, 0 if a slice is empty; None for one range.
    """
    rows = tensor.reshape(1, -1) if axis is None else tensor.movedim(axis, 0).flatten(1)
    if not rows.numel():
        low = high = tensor.new_zeros(rows.shape[0])
    else:
        low, high = rows.amin(1), rows.amax(1)
    return (low[0], high[0]) if axis is None else (low, high)


def to_levels(tensor: Tensor, low: Tensor, high: Tensor, top: int, axis: int | None = None) -> Tensor:
    """The numbers 0..``top`` of the nearest levels, as float64; 0 if high == low.

    >>> to_levels(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor(-1.0), torch.tensor(1.0), 255).tolist()
    [0.0, 128.0, 255.0]
    """
    low, high = _aligned(low, tensor.dim(), axis), _aligned(high, tensor.dim(), axis)
    span = high - low
    # Equal values are all level 0; any other divisor than 0 will do.
    span = torch.where(span > 0, span, torch.ones_like(span))
    return tensor.to(torch.float64, copy=True).sub_(low).div_(span).mul_(top).round_()


def from_levels(levels: Tensor, low: Tensor, high: Tensor, top: int, axis: int | None = None) -> Tensor:
    """The values of the levels 0..``top``, as float64.

    >>> from_levels(torch.tensor([0, 51, 255]), torch.tensor(-1.0), torch.tensor(1.0), 255).tolist()
    [-1.0, -0.6, 1.0]
    """
    low, high = _aligned(low, levels.dim(), axis), _aligned(high, levels.dim(), axis)
    values = levels.to(torch.float64, copy=True).div_(top).mul_(high - low).add_(low)
    # (max - min) + min is rounded, and may differ from max if one of them is much smaller.
    return torch.where(levels == top, high, values)


def _aligned(bound: Tensor, dims: int, axis: int | None) -> Tensor:
    bound = bound.double()
    return bound if axis is None else bound.view([-1 if dim == axis else 1 for dim in range(dims)])


def _encode(tensor: Tensor, parameters: Mapping[str, JsonValue]) -> EncodedTensor:
    axis = parameters.get("axis")
    if not is_axis(axis, tensor.dim()):
        raise QuantizationError(f"{_NAME}: axis {axis!r} of a tensor with {tensor.dim()} dimensions")
    dtype = floating_name(tensor, _NAME)
    refuse_nonfinite(tensor, _NAME)
    tensor = tensor.detach().cpu()
    low, high = min_max(tensor, axis)
    if not torch.isfinite(high.double() - low.double()).all():
        raise QuantizationError(f"{_NAME}: the range of a tensor is larger than float64 can hold")
    levels = to_levels(tensor, low, high, _TOP, axis).to(torch.uint8, memory_format=torch.contiguous_format)
    parts = {"levels": levels, "low": low.clone(), "high": high.clone()}
    return EncodedTensor(_NAME, tuple(tensor.shape), dtype, parts, {"axis": axis})


def _decode(encoded: EncodedTensor) -> Tensor:
    dtype = decoded_dtype(encoded)
    axis = _stored_axis(encoded)
    require_parts(encoded, {"levels", "low", "high"})
    levels = part(encoded, "levels", torch.uint8, encoded.shape)
    bounds = () if axis is None else (encoded.shape[axis],)
    low, high = part(encoded, "low", dtype, bounds), part(encoded, "high", dtype, bounds)
    return from_levels(levels, low, high, _TOP, axis).to(dtype)


def _take(encoded: EncodedTensor, dim: int, indices: Tensor) -> EncodedTensor:
    axis = _stored_axis(encoded)
    indices = indices.cpu()
    parts = {**encoded.parts, "levels": encoded.parts["levels"].index_select(dim, indices)}
    if axis is not None and dim % len(encoded.shape) == axis:
        parts |= {name: encoded.parts[name].index_select(0, indices) for name in ("low", "high")}
    return replace(encoded, shape=tuple(parts["levels"].shape), parts=parts)


def _stored_axis(encoded: EncodedTensor) -> int | None:
    axis = encoded.parameters.get("axis")
    if set(encoded.parameters) != {"axis"} or not is_axis(axis, len(encoded.shape)):
        raise CorruptCheckpointError(f"{_NAME}: malformed parameters {dict(encoded.parameters)}")
    return axis


AFFINE_U8 = Encoding(_NAME, _encode, _decode, _take)


def _encode_row(
    values: Tensor, shape: tuple[int, ...], mask: Tensor | None, parameters: Mapping[str, JsonValue]
) -> EncodedTensor:
    """Encode with the range of the kept values, for each slice of ``axis``; 0 to 0 if it keeps none."""
    axis = parameters.get("axis")
    if not is_axis(axis, len(shape)):
        raise QuantizationError(f"{_NAME}: axis {axis!r} of a tensor with {len(shape)} dimensions")
    refuse_nonfinite(values, _NAME)
    groups = ScaleGroups(shape, axis)
    index, empty = at(groups.index(), mask), values.new_zeros(math.prod(groups.ranges))
    low = empty.scatter_reduce(0, index, values, "amin", include_self=False)
    high = empty.scatter_reduce(0, index, values, "amax", include_self=False)
    if not torch.isfinite(high.double() - low.double()).all():
        raise QuantizationError(f"{_NAME}: the range of a tensor is larger than float64 can hold")
    levels = to_levels(values, low[index], high[index], _TOP).to(torch.uint8)
    parts = {"levels": levels, "low": low.reshape(groups.ranges), "high": high.reshape(groups.ranges)}
    return EncodedTensor(_NAME, shape, floating_name(values, _NAME), parts, {"axis": axis})


def _decode_row(encoded: EncodedTensor, mask: Tensor | None) -> Tensor:
    dtype, axis = decoded_dtype(encoded), _stored_axis(encoded)
    require_parts(encoded, {"levels", "low", "high"})
    levels = part(encoded, "levels", torch.uint8, (row_length(encoded.shape, mask),))
    groups = ScaleGroups(encoded.shape, axis)
    low, high = (part(encoded, name, dtype, groups.ranges).reshape(-1) for name in ("low", "high"))
    index = at(groups.index(), mask)
    return from_levels(levels, low[index], high[index], _TOP).to(dtype)


def _cut(encoded: EncodedTensor, dim: int, indices: Tensor) -> dict[str, Tensor]:
    _, before = ScaleGroups(encoded.shape, _stored_axis(encoded)).taken(dim, indices)
    return {name: encoded.parts[name].reshape(-1)[before] for name in ("low", "high")}


AFFINE_U8_ROWS = RowEncoding(_NAME, "levels", lambda encoded: None, _encode_row, _decode_row, _cut)
