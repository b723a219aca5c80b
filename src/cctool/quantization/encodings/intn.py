"""Storage as packed integers of 2 to 8 bits with a scale per tensor, slice or group: the encoding ``intn``.

    w' = (n - z) * s,    n an integer of b bits, z the zero point, s the scale

Symmetric: z is fixed, and n - z is one of -(2^(b-1) - 1) .. 2^(b-1) - 1, rounded half to even, with
s = max|w| / (2^(b-1) - 1). Asymmetric: z = round(-min / s) and n are in 0 .. 2^b - 1, rounded half up, with
s = (max - min) / (2^b - 1), where min and max are taken over the values and 0, so that 0 is stored exactly
(Jacob et al. 2018, equation 1 and section 3).

Scales and products are float32 (float64 for float64 tensors): 16-bit scales would cost more accuracy than
they save bytes, because one scale serves many integers. A scale chosen here is rounded towards zero to 24 - b
significant bits (53 - b for float64). It is then off by less than 2^-15, and every product is exact, so that
encoding what was decoded gives the same bytes. In float16 and bfloat16 products are rounded once more;
bfloat16 cannot tell all integers of 7 and 8 bits apart.

Stored integers are n, or n - z + 2^(b-1) if symmetric, packed in C order of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError, QuantizationError
from cctool.checkpoint.encoding import EncodedTensor
from cctool.quantization.encodings.packing import pack_integers
from cctool.quantization.encodings.parts import (
    RowEncoding,
    at,
    decoded_dtype,
    encoding_of,
    floating_name,
    is_axis,
    part,
    refuse_nonfinite,
    require_parts,
    row_length,
    unpacked_row,
    whole_shape,
)
from cctool.quantization.encodings.scale_groups import ScaleGroups

_NAME = "intn"
_INTEGERS, _SCALE, _ZERO, _LENGTHS = "integers", "scale", "zero_point", "lengths"


@dataclass(frozen=True)
class _Settings:
    """Parameters of the encoding, checked."""

    bits: int
    symmetric: bool
    axis: int | None
    group: int | None

    @property
    def lowest(self) -> int:
        """The value of the stored integer 0 if symmetric."""
        return -(1 << (self.bits - 1))

    @property
    def top(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def parameters(self) -> dict[str, JsonValue]:
        return {"bits": self.bits, "symmetric": self.symmetric, "axis": self.axis, "group": self.group}


@dataclass(frozen=True)
class Integers:
    """The contents of an encoded tensor.

    Attributes:
        integers: int64 in the tensor's shape: 0 .. 2^bits - 1, or -2^(bits-1) .. 2^(bits-1) - 1 if symmetric.
        scale: shape (), (slices,), (runs,) or (slices, runs).
        zero_point: int64, of the same shape; None if symmetric.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None


def encode_integers(
    integers: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    bits: int,
    axis: int | None = None,
    group: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> EncodedTensor:
    """Store given integers; they decode to (integers - zero_point) * scale, bit for bit.

    The product is computed in float32 (float64 for float64 tensors), then rounded to ``dtype``.

    Args:
        integers: of an integer type, any shape: 0 .. 2^bits - 1, or -2^(bits-1) .. 2^(bits-1) - 1 without a
            zero point.
        scale: floating point, finite and not negative; one for the tensor (shape ()), a slice (slices,),
            a run (runs,) or a run of a slice (slices, runs), with runs = ceil(elements of a slice / group).
        zero_point: of an integer type, in the shape of ``scale``, each 0 .. 2^bits - 1; None is symmetric.
        bits: 2 to 8.
        axis: dimension whose slices have separate scales.
        group: consecutive elements of a slice, in C order, that share a scale.
        dtype: of the decoded tensor.

    Raises:
        QuantizationError: if something is out of range or has the wrong shape, or float32 does not hold a
            scale exactly.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    settings = _settings(
        {"bits": bits, "symmetric": zero_point is None, "axis": axis, "group": group}, integers.dim()
    )
    shape = tuple(integers.shape)
    groups = ScaleGroups(shape, axis, group)
    given = scale.detach().cpu()
    scale = given.to(wide)
    if tuple(scale.shape) != groups.ranges or not given.is_floating_point():
        raise QuantizationError(f"{_NAME}: scales of shape {list(given.shape)}, not {list(groups.ranges)}")
    if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()) or not torch.equal(scale, given):
        raise QuantizationError(f"{_NAME}: a scale is negative, not finite, or no {wide} number")
    parts = {_SCALE: scale.contiguous().clone()}
    codes = integers.detach().cpu()
    if zero_point is None:
        codes = codes.to(torch.int64) - settings.lowest if not codes.is_floating_point() else codes
    else:
        zeros = zero_point.detach().cpu()
        if zeros.shape != scale.shape or zeros.is_floating_point():
            raise QuantizationError(f"{_NAME}: zero points are integers of the shape of the scales")
        if zeros.numel() and not 0 <= int(zeros.min()) <= int(zeros.max()) <= settings.top:
            raise QuantizationError(f"{_NAME}: a zero point is not one of 0..{settings.top}")
        parts[_ZERO] = zeros.to(torch.uint8).contiguous()
    parts[_INTEGERS] = pack_integers(codes, bits)
    name = floating_name(torch.empty(0, dtype=dtype), _NAME)
    encoded = EncodedTensor(_NAME, shape, name, parts, settings.parameters)
    if not bool(torch.isfinite(_products(encoded, None)).all()):
        raise QuantizationError(f"{_NAME}: the values are larger than {name} can hold")
    return encoded


def integers_of(encoded: EncodedTensor, mask: Tensor | None = None) -> Integers:
    """The integers, scales and zero points of an encoded tensor.

    Args:
        encoded: of this encoding.
        mask: bool, in the tensor's shape, if only its True entries are stored; the others get the integer
            that represents 0.

    Raises:
        CorruptCheckpointError: if the parts contradict the shape.
    """
    settings, groups = _stored_settings(encoded)
    codes, scale, zeros = _stored(encoded, settings, groups, mask)
    codes = codes.to(torch.int64)
    if mask is not None:
        if zeros is None:
            whole = codes.new_full((mask.numel(),), -settings.lowest)
        else:
            whole = zeros.to(torch.int64).reshape(-1)[groups.index()].reshape(-1)
        codes = whole.masked_scatter_(mask.reshape(-1), codes)
    integers = whole_shape(encoded, codes)
    if zeros is None:
        return Integers(integers + settings.lowest, scale, None)
    return Integers(integers, scale, zeros.to(torch.int64))


def _encode_row(
    values: Tensor, shape: tuple[int, ...], mask: Tensor | None, parameters: Mapping[str, JsonValue]
) -> EncodedTensor:
    dtype = floating_name(values, _NAME)
    refuse_nonfinite(values, _NAME)
    settings = _settings(parameters, len(shape))
    groups = ScaleGroups(shape, settings.axis, settings.group)
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    index = at(groups.index(), mask)
    exact = values.to(torch.float64)
    # The initial zeros make 0 part of every range.
    low = exact.new_zeros(math.prod(groups.ranges)).scatter_reduce(0, index, exact, "amin")
    high = exact.new_zeros(math.prod(groups.ranges)).scatter_reduce(0, index, exact, "amax")
    span = torch.maximum(high, -low) if settings.symmetric else high - low
    if not bool(torch.isfinite(span).all()):
        raise QuantizationError(f"{_NAME}: the range of a tensor is larger than float64 can hold")
    scale = _rounded_scale(span, settings.top, wide, settings.bits)
    steps = exact / scale[index]
    parts = {_SCALE: scale.to(wide).reshape(groups.ranges)}
    if settings.symmetric:
        codes = steps.round_().clamp_(-settings.top, settings.top) - settings.lowest
    else:
        # Both are rounded half up: so the two ends stay 2^b - 1 steps apart.
        zero = -_half_up(low / scale)
        above = torch.minimum(_half_up(high / scale), settings.top - zero)
        if bool((torch.maximum(zero, above) * scale > torch.finfo(values.dtype).max).any()):
            raise QuantizationError(
                f"{_NAME}: the range of a tensor with 0 on the grid is larger than its type"
            )
        codes = (_half_up(steps) + zero[index]).clamp_(0, settings.top)
        parts[_ZERO] = zero.to(torch.uint8).reshape(groups.ranges)
    parts[_INTEGERS] = pack_integers(codes.to(torch.int64), settings.bits)
    return EncodedTensor(_NAME, shape, dtype, parts, settings.parameters)


def _half_up(values: Tensor) -> Tensor:
    return (values + 0.5).floor_()


def _rounded_scale(span: Tensor, top: int, wide: torch.dtype, bits: int) -> Tensor:
    """Scales rounded towards zero so that a product with any integer is exact; 1 if there is no range."""
    # A product of a b-bit integer and a scale of this many digits fits the significand.
    digits = round(-math.log2(torch.finfo(wide).eps)) + 1 - bits
    fractions, exponents = np.frexp((span / top).numpy())
    rounded = np.ldexp(np.floor(np.ldexp(fractions, digits)), exponents - digits)
    # Products of subnormal scales would lose digits; a range below the smallest normal number counts as 0.
    tiny = torch.finfo(wide).tiny
    found = torch.from_numpy(np.maximum(rounded, tiny))
    return torch.where(span < tiny, torch.ones_like(found), found)


def _decode_row(encoded: EncodedTensor, mask: Tensor | None) -> Tensor:
    values = _products(encoded, mask)
    if not bool(torch.isfinite(values).all()):
        raise CorruptCheckpointError(f"{_NAME}: values are larger than {encoded.dtype} can hold")
    return values


def _products(encoded: EncodedTensor, mask: Tensor | None) -> Tensor:
    dtype = decoded_dtype(encoded)
    settings, groups = _stored_settings(encoded)
    codes, scale, zeros = _stored(encoded, settings, groups, mask)
    if not codes.numel():
        return torch.empty(0, dtype=dtype)
    index = at(groups.index(), mask)
    zero = -settings.lowest if zeros is None else zeros.reshape(-1)[index]
    steps = codes.to(scale.dtype) - zero
    return (steps * scale.reshape(-1)[index]).to(dtype)


def _stored(
    encoded: EncodedTensor, settings: _Settings, groups: ScaleGroups, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed integers as uint8 of shape (kept,), scales and zero points; all checked."""
    wide = torch.float64 if decoded_dtype(encoded) == torch.float64 else torch.float32
    codes = unpacked_row(encoded, _INTEGERS, settings.bits, row_length(encoded.shape, mask))
    scale = part(encoded, _SCALE, wide, groups.ranges)
    if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
        raise CorruptCheckpointError(f"{_NAME}: a scale is negative or not finite")
    if settings.symmetric:
        return codes, scale, None
    zeros = part(encoded, _ZERO, torch.uint8, groups.ranges)
    if zeros.numel() and int(zeros.max()) > settings.top:
        raise CorruptCheckpointError(f"{_NAME}: a zero point is not one of 0..{settings.top}")
    return codes, scale, zeros


def _settings(parameters: Mapping[str, JsonValue], dims: int) -> _Settings:
    bits, symmetric = parameters.get("bits"), parameters.get("symmetric")
    axis, group = parameters.get("axis"), parameters.get("group")
    if (
        set(parameters) - {"bits", "symmetric", "axis", "group"}
        or not (type(bits) is int and 2 <= bits <= 8)
        or type(symmetric) is not bool
        or not (group is None or (type(group) is int and group > 0))
        or not is_axis(axis, dims)
    ):
        raise QuantizationError(
            f"{_NAME}: {dict(parameters)} of a tensor with {dims} dimensions; there are 2 to 8 bits, an axis "
            "of the tensor, and groups of 1 or more"
        )
    assert isinstance(bits, int)
    assert group is None or isinstance(group, int)
    return _Settings(bits, bool(symmetric), axis, group)


def _stored_settings(encoded: EncodedTensor) -> tuple[_Settings, ScaleGroups]:
    """Settings and scale groups of a stored tensor; allocates nothing of the tensor's size."""
    try:
        settings = _settings(encoded.parameters, len(encoded.shape))
    except QuantizationError as error:
        raise CorruptCheckpointError(str(error)) from None
    if set(encoded.parameters) != set(settings.parameters):
        raise CorruptCheckpointError(f"{_NAME}: malformed parameters {dict(encoded.parameters)}")
    names = {_INTEGERS, _SCALE} if settings.symmetric else {_INTEGERS, _SCALE, _ZERO}
    if _LENGTHS not in encoded.parts:
        require_parts(encoded, names)
        return settings, ScaleGroups(encoded.shape, settings.axis, settings.group)
    require_parts(encoded, {*names, _LENGTHS})
    found = encoded.parts[_LENGTHS]
    lengths = part(encoded, _LENGTHS, torch.int32, (found.numel(),)).to(torch.int64)
    groups = ScaleGroups(encoded.shape, settings.axis, settings.group, lengths)
    if settings.group is None or bool((lengths < 1).any()) or int(lengths.sum()) != math.prod(groups.rest):
        raise CorruptCheckpointError(f"{_NAME}: the lengths of groups do not add up to a slice")
    return settings, groups


def _cut(encoded: EncodedTensor, dim: int, indices: Tensor) -> dict[str, Tensor]:
    _, groups = _stored_settings(encoded)
    smaller, before = groups.taken(dim, indices)
    names = [name for name in (_SCALE, _ZERO) if name in encoded.parts]
    parts = {name: encoded.parts[name].reshape(-1)[before] for name in names}
    if smaller.lengths is not None:
        parts[_LENGTHS] = smaller.lengths.to(torch.int32)
    return parts


INTN_ROWS = RowEncoding(
    _NAME, _INTEGERS, lambda encoded: _stored_settings(encoded)[0].bits, _encode_row, _decode_row, _cut
)
INTN = encoding_of(INTN_ROWS)
