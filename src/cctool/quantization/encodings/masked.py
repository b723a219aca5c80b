"""Storage of a masked weight: the mask's bits, and the values where it is True, in C order.

The values are a row of their own and may lie there in fewer bits: ``inner`` names the encoding, whose parts
are called ``values.NAME``. What the mask takes away is exactly zero, however the rest is rounded. A range or
table of a channel or a group is that of the kept values there, and which a value belongs to follows from the
bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from pydantic import JsonValue
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError, QuantizationError
from cctool.checkpoint.encoding import EncodedTensor, Encoding
from cctool.quantization.encodings.bitmask import pack_bits, unpack_bits
from cctool.quantization.encodings.codebook import CODEBOOK_ROWS
from cctool.quantization.encodings.float16 import BF16_ROWS, FP16_ROWS
from cctool.quantization.encodings.intn import INTN_ROWS
from cctool.quantization.encodings.parts import (
    RowEncoding,
    decoded_dtype,
    floating_name,
    is_axis,
    part,
    picked,
    require_parts,
)
from cctool.quantization.encodings.uint8 import AFFINE_U8_ROWS

__all__ = ["MASKED", "Inner", "encode_masked", "inner_form", "inner_of", "narrowed", "widened"]

_NAME = "masked"
_BITS, _VALUES, _INNER, _AXIS = "bits", "values", "inner", "axis"
_HALVES, _AFFINE = (FP16_ROWS, BF16_ROWS), (AFFINE_U8_ROWS,)
_INNERS: dict[str, RowEncoding] = {rows.name: rows for rows in (*_HALVES, *_AFFINE, INTN_ROWS, CODEBOOK_ROWS)}
_WITHOUT_AXIS = {None, *(rows.name for rows in _HALVES)}
_WITHOUT_SETTINGS = {*_WITHOUT_AXIS, *(rows.name for rows in _AFFINE)}


@dataclass(frozen=True)
class Inner:
    """How the kept values are stored.

    Attributes:
        encoding: name of an encoding; None keeps them as they are.
        axis: dimension of the whole tensor whose slices have a range, scale or table each.
        settings: further parameters of the encoding.
    """

    encoding: str | None = None
    axis: int | None = None
    settings: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, JsonValue]:
        """Of the encoding of the whole tensor."""
        return {**self.settings} if self.encoding in _WITHOUT_AXIS else {**self.settings, _AXIS: self.axis}


def inner_of(encoding: str, parameters: Mapping[str, JsonValue]) -> Inner:
    """How a masked tensor's values are stored where all of the tensor would be stored so.

    Args:
        encoding: ``fp16``, ``bf16``, ``affine-u8``, ``intn``, ``codebook``, or ``masked`` itself.
        parameters: of that encoding.

    Raises:
        QuantizationError: if it is none of these, or the parameters are malformed.
    """
    name = parameters.get(_INNER) if encoding == _NAME else encoding
    axis = parameters.get(_AXIS)
    settings = {key: value for key, value in parameters.items() if key not in (_AXIS, _INNER)}
    known = name is None or (isinstance(name, str) and name in _INNERS)
    if (
        not known
        or not (axis is None or type(axis) is int)
        or (axis is not None and name in _WITHOUT_AXIS)
        or (settings and name in _WITHOUT_SETTINGS)
    ):
        raise QuantizationError(f"{_NAME}: values cannot be stored as {name!r} {dict(parameters)}")
    return Inner(None if name is None else str(name), None if axis is None else int(str(axis)), settings)


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
    if not is_axis(inner.axis, tensor.dim()):
        raise QuantizationError(f"{_NAME}: axis {inner.axis} of a tensor with {tensor.dim()} dimensions")
    shape, values = tuple(tensor.shape), tensor.contiguous()[mask.contiguous()]
    packed = {_BITS: pack_bits(mask) if bits is None else bits}
    if inner.encoding is None:
        return EncodedTensor(_NAME, shape, dtype, {**packed, _VALUES: values}, _parameters(inner))
    form = _INNERS[inner.encoding].encode(values, shape, mask, inner.parameters)
    return _outer(form, packed)


def _outer(form: EncodedTensor, bits: Mapping[str, Tensor]) -> EncodedTensor:
    """The masked tensor whose values are stored as ``form``, whose row holds only these."""
    parts = {**bits, **{f"{_VALUES}.{name}": value for name, value in form.parts.items()}}
    parameters = _parameters(inner_of(form.encoding, form.parameters))
    return replace(form, encoding=_NAME, parts=parts, parameters=parameters)


def _parameters(inner: Inner) -> dict[str, JsonValue]:
    return {_INNER: inner.encoding, _AXIS: inner.axis, **inner.settings}


def inner_form(encoded: EncodedTensor) -> EncodedTensor | None:
    """A masked tensor's values as their own encoding stores them: its parts and parameters.

    The shape is that of the whole tensor, but the part with an entry for each value has those of the kept
    ones only. None where values are stored as they are.

    Raises:
        CorruptCheckpointError: if there are parts that belong to neither.
    """
    inner = _stored_inner(encoded)
    if inner.encoding is None:
        return None
    prefix = f"{_VALUES}."
    parts = {
        name.removeprefix(prefix): value for name, value in encoded.parts.items() if name.startswith(prefix)
    }
    require_parts(encoded, {_BITS, *(f"{prefix}{name}" for name in parts)})
    return EncodedTensor(inner.encoding, encoded.shape, encoded.dtype, parts, inner.parameters)


def _encode(tensor: Tensor, parameters: Mapping[str, JsonValue]) -> EncodedTensor:
    # Nobody says what the mask is: what is zero goes.
    return encode_masked(tensor, tensor.detach() != 0, inner_of(_NAME, parameters))


def _decode(encoded: EncodedTensor) -> Tensor:
    dtype, form = decoded_dtype(encoded), inner_form(encoded)
    if _BITS not in encoded.parts or form is None:
        require_parts(encoded, {_BITS, _VALUES})
    mask = unpack_bits(encoded)
    if form is None:
        values = part(encoded, _VALUES, dtype, (int(mask.sum()),))
    else:
        values = _INNERS[form.encoding].decode(form, mask)
    return torch.zeros(encoded.shape, dtype=dtype).masked_scatter_(mask, values)


def narrowed(encoded: EncodedTensor, mask: Tensor, bits: Tensor) -> EncodedTensor:
    """What a mask leaves of a stored tensor, without rounding anything again: levels, ranges and tables stay.

    Args:
        encoded: stored as masked or as one of the encodings that its values may have; it holds all that the
            mask lets stay.
        mask: bool, of the tensor's shape, True where a value stays.
        bits: the mask as `pack_bits` made it.

    Raises:
        QuantizationError: if it is stored in another way, or lacks values that the mask lets stay.
    """
    mask = mask.detach().cpu()
    if encoded.encoding != _NAME:
        inner_of(encoded.encoding, encoded.parameters)
        return _outer(_with_row(encoded, math.prod(encoded.shape), mask.reshape(-1)), {_BITS: bits})
    before, form = unpack_bits(encoded), inner_form(encoded)
    if bool(mask.logical_and(before.logical_not()).any()):
        raise QuantizationError(f"{_NAME}: a mask cannot let stay what an earlier one took away")
    kept = mask[before]
    if form is None:
        return replace(encoded, parts={_VALUES: encoded.parts[_VALUES][kept], _BITS: bits})
    return _outer(_with_row(form, len(kept), kept), {_BITS: bits})


def _with_row(form: EncodedTensor, count: int, kept: Tensor) -> EncodedTensor:
    """A form of ``count`` entries with those that are ``kept``, as `picked` takes it."""
    rows = _INNERS[form.encoding]
    return replace(form, parts={**form.parts, rows.row: picked(rows, form, count, kept)})


def widened(encoded: EncodedTensor) -> EncodedTensor | None:
    """A masked tensor whose mask takes nothing away, stored by its inner encoding alone.

    Returns:
        None where its values are stored as they are: the tensor is dense. The same object where the mask
        takes something away.
    """
    form = inner_form(encoded)
    if not bool(unpack_bits(encoded).all()):
        return encoded
    if form is None:
        return None
    rows = _INNERS[form.encoding]
    if rows.bits(form) is not None:
        return form
    return replace(form, parts={**form.parts, rows.row: form.parts[rows.row].reshape(form.shape)})


def _stored_inner(encoded: EncodedTensor) -> Inner:
    try:
        inner = inner_of(_NAME, encoded.parameters)
    except QuantizationError as error:
        raise CorruptCheckpointError(str(error)) from None
    if encoded.parameters.keys() != _parameters(inner).keys() or not is_axis(inner.axis, len(encoded.shape)):
        raise CorruptCheckpointError(f"{_NAME}: malformed parameters {dict(encoded.parameters)}")
    return inner


def _take(encoded: EncodedTensor, dim: int, indices: Tensor) -> EncodedTensor:
    form, indices = inner_form(encoded), indices.cpu()
    mask = unpack_bits(encoded)
    count = int(mask.sum())
    place = (mask.reshape(-1).cumsum(0) - 1).reshape(mask.shape).index_select(dim, indices)
    mask = mask.index_select(dim, indices)
    kept, packed = place[mask], {_BITS: pack_bits(mask)}
    if form is None:
        parts = {_VALUES: encoded.parts[_VALUES][kept], **packed}
        return replace(encoded, shape=tuple(mask.shape), parts=parts)
    rows = _INNERS[form.encoding]
    parts = {rows.row: picked(rows, form, count, kept), **rows.cut(form, dim, indices)}
    return _outer(replace(form, shape=tuple(mask.shape), parts=parts), packed)


MASKED = Encoding(_NAME, _encode, _decode, _take)
