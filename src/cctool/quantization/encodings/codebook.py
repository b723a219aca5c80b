"""Storage as indices into a table: the encoding ``codebook``.

    w' = table[index],    or scale * table[index]

There is one table for the tensor, or one for each slice of ``axis``, with 1 to 65,536 entries. An index has
as few bits as tell the entries apart, but at least one. Indices are packed in C order of the tensor. A table
has the tensor's type. With scales, one for the tensor or for each slice, table and scales are float32
(float64 for float64 tensors), as are their products.

The parameter ``kind`` says how a tensor is encoded:

``distinct``
    An entry for each distinct value; more than 2^bits of them are refused.
``kmeans``
    At most 2^bits cluster centres of all values (`codebook_fit.py`); ``init`` and ``seed`` determine the
    initial centres.
``apot``
    Levels that are sums of ``terms`` powers of two (`apot_levels.py`), with the least-squares scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import JsonValue
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError, QuantizationError
from cctool.checkpoint.encoding import EncodedTensor
from cctool.quantization.encodings.apot_levels import apot_levels
from cctool.quantization.encodings.codebook_fit import (
    INDICES,
    INITIALISATIONS,
    SCALES,
    TABLE,
    distinct_entries,
    index_bits,
    kmeans,
    nearest_entries,
    numbers,
    scaled_levels,
    table_dtype,
)
from cctool.quantization.encodings.packing import WIDEST, pack_integers
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
)
from cctool.quantization.encodings.scale_groups import ScaleGroups

_NAME = "codebook"
_KEYS = {
    "distinct": {"kind", "bits", "axis"},
    "kmeans": {"kind", "bits", "axis", "init", "seed"},
    "apot": {"kind", "bits", "axis", "terms"},
}


def encode_codebook(indices: Tensor, table: Tensor, axis: int | None = None) -> EncodedTensor:
    """Store given indices and a given table; they decode to table[index], bit for bit.

    Args:
        indices: of an integer type, any shape.
        table: floating point, finite, shape (entries,), or (size of ``axis``, entries).
        axis: dimension whose slices have separate tables.

    Raises:
        QuantizationError: if shapes or types do not match, or an index has no entry.
    """
    name = floating_name(table, _NAME)
    shape, entries = tuple(indices.shape), int(table.shape[-1]) if table.dim() else 0
    if not is_axis(axis, len(shape)) or not 1 <= entries <= 1 << WIDEST:
        raise QuantizationError(f"{_NAME}: axis {axis!r}, {entries} entries for {len(shape)} dimensions")
    found = indices.detach().cpu()
    if found.is_floating_point() or (
        found.numel() and not 0 <= int(found.min()) <= int(found.max()) < entries
    ):
        raise QuantizationError(f"{_NAME}: an index is not one of 0..{entries - 1}")
    bits = index_bits(entries)
    parts = {
        TABLE: table.detach().cpu().contiguous().clone(),
        INDICES: pack_integers(found, bits),
    }
    kept: dict[str, JsonValue] = {"kind": "distinct", "bits": bits, "axis": axis}
    encoded = EncodedTensor(_NAME, shape, name, parts, kept)
    try:
        _decode_row(encoded, None)
    except CorruptCheckpointError as error:
        raise QuantizationError(str(error)) from None
    return encoded


def _encode_row(
    values: Tensor, shape: tuple[int, ...], mask: Tensor | None, parameters: Mapping[str, JsonValue]
) -> EncodedTensor:
    dtype = floating_name(values, _NAME)
    refuse_nonfinite(values, _NAME)
    axis = _check(parameters, len(shape))
    bits = int(str(parameters["bits"]))
    channel = at(ScaleGroups(shape, axis).index(), mask)
    if parameters["kind"] == "apot":
        levels = apot_levels(bits, int(str(parameters["terms"])))
        parts = scaled_levels(values, channel, shape, axis, levels)
    elif parameters["kind"] == "kmeans":
        centres = kmeans(numbers(values), 1 << bits, str(parameters["init"]), int(str(parameters["seed"])))
        parts = nearest_entries(values, centres)
    else:
        parts = distinct_entries(values, channel, shape, axis, bits)
    return EncodedTensor(_NAME, shape, dtype, parts, dict(parameters))


def _decode_row(encoded: EncodedTensor, mask: Tensor | None) -> Tensor:
    dtype = decoded_dtype(encoded)
    indices, table, scales = _stored(encoded, mask)
    if not indices.numel():
        return torch.empty(0, dtype=dtype)
    place = indices.to(torch.int64)
    channel = at(ScaleGroups(encoded.shape, _axis_of(encoded)).index(), mask)
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
    scaled = SCALES in encoded.parts
    require_parts(encoded, {INDICES, TABLE, SCALES} if scaled else {INDICES, TABLE})
    slices = () if axis is None else (encoded.shape[axis],)
    entries = _entries(encoded)
    single = scaled or axis is None
    shape = (entries,) if single else (*slices, entries)
    table = part(encoded, TABLE, table_dtype(dtype, scaled=scaled), shape)
    scales = part(encoded, SCALES, table_dtype(dtype, scaled=True), slices) if scaled else None
    indices = unpacked_row(encoded, INDICES, index_bits(entries), row_length(encoded.shape, mask))
    if indices.numel() and int(indices.max()) >= entries:
        raise CorruptCheckpointError(f"{_NAME}: an index is not one of 0..{entries - 1}")
    return indices, table, scales


def _entries(encoded: EncodedTensor) -> int:
    table = encoded.parts.get(TABLE)
    entries = int(table.shape[-1]) if table is not None and table.dim() else 0
    if not 1 <= entries <= 1 << WIDEST:
        raise CorruptCheckpointError(f"{_NAME}: a table of {entries} entries")
    return entries


def _check(parameters: Mapping[str, JsonValue], dims: int) -> int | None:
    """Check the parameters, and return their axis."""
    kind, bits, axis = parameters.get("kind"), parameters.get("bits"), parameters.get("axis")
    most = {"distinct": WIDEST, "kmeans": 8, "apot": 8}.get(str(kind), 0)
    fits = (
        set(parameters) == _KEYS.get(str(kind), set())
        # Not isinstance: True is an int, but no number of bits.
        and type(bits) is int
        and (2 if kind == "apot" else 1) <= bits <= most
    )
    if fits and kind == "kmeans":
        seed = parameters["seed"]
        fits = axis is None and parameters["init"] in INITIALISATIONS and type(seed) is int and seed >= 0
    if fits and kind == "apot":
        terms = parameters["terms"]
        fits = type(terms) is int and type(bits) is int and 1 <= terms < bits
    if not (fits and is_axis(axis, dims)):
        raise QuantizationError(f"{_NAME}: {dict(parameters)} of a tensor with {dims} dimensions")
    return axis


def _axis_of(encoded: EncodedTensor) -> int | None:
    try:
        return _check(encoded.parameters, len(encoded.shape))
    except QuantizationError as error:
        raise CorruptCheckpointError(str(error)) from None


def _cut(encoded: EncodedTensor, dim: int, indices: Tensor) -> dict[str, Tensor]:
    axis = _axis_of(encoded)
    parts = {name: value for name, value in encoded.parts.items() if name != INDICES}
    if axis is not None and dim % len(encoded.shape) == axis:
        # With scales, all slices share one table, and the scales are cut instead.
        own = SCALES if SCALES in parts else TABLE
        parts[own] = parts[own].index_select(0, indices)
    return parts


CODEBOOK_ROWS = RowEncoding(
    _NAME, INDICES, lambda encoded: index_bits(_entries(encoded)), _encode_row, _decode_row, _cut
)
CODEBOOK = encoding_of(CODEBOOK_ROWS)
