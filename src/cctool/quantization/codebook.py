"""Storage as indices of a table: the encoding ``codebook``.

    w' = table[index],    or scale * table[index]

There is a table for the tensor or for each slice of ``axis``, of 1 to 65,536 entries; an index takes as few
bits as tell the entries apart, and one at least. Indices are packed in C order of the tensor. A table has the
tensor's type. With scales, one for the tensor or each slice, table and scales are float32, as the products
are, or float64 for float64 tensors.

How a tensor is encoded is its parameter ``kind``:

``distinct``
    An entry for each distinct value; more than 2^bits of them are refused.
``kmeans``
    At most 2^bits centres of clusters of all values (`clustering.py`); ``init`` and ``seed`` say where they
    begin.
``apot``
    Levels that are sums of ``terms`` powers of two (`powers.py`), with the scale of least squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor

from cctool.checkpoint.encoding import EncodedTensor, Encoding
from cctool.errors import CorruptCheckpointError, QuantizationError
from cctool.quantization.clustering import INITIALISATIONS, kmeans, nearest
from cctool.quantization.groups import Groups
from cctool.quantization.packing import WIDEST, pack_integers
from cctool.quantization.parts import decoded_dtype, floating_name, part, refuse_nonfinite, require_parts
from cctool.quantization.powers import apot_levels, best_scale
from cctool.quantization.rows import RowEncoding, at, is_axis, picked, row_length, unpacked_row, whole_shape

__all__ = ["CODEBOOK", "CODEBOOK_ROWS", "Indices", "encode_codebook", "indices_of"]

_NAME = "codebook"
_INDICES, _TABLE, _SCALES = "indices", "table", "scales"
_KEYS = {
    "distinct": {"kind", "bits", "axis"},
    "kmeans": {"kind", "bits", "axis", "init", "seed"},
    "apot": {"kind", "bits", "axis", "terms"},
}


@dataclass(frozen=True)
class Indices:
    """What an encoded tensor holds.

    Attributes:
        indices: int64 of the tensor's shape.
        table: of shape (entries,), or (slices, entries).
        scales: of shape () or (slices,); None where entries are the values.
    """

    indices: Tensor
    table: Tensor
    scales: Tensor | None


def encode_codebook(
    indices: Tensor,
    table: Tensor,
    axis: int | None = None,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    parameters: Mapping[str, JsonValue] | None = None,
) -> EncodedTensor:
    """Store indices and a table that were found elsewhere; they decode to table[index], bit for bit.

    Args:
        indices: of an integral type, any shape.
        table: floating point, finite, of shape (entries,), or (size of ``axis``, entries).
        axis: dimension whose slices have tables, or scales, of their own.
        scales: finite, of shape () or (size of ``axis``,); values are then the products with a table of
            shape (entries,), made in float32, or in float64 for float64 tensors.
        dtype: of the decoded tensor; that of ``table`` if None, and always without scales.
        parameters: with which the tensor would be encoded again; ``distinct`` if None.

    Raises:
        QuantizationError: if shapes or types do not fit, or an index has no entry.
    """
    dtype = dtype or table.dtype
    name = floating_name(torch.empty(0, dtype=dtype), _NAME)
    shape, entries = tuple(indices.shape), int(table.shape[-1]) if table.dim() else 0
    if not is_axis(axis, len(shape)) or not 1 <= entries <= 1 << WIDEST:
        raise QuantizationError(f"{_NAME}: axis {axis!r}, {entries} entries for {len(shape)} dimensions")
    parts = {_TABLE: table.detach().cpu().to(_table_dtype(dtype, scales is not None))}
    if scales is not None:
        parts[_SCALES] = scales.detach().cpu().to(_table_dtype(dtype, True))
    for key, given in ((_TABLE, table), (_SCALES, scales)):
        if given is not None and not torch.equal(parts[key].double(), given.detach().cpu().double()):
            raise QuantizationError(f"{_NAME}: {key} of type {given.dtype} lose digits in {parts[key].dtype}")
    parts = {key: value.contiguous().clone() for key, value in parts.items()}
    found = indices.detach().cpu()
    if found.is_floating_point() or (
        found.numel() and not 0 <= int(found.min()) <= int(found.max()) < entries
    ):
        raise QuantizationError(f"{_NAME}: an index is not one of 0..{entries - 1}")
    parts[_INDICES] = pack_integers(found, _index_bits(entries))
    kept = (
        {"kind": "distinct", "bits": _index_bits(entries), "axis": axis} if parameters is None else parameters
    )
    _check(kept, len(shape))
    if kept["axis"] != axis:
        raise QuantizationError(f"{_NAME}: axis {axis!r}, but {kept['axis']!r} to encode again")
    encoded = EncodedTensor(_NAME, shape, name, parts, dict(kept))
    try:
        _decode_row(encoded, None)
    except CorruptCheckpointError as error:
        raise QuantizationError(str(error)) from None
    return encoded


def indices_of(encoded: EncodedTensor) -> Indices:
    """The indices, the table and the scales of an encoded tensor.

    Raises:
        CorruptCheckpointError: if the parts contradict the shape.
    """
    indices, table, scales = _stored(encoded, None)
    return Indices(whole_shape(encoded, indices).to(torch.int64), table, scales)


def _index_bits(entries: int) -> int:
    return max(1, (entries - 1).bit_length())


def _table_dtype(dtype: torch.dtype, scaled: bool) -> torch.dtype:
    return dtype if not scaled or dtype == torch.float64 else torch.float32


def _encode_row(
    values: Tensor, shape: tuple[int, ...], mask: Tensor | None, parameters: Mapping[str, JsonValue]
) -> EncodedTensor:
    dtype = floating_name(values, _NAME)
    refuse_nonfinite(values, _NAME)
    axis = _check(parameters, len(shape))
    bits = int(str(parameters["bits"]))
    channel = at(Groups(shape, axis).index(), mask)
    if parameters["kind"] == "apot":
        levels = apot_levels(bits, int(str(parameters["terms"])))
        parts = _scaled_levels(values, channel, shape, axis, levels)
    elif parameters["kind"] == "kmeans":
        centres = kmeans(_numbers(values), 1 << bits, str(parameters["init"]), int(str(parameters["seed"])))
        parts = _nearest_entries(values, centres)
    else:
        parts = _distinct(values, channel, shape, axis, bits)
    return EncodedTensor(_NAME, shape, dtype, parts, dict(parameters))


def _numbers(values: Tensor) -> NDArray[np.float64]:
    return values.detach().to(torch.float64).numpy()


def _nearest_entries(values: Tensor, centres: NDArray[np.float64]) -> dict[str, Tensor]:
    """Centres rounded to the values' type, those that are nearest to a value."""
    rounded = torch.unique(torch.from_numpy(centres).to(values.dtype))
    indices = torch.from_numpy(nearest(_numbers(values), _numbers(rounded)))
    used, indices = torch.unique(indices, return_inverse=True)
    table = rounded[used] if len(used) else values.new_zeros(1)
    return {_TABLE: table, _INDICES: pack_integers(indices, _index_bits(len(table)))}


def _distinct(
    values: Tensor, channel: Tensor, shape: tuple[int, ...], axis: int | None, bits: int
) -> dict[str, Tensor]:
    """A table of the distinct values; short tables of slices are filled up with zeros."""
    slices = 1 if axis is None else shape[axis]
    order = torch.argsort(channel, stable=True)
    found = [torch.unique(row, return_inverse=True) for row in _split(values[order], channel, slices)]
    entries = max([1, *(len(table) for table, _ in found)])
    if entries > 1 << bits:
        raise QuantizationError(f"{_NAME}: {entries:,} distinct values are more than {bits} bits tell apart")
    tables = values.new_zeros(slices, entries)
    indices = torch.empty(len(values), dtype=torch.int64)
    for table, (distinct, _) in zip(tables, found, strict=True):
        table[: len(distinct)] = distinct
    if len(values):
        indices[order] = torch.cat([index for _, index in found])
    table = tables[0] if axis is None else tables
    return {_TABLE: table.clone(), _INDICES: pack_integers(indices, _index_bits(entries))}


def _split(ordered: Tensor, channel: Tensor, slices: int) -> tuple[Tensor, ...]:
    """The values of each slice, which lie one after the other."""
    ends = torch.bincount(channel, minlength=slices).cumsum(0).tolist()
    return tuple(ordered[start:end] for start, end in zip([0, *ends], ends, strict=False))


def _scaled_levels(
    values: Tensor, channel: Tensor, shape: tuple[int, ...], axis: int | None, levels: NDArray[np.float64]
) -> dict[str, Tensor]:
    """The levels as a table, and the best scale of the tensor or of each slice."""
    slices = 1 if axis is None else shape[axis]
    wide = _table_dtype(values.dtype, True)
    order = torch.argsort(channel, stable=True)
    rows = _split(values[order], channel, slices)
    best = torch.tensor([best_scale(_numbers(row), levels) for row in rows], dtype=torch.float64)
    scales = best.clamp(min=torch.finfo(wide).tiny).to(wide)
    if not bool(torch.isfinite((scales.double() * levels[-1]).to(values.dtype)).all()):
        raise QuantizationError(f"{_NAME}: the largest level of a tensor is larger than its type can hold")
    indices = torch.from_numpy(nearest(_numbers(values.double() / scales.double()[channel]), levels))
    return {
        _TABLE: torch.from_numpy(levels).to(wide),
        _SCALES: scales[0].clone() if axis is None else scales,
        _INDICES: pack_integers(indices, _index_bits(len(levels))),
    }


def _decode_row(encoded: EncodedTensor, mask: Tensor | None) -> Tensor:
    dtype = decoded_dtype(encoded)
    indices, table, scales = _stored(encoded, mask)
    if not indices.numel():
        return torch.empty(0, dtype=dtype)
    place = indices.to(torch.int64)
    channel = at(Groups(encoded.shape, _axis_of(encoded)).index(), mask)
    if table.dim() > 1:
        place = place + channel * table.shape[1]
    values = table.reshape(-1)[place]
    if scales is not None:
        values = (values * scales.reshape(-1)[channel]).to(dtype)
    if not bool(torch.isfinite(values).all()):
        raise CorruptCheckpointError(f"{_NAME}: values are not finite, or larger than {dtype} can hold")
    return values


def _stored(encoded: EncodedTensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Indices of shape (kept,), the table and the scales, checked."""
    dtype, axis = decoded_dtype(encoded), _axis_of(encoded)
    scaled = _SCALES in encoded.parts
    require_parts(encoded, {_INDICES, _TABLE, _SCALES} if scaled else {_INDICES, _TABLE})
    slices = () if axis is None else (encoded.shape[axis],)
    entries = _entries(encoded)
    single = scaled or axis is None
    shape = (entries,) if single else (*slices, entries)
    table = part(encoded, _TABLE, _table_dtype(dtype, scaled), shape)
    scales = part(encoded, _SCALES, _table_dtype(dtype, True), slices) if scaled else None
    indices = unpacked_row(encoded, _INDICES, _index_bits(entries), row_length(encoded.shape, mask))
    if indices.numel() and int(indices.max()) >= entries:
        raise CorruptCheckpointError(f"{_NAME}: an index is not one of 0..{entries - 1}")
    return indices, table, scales


def _entries(encoded: EncodedTensor) -> int:
    table = encoded.parts.get(_TABLE)
    entries = int(table.shape[-1]) if table is not None and table.dim() else 0
    if not 1 <= entries <= 1 << WIDEST:
        raise CorruptCheckpointError(f"{_NAME}: a table of {entries} entries")
    return entries


def _check(parameters: Mapping[str, JsonValue], dims: int) -> int | None:
    """The axis of well-formed parameters."""
    kind, bits, axis = parameters.get("kind"), parameters.get("bits"), parameters.get("axis")
    most = {"distinct": WIDEST, "kmeans": 8, "apot": 8}.get(str(kind), 0)
    fits = (
        set(parameters) == _KEYS.get(str(kind), set())
        and type(bits) is int
        and (2 if kind == "apot" else 1) <= bits <= most
        and is_axis(axis, dims)
    )
    if fits and kind == "kmeans":
        seed = parameters["seed"]
        fits = axis is None and parameters["init"] in INITIALISATIONS and type(seed) is int and seed >= 0
    if fits and kind == "apot":
        terms = parameters["terms"]
        fits = type(terms) is int and type(bits) is int and 1 <= terms < bits
    if not fits:
        raise QuantizationError(f"{_NAME}: {dict(parameters)} of a tensor with {dims} dimensions")
    assert axis is None or isinstance(axis, int)
    return axis


def _axis_of(encoded: EncodedTensor) -> int | None:
    try:
        return _check(encoded.parameters, len(encoded.shape))
    except QuantizationError as error:
        raise CorruptCheckpointError(str(error)) from None


def _cut(encoded: EncodedTensor, dim: int, indices: Tensor) -> dict[str, Tensor]:
    axis = _axis_of(encoded)
    parts = {name: value for name, value in encoded.parts.items() if name != _INDICES}
    if axis is not None and dim % len(encoded.shape) == axis:
        # With scales the table is one for all slices.
        own = _SCALES if _SCALES in parts else _TABLE
        parts[own] = parts[own].index_select(0, indices)
    return parts


CODEBOOK_ROWS = RowEncoding(
    _NAME, _INDICES, lambda encoded: _index_bits(_entries(encoded)), _encode_row, _decode_row, _cut
)


def _encode(tensor: Tensor, parameters: Mapping[str, JsonValue]) -> EncodedTensor:
    return _encode_row(tensor.detach().cpu().reshape(-1), tuple(tensor.shape), None, parameters)


def _decode(encoded: EncodedTensor) -> Tensor:
    return whole_shape(encoded, _decode_row(encoded, None))


def _take(encoded: EncodedTensor, dim: int, indices: Tensor) -> EncodedTensor:
    indices = indices.cpu()
    count = math.prod(encoded.shape)
    place = torch.arange(count).reshape(encoded.shape).index_select(dim, indices)
    row = picked(CODEBOOK_ROWS, encoded, count, place.reshape(-1))
    parts = {_INDICES: row, **_cut(encoded, dim, indices)}
    return replace(encoded, shape=tuple(place.shape), parts=parts)


CODEBOOK = Encoding(_NAME, _encode, _decode, _take)
