"""Storage of a masked weight: the mask's bits, and the values where it is True, in C order.

The values form a row that may be stored in fewer bits: ``inner`` names its encoding, whose parts are called
``values.NAME``. Masked entries decode to exact zeros, however the others are rounded. The range or table of a
channel or group is that of its kept values; which one a value belongs to follows from the bits.
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
        encoding: name of an encoding; None stores them unencoded.
        axis: dimension of the whole tensor whose slices have separate ranges, scales or tables.
        settings: further parameters of the encoding.
    """

    encoding: str | None = None
    axis: int | None = None
    settings: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, JsonValue]:
        """Parameters of the encoding for the whole tensor."""
        return {**self.settings} if self.encoding in _WITHOUT_AXIS else {**self.settings, _AXIS: self.axis}


def inner_of(encoding: str, parameters: Mapping[str, JsonValue]) -> Inner:
    """How the values of a masked tensor are stored, given how the whole tensor would be.

    Args:
        encoding: ``fp16``, ``bf16``, ``affine-u8``, ``intn``, ``codebook``, or ``masked`` itself.
        parameters: of that encoding.

    Raises:
        QuantizationError: if it is another one, or the parameters are malformed.
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
        mask: bool, of the same shape, True for kept values.
        inner: how the values are stored; None is unencoded.
        bits: the mask from `pack_bits`, to be shared with the mask's own stored form.

    Raises:
        QuantizationError: if the tensor is not zero where the mask is False, or cannot be stored like this.
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
    """The masked tensor with the row of values that ``form`` holds."""
    parts = {**bits, **{f"{_VALUES}.{name}": value for name, value in form.parts.items()}}
    parameters = _parameters(inner_of(form.encoding, form.parameters))
    return replace(form, encoding=_NAME, parts=parts, parameters=parameters)


def _parameters(inner: Inner) -> dict[str, JsonValue]:
    return {_INNER: inner.encoding, _AXIS: inner.axis, **inner.settings}


def inner_form(encoded: EncodedTensor) -> EncodedTensor | None:
    """The values of a masked tensor in their own encoding: its parts and parameters.

    The shape is that of the whole tensor, but the part with one entry per value holds the kept ones only.
    None if values are stored unencoded.

    Raises:
        CorruptCheckpointError: if there are other parts.
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
    # No mask is given, so zeros count as masked.
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
    """Apply a mask to a stored tensor without rounding again: levels, ranges and tables stay.

    Args:
        encoded: masked, or in one of the encodings that values may have; it holds everything that the mask
            keeps.
        mask: bool, in the tensor's shape, True for kept values.
        bits: the mask from `pack_bits`.

    Raises:
        QuantizationError: if it is stored in another way, or lacks values that the mask keeps.
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
    """A form of ``count`` entries reduced to those ``kept``; see `picked`."""
    rows = _INNERS[form.encoding]
    return replace(form, parts={**form.parts, rows.row: picked(rows, form, count, kept)})


def widened(encoded: EncodedTensor) -> EncodedTensor | None:
    """A tensor whose mask keeps everything, stored by its inner encoding alone.

    Returns:
        None if its values are stored unencoded: the tensor is dense. The same object if the mask removes
        something.
    """
    form = inner_form(encoded)
    if not bool(unpack_bits(encoded).all()):
        return encoded
    if form is None:
        return None
    rows = _INNERS[form.encoding]
    # Packed rows are flat in both cases; others have the tensor's shape when nothing is masked.
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
    # For each kept element its position in the row; the others' numbers are not used.
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
