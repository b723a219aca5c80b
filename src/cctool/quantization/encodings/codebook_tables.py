"""Tables of the encoding ``codebook``, found for given values: the parts that are stored."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cctool.base.errors import QuantizationError
from cctool.quantization.encodings.apot_levels import best_scale
from cctool.quantization.encodings.clustering import nearest
from cctool.quantization.encodings.packing import pack_integers

__all__ = [
    "INDICES",
    "SCALES",
    "TABLE",
    "distinct_entries",
    "index_bits",
    "nearest_entries",
    "numbers",
    "scaled_levels",
    "table_dtype",
]

INDICES, TABLE, SCALES = "indices", "table", "scales"
"""Names of the parts."""


def index_bits(entries: int) -> int:
    """Bits of an index of a table."""
    return max(1, (entries - 1).bit_length())


def table_dtype(dtype: torch.dtype, *, scaled: bool) -> torch.dtype:
    """Type of a table, and of its scales, for tensors of a type."""
    return dtype if not scaled or dtype == torch.float64 else torch.float32


def numbers(values: Tensor) -> NDArray[np.float64]:
    """As numpy's float64."""
    return values.detach().to(torch.float64).numpy()


def nearest_entries(values: Tensor, centres: NDArray[np.float64]) -> dict[str, Tensor]:
    """Centres rounded to the values' type, those that are nearest to a value."""
    rounded = torch.unique(torch.from_numpy(centres).to(values.dtype))
    indices = torch.from_numpy(nearest(numbers(values), numbers(rounded)))
    used, indices = torch.unique(indices, return_inverse=True)
    table = rounded[used] if len(used) else values.new_zeros(1)
    return {TABLE: table, INDICES: pack_integers(indices, index_bits(len(table)))}


def distinct_entries(
    values: Tensor, channel: Tensor, shape: tuple[int, ...], axis: int | None, bits: int
) -> dict[str, Tensor]:
    """A table of the distinct values; short tables of slices are filled up with zeros."""
    slices = 1 if axis is None else shape[axis]
    order = torch.argsort(channel, stable=True)
    found = [torch.unique(row, return_inverse=True) for row in _split(values[order], channel, slices)]
    entries = max([1, *(len(table) for table, _ in found)])
    if entries > 1 << bits:
        raise QuantizationError(f"codebook: {entries:,} distinct values are more than {bits} bits tell apart")
    tables = values.new_zeros(slices, entries)
    indices = torch.empty(len(values), dtype=torch.int64)
    for table, (distinct, _) in zip(tables, found, strict=True):
        table[: len(distinct)] = distinct
    if len(values):
        indices[order] = torch.cat([index for _, index in found])
    table = tables[0] if axis is None else tables
    return {TABLE: table.clone(), INDICES: pack_integers(indices, index_bits(entries))}


def _split(ordered: Tensor, channel: Tensor, slices: int) -> tuple[Tensor, ...]:
    """The values of each slice, which lie one after the other."""
    ends = torch.bincount(channel, minlength=slices).cumsum(0).tolist()
    return tuple(ordered[start:end] for start, end in zip([0, *ends], ends, strict=False))


def scaled_levels(
    values: Tensor, channel: Tensor, shape: tuple[int, ...], axis: int | None, levels: NDArray[np.float64]
) -> dict[str, Tensor]:
    """The levels as a table, and the best scale of the tensor or of each slice."""
    slices = 1 if axis is None else shape[axis]
    wide = table_dtype(values.dtype, scaled=True)
    order = torch.argsort(channel, stable=True)
    rows = _split(values[order], channel, slices)
    best = torch.tensor([best_scale(numbers(row), levels) for row in rows], dtype=torch.float64)
    scales = best.clamp(min=torch.finfo(wide).tiny).to(wide)
    if not bool(torch.isfinite((scales.double() * levels[-1]).to(values.dtype)).all()):
        raise QuantizationError("codebook: the largest level of a tensor is larger than its type can hold")
    indices = torch.from_numpy(nearest(numbers(values.double() / scales.double()[channel]), levels))
    return {
        TABLE: torch.from_numpy(levels).to(wide),
        SCALES: scales[0].clone() if axis is None else scales,
        INDICES: pack_integers(indices, index_bits(len(levels))),
    }
