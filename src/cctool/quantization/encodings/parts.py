"""Parts of stored tensors: checked before anything is decoded, and as rows of what a mask keeps.

Encodings that can store part of a tensor take the *row* of values that a mask keeps, in C order. Which range
or table a value belongs to follows from its place in the whole tensor. So what is stored for a channel stays
with the channel, whatever the mask removes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from pydantic import JsonValue
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError, QuantizationError
from cctool.checkpoint.encoding import EncodedTensor, Encoding
from cctool.checkpoint.file.payload import DTYPES
from cctool.quantization.encodings.packing import pack_integers, unpack_integers


@dataclass(frozen=True)
class RowEncoding:
    """One such encoding; parts and parameters are those of the encoding with its name.

    Attributes:
        name: of the encoding.
        row: name of the part with one entry per value.
        bits: encoded -> width of the entries if they are packed; None if each is an element.
        encode: (values of shape (kept,), shape of the tensor, mask, parameters) -> encoded, of that shape.
        decode: (encoded, mask) -> values of shape (kept,), of the encoded type.
        cut: (encoded, dim, indices) -> the other parts, for only these indices of a dimension.

    A mask is bool in the tensor's shape, or None if everything is kept.
    """

    name: str
    row: str
    bits: Callable[[EncodedTensor], int | None]
    encode: Callable[[Tensor, tuple[int, ...], Tensor | None, Mapping[str, JsonValue]], EncodedTensor]
    decode: Callable[[EncodedTensor, Tensor | None], Tensor]
    cut: Callable[[EncodedTensor, int, Tensor], Mapping[str, Tensor]]


def row_length(shape: tuple[int, ...], mask: Tensor | None) -> int:
    """Number of values in a row."""
    return math.prod(shape) if mask is None else int(mask.sum())


def at(index: Tensor, mask: Tensor | None) -> Tensor:
    """The entries of a whole-shape tensor at the places of the row's values; shape (kept,)."""
    return index.reshape(-1) if mask is None else index[mask]


def unpacked_row(encoded: EncodedTensor, name: str, bits: int, count: int) -> Tensor:
    """A packed part, read and checked; shape (count,)."""
    return unpack_integers(encoded.parts[name], bits, count, f"{encoded.encoding}: the part {name!r}")


def picked(rows: RowEncoding, encoded: EncodedTensor, count: int, kept: Tensor) -> Tensor:
    """The part with one entry per value, reduced to some of its ``count`` entries.

    ``kept`` are int64 positions in the row, or bool of shape (count,).
    """
    bits = rows.bits(encoded)
    if bits is None:
        return encoded.parts[rows.row].reshape(-1)[kept]
    return pack_integers(unpacked_row(encoded, rows.row, bits, count)[kept], bits)


def encoding_of(rows: RowEncoding) -> Encoding:
    """The encoding of whole tensors as a row of all their values."""

    def encode(tensor: Tensor, parameters: Mapping[str, JsonValue]) -> EncodedTensor:
        return rows.encode(tensor.detach().cpu().reshape(-1), tuple(tensor.shape), None, parameters)

    def decode(encoded: EncodedTensor) -> Tensor:
        return whole_shape(encoded, rows.decode(encoded, None))

    def take(encoded: EncodedTensor, dim: int, indices: Tensor) -> EncodedTensor:
        indices = indices.cpu()
        count = math.prod(encoded.shape)
        place = torch.arange(count).reshape(encoded.shape).index_select(dim, indices)
        row = picked(rows, encoded, count, place.reshape(-1))
        parts = {rows.row: row, **rows.cut(encoded, dim, indices)}
        return replace(encoded, shape=tuple(place.shape), parts=parts)

    return Encoding(rows.name, encode, decode, take)


def is_axis(axis: JsonValue, dims: int) -> TypeGuard[int | None]:
    """Whether a parameter is None or one of a tensor's dimensions, counted from 0."""
    return axis is None or (isinstance(axis, int) and not isinstance(axis, bool) and 0 <= axis < dims)


def whole_shape(encoded: EncodedTensor, values: Tensor) -> Tensor:
    """A row of all values, in the tensor's shape.

    Raises:
        CorruptCheckpointError: if the shape overflows, as sizes next to a 0 may, which no data limits.
    """
    try:
        return values.reshape(encoded.shape)
    except RuntimeError:
        raise CorruptCheckpointError(
            f"{encoded.encoding}: shape {list(encoded.shape)} is impossible"
        ) from None


def decoded_dtype(encoded: EncodedTensor) -> torch.dtype:
    """Element type of the decoded tensor.

    Raises:
        CorruptCheckpointError: if it is not a floating-point type.
    """
    dtype = DTYPES.get(encoded.dtype)
    if dtype is None or not dtype.is_floating_point:
        raise CorruptCheckpointError(f"{encoded.encoding}: cannot decode to element type {encoded.dtype!r}")
    return dtype


def require_parts(encoded: EncodedTensor, names: Collection[str]) -> None:
    """Raise CorruptCheckpointError unless ``encoded`` has exactly the parts ``names``."""
    if set(encoded.parts) != set(names):
        raise CorruptCheckpointError(
            f"{encoded.encoding}: has the parts {', '.join(sorted(encoded.parts)) or 'none'} "
            f"instead of {', '.join(sorted(names))}"
        )


def part(encoded: EncodedTensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """One part, checked.

    Raises:
        CorruptCheckpointError: if its element type or shape is another one.
    """
    found = encoded.parts[name]
    if found.dtype != dtype or tuple(found.shape) != tuple(shape):
        raise CorruptCheckpointError(
            f"{encoded.encoding}: the part {name!r} is {found.dtype} {list(found.shape)} "
            f"instead of {dtype} {list(shape)}"
        )
    return found


def floating_name(tensor: Tensor, encoding: str) -> str:
    """Name of a tensor's element type, as ``float32``.

    Raises:
        QuantizationError: if it is not a floating-point type that a checkpoint may hold.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_floating_point() or name not in DTYPES:
        raise QuantizationError(f"{encoding} stores floating-point tensors only, not {name}")
    return name


def refuse_nonfinite(tensor: Tensor, encoding: str) -> None:
    """Raise QuantizationError if ``tensor`` holds a NaN or an infinity."""
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise QuantizationError(f"{encoding} cannot store {bad:,} NaN or infinite values of a tensor")
