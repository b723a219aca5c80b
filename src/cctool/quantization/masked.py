"""Storage of a masked weight: the mask's bits, and the values where it is True, in C order.

The values are a row of their own and may lie there in fewer bits: ``inner`` names the encoding, whose parts
are called ``values.NAME``. What the mask takes away is exactly zero, however the rest is rounded. A range for
each channel is that of the channel's kept values, and which channel a value belongs to follows from the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from pydantic import JsonValue
from torch import Tensor

from cctool.checkpoint.encoding import EncodedTensor, Encoding
from cctool.errors import CorruptCheckpointError, QuantizationError
from cctool.quantization.affine import AFFINE_U8, from_levels, to_levels
from cctool.quantization.bits import pack_bits, unpack_bits
from cctool.quantization.half import BF16, FP16
from cctool.quantization.parts import decoded_dtype, floating_name, part, refuse_nonfinite, require_parts

__all__ = ["MASKED", "Inner", "encode_masked", "inner_of", "narrowed", "widened"]

_NAME = "masked"
_BITS, _VALUES, _INNER, _AXIS = "bits", "values", "inner", "axis"
_TOP = 255
_INNERS: dict[str, Encoding] = {encoding.name: encoding for encoding in (FP16, BF16, AFFINE_U8)}


@dataclass(frozen=True)
class Inner:
    """How the kept values are stored.

    Attributes:
        encoding: name of an encoding; None keeps them as they are.
        axis: dimension of the whole tensor whose slices have a range each; affine-u8 only.
    """

    encoding: str | None = None
    axis: int | None = None

    @property
    def per_channel(self) -> bool:
        """Whether there is a range for each channel."""
        return self.axis is not None


def inner_of(encoding: str, parameters: Mapping[str, JsonValue]) -> Inner:
    """How a masked tensor's values are stored where all of the tensor would be stored so.

    Args:
        encoding: ``fp16``, ``bf16``, ``affine-u8``, or ``masked`` itself.
        parameters: of that encoding.

    Raises:
        QuantizationError: if it is none of these, or the parameters are malformed.
    """
    name = parameters.get(_INNER) if encoding == _NAME else encoding
    inner = Inner(name if isinstance(name, str) else None, _axis(parameters.get(_AXIS)))
    if (name is not None and name not in _INNERS) or not _consistent(inner, parameters.get(_AXIS)):
        raise QuantizationError(f"{_NAME}: values cannot be stored as {name!r} {dict(parameters)}")
    return inner


def _axis(value: JsonValue) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _consistent(inner: Inner, given: JsonValue) -> bool:
    return inner.axis == given and (inner.axis is None or inner.encoding == AFFINE_U8.name)


def encode_masked(
    tensor: Tensor, mask: Tensor, inner: Inner | None = None, bits: Tensor | None = None
) -> EncodedTensor:
    """Store a masked tensor.

    Args:
        tensor: floating point, zero where the mask is False.
        mask: bool, of the same shape, True where a value stays.
        inner: how the values are stored; None as they are.
        bits: the mask as `pack_bits` made it, to be shared with the mask's own stored form.

    Raises:
        QuantizationError: if the tensor is not zero where the mask is False, or cannot be stored so.
    """
    inner = inner or Inner()
    dtype = floating_name(tensor, _NAME)
    tensor, mask = tensor.detach().cpu(), mask.detach().cpu()
    if tensor.shape != mask.shape or bool((tensor != 0).logical_and_(mask.logical_not()).any()):
        raise QuantizationError(f"{_NAME}: the tensor is not zero where its mask says so")
    if inner.axis is not None and not 0 <= inner.axis < tensor.dim():
        raise QuantizationError(f"{_NAME}: axis {inner.axis} of a tensor with {tensor.dim()} dimensions")
    values = tensor.contiguous()[mask.contiguous()]
    parts = {_BITS: pack_bits(mask) if bits is None else bits, **_encode_values(values, mask, inner)}
    return EncodedTensor(
        _NAME, tuple(tensor.shape), dtype, parts, {_INNER: inner.encoding, _AXIS: inner.axis}
    )


def _encode_values(values: Tensor, mask: Tensor, inner: Inner) -> dict[str, Tensor]:
    if inner.encoding is None:
        return {_VALUES: values}
    if inner.axis is not None:
        return _prefixed(_channel_levels(values, mask, inner.axis))
    parameters = {_AXIS: None} if inner.encoding == AFFINE_U8.name else {}
    return _prefixed(_INNERS[inner.encoding].encode(values, parameters).parts)


def _prefixed(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{_VALUES}.{name}": value for name, value in parts.items()}


def _channels(mask: Tensor, axis: int) -> Tensor:
    """For each kept value the index along ``axis`` that it lies at; shape (kept,)."""
    shape = [-1 if dim == axis else 1 for dim in range(mask.dim())]
    return torch.arange(mask.shape[axis]).view(shape).expand(mask.shape)[mask]


def _channel_levels(values: Tensor, mask: Tensor, axis: int) -> dict[str, Tensor]:
    """`affine` with the range of each channel's kept values; 0 to 0 where a channel keeps none."""
    refuse_nonfinite(values, AFFINE_U8.name)
    channel, empty = _channels(mask, axis), values.new_zeros(mask.shape[axis])
    low = empty.scatter_reduce(0, channel, values, "amin", include_self=False)
    high = empty.scatter_reduce(0, channel, values, "amax", include_self=False)
    if not torch.isfinite(high.double() - low.double()).all():
        raise QuantizationError(f"{AFFINE_U8.name}: the range of a tensor is larger than float64 can hold")
    levels = to_levels(values, low[channel], high[channel], _TOP).to(torch.uint8)
    return {"levels": levels, "low": low, "high": high}


def _encode(tensor: Tensor, parameters: Mapping[str, JsonValue]) -> EncodedTensor:
    # Nobody says what the mask is: what is zero goes.
    return encode_masked(tensor, tensor.detach() != 0, inner_of(_NAME, parameters))


def _decode(encoded: EncodedTensor) -> Tensor:
    dtype, inner = decoded_dtype(encoded), _stored_inner(encoded)
    names = {name for name in encoded.parts if name.partition(".")[0] == _VALUES}
    require_parts(encoded, {_BITS, *names})
    mask = unpack_bits(encoded)
    values = _decode_values(encoded, dtype, inner, mask)
    return torch.zeros(encoded.shape, dtype=dtype).masked_scatter_(mask, values)


def _decode_values(encoded: EncodedTensor, dtype: torch.dtype, inner: Inner, mask: Tensor) -> Tensor:
    kept = int(mask.sum())
    if inner.encoding is None:
        require_parts(encoded, {_BITS, _VALUES})
        return part(encoded, _VALUES, dtype, (kept,))
    if inner.axis is not None:
        require_parts(encoded, {_BITS, *_prefixed(dict.fromkeys(("levels", "low", "high"), mask))})
        levels = part(encoded, f"{_VALUES}.levels", torch.uint8, (kept,))
        bounds = [
            part(encoded, f"{_VALUES}.{name}", dtype, (encoded.shape[inner.axis],))
            for name in ("low", "high")
        ]
        channel = _channels(mask, inner.axis)
        return from_levels(levels, bounds[0][channel], bounds[1][channel], _TOP).to(dtype)
    return _INNERS[inner.encoding].decode(_inner_tensor(encoded, inner.encoding, kept))


def _inner_tensor(encoded: EncodedTensor, name: str, kept: int) -> EncodedTensor:
    prefix = f"{_VALUES}."
    parts = {k.removeprefix(prefix): value for k, value in encoded.parts.items() if k.startswith(prefix)}
    if len(parts) + 1 != len(encoded.parts):
        raise CorruptCheckpointError(f"{_NAME}: has the parts {', '.join(sorted(encoded.parts))}")
    parameters: dict[str, JsonValue] = {_AXIS: None} if name == AFFINE_U8.name else {}
    return EncodedTensor(name, (kept,), encoded.dtype, parts, parameters)


def narrowed(encoded: EncodedTensor, mask: Tensor, bits: Tensor) -> EncodedTensor:
    """What a mask leaves of a stored tensor, without rounding anything again: levels and ranges stay.

    Args:
        encoded: stored as fp16, bf16, affine-u8 or masked; it holds all that the mask lets stay.
        mask: bool, of the tensor's shape, True where a value stays.
        bits: the mask as `pack_bits` made it.

    Raises:
        QuantizationError: if it is stored in another way, or lacks values that the mask lets stay.
    """
    mask = mask.detach().cpu()
    inner = inner_of(encoded.encoding, encoded.parameters)
    if encoded.encoding == _NAME:
        before = unpack_bits(encoded)
        if bool(mask.logical_and(before.logical_not()).any()):
            raise QuantizationError(f"{_NAME}: a mask cannot let stay what an earlier one took away")
        rows, kept = encoded.parts, mask[before]
    else:
        rows, kept = _prefixed(encoded.parts), mask
    parts = {name: value[kept] if name in _ROWS else value for name, value in rows.items()}
    parameters: dict[str, JsonValue] = {_INNER: inner.encoding, _AXIS: inner.axis}
    return replace(encoded, encoding=_NAME, parts={**parts, _BITS: bits}, parameters=parameters)


def widened(encoded: EncodedTensor) -> EncodedTensor | None:
    """A masked tensor whose mask takes nothing away, stored by its inner encoding alone.

    Returns:
        None where its values are stored as they are: the tensor is dense. The same object where the mask
        takes something away.
    """
    inner = _stored_inner(encoded)
    if not bool(unpack_bits(encoded).all()):
        return encoded
    if inner.encoding is None:
        return None
    prefix = f"{_VALUES}."
    parts = {
        name.removeprefix(prefix): value.reshape(encoded.shape) if name in _ROWS else value
        for name, value in encoded.parts.items()
        if name != _BITS
    }
    parameters: dict[str, JsonValue] = {_AXIS: inner.axis} if inner.encoding == AFFINE_U8.name else {}
    return replace(encoded, encoding=inner.encoding, parts=parts, parameters=parameters)


def _stored_inner(encoded: EncodedTensor) -> Inner:
    try:
        inner = inner_of(_NAME, encoded.parameters)
    except QuantizationError as error:
        raise CorruptCheckpointError(str(error)) from None
    axis = inner.axis
    if set(encoded.parameters) != {_INNER, _AXIS} or not (axis is None or 0 <= axis < len(encoded.shape)):
        raise CorruptCheckpointError(f"{_NAME}: malformed parameters {dict(encoded.parameters)}")
    return inner


def _take(encoded: EncodedTensor, dim: int, indices: Tensor) -> EncodedTensor:
    inner, indices = _stored_inner(encoded), indices.cpu()
    mask = unpack_bits(encoded)
    place = (mask.reshape(-1).cumsum(0) - 1).reshape(mask.shape).index_select(dim, indices)
    mask = mask.index_select(dim, indices)
    kept = place[mask]
    parts = {name: value[kept] for name, value in encoded.parts.items() if name in _ROWS}
    parts |= {name: value for name, value in encoded.parts.items() if name not in {*_ROWS, _BITS}}
    if inner.axis is not None and dim % len(encoded.shape) == inner.axis:
        parts |= {name: encoded.parts[name].index_select(0, indices) for name in _BOUNDS}
    return replace(encoded, shape=tuple(mask.shape), parts={**parts, _BITS: pack_bits(mask)})


_ROWS = (_VALUES, f"{_VALUES}.values", f"{_VALUES}.levels")
"""Parts that hold one entry for each kept value."""
_BOUNDS = (f"{_VALUES}.low", f"{_VALUES}.high")

MASKED = Encoding(_NAME, _encode, _decode, _take)
