"""Fitting tables of the encoding ``codebook`` to given values; the results are the parts that are stored.

Shared values are those of Deep Compression (Han et al. 2016, section 3): k-means of scalars. In one dimension
the clusters are intervals of the sorted values, bounded half-way between neighbouring centres. So both of
Lloyd's steps need only a search for the bounds and differences of running sums, however many values there
are.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cctool.base.errors import QuantizationError
from cctool.quantization.encodings.apot_levels import best_scale
from cctool.quantization.encodings.packing import pack_integers

INDICES, TABLE, SCALES = "indices", "table", "scales"
"""Names of the parts."""
INITIALISATIONS = ("linear", "density", "random")
"""Initial centres, in the words of Han et al."""

_ITERATIONS = 1000

Numbers = NDArray[np.float64]


def index_bits(entries: int) -> int:
    """Bits of an index into a table."""
    return max(1, (entries - 1).bit_length())


def table_dtype(dtype: torch.dtype, *, scaled: bool) -> torch.dtype:
    """Type of a table, and of its scales, for tensors of type ``dtype``."""
    return dtype if not scaled or dtype == torch.float64 else torch.float32


def numbers(values: Tensor) -> Numbers:
    """The values as a float64 array."""
    return values.detach().to(torch.float64).numpy()


def nearest_entries(values: Tensor, centres: Numbers) -> dict[str, Tensor]:
    """The centres that are nearest to some value, rounded to the values' type."""
    rounded = torch.unique(torch.from_numpy(centres).to(values.dtype))
    indices = torch.from_numpy(nearest(numbers(values), numbers(rounded)))
    used, indices = torch.unique(indices, return_inverse=True)
    table = rounded[used] if len(used) else values.new_zeros(1)
    return {TABLE: table, INDICES: pack_integers(indices, index_bits(len(table)))}


def distinct_entries(
    values: Tensor, channel: Tensor, shape: tuple[int, ...], axis: int | None, bits: int
) -> dict[str, Tensor]:
    """A table of the distinct values; shorter tables of slices are padded with zeros."""
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
    """The values of each slice, which are consecutive."""
    ends = torch.bincount(channel, minlength=slices).cumsum(0).tolist()
    return tuple(ordered[start:end] for start, end in zip([0, *ends], ends, strict=False))


def scaled_levels(
    values: Tensor, channel: Tensor, shape: tuple[int, ...], axis: int | None, levels: Numbers
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


def kmeans(values: Numbers, entries: int, initialisation: str = "linear", seed: int = 0) -> Numbers:
    """Cluster centres of scalars by Lloyd's algorithm, run until it converges.

    Args:
        values: finite, shape (count,), in any order.
        entries: number of centres, at least 1.
        initialisation: ``linear``: evenly spaced from the smallest to the largest value; ``density``: at the
            quantiles (i + 1/2) / entries; ``random``: values drawn without replacement (Forgy).
        seed: of that draw.

    Returns:
        Centres in ascending order, each nearest to at least one value: ``entries`` of them, or the distinct
        values if there are no more.

    Raises:
        QuantizationError: if sums of the values exceed float64.
    """
    points, counts = np.unique(values, return_counts=True)
    if len(points) <= entries:
        return points
    # The next lines report an overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.concatenate([[0.0], np.cumsum(points * counts)])
    if not np.isfinite(sums).all():
        raise QuantizationError("k-means: the sum of the values is larger than float64 can hold")
    totals = np.concatenate([[0], np.cumsum(counts)])
    centres = initial_centres(points, counts, entries, initialisation, seed)
    edges = _edges(points, centres)
    for _ in range(_ITERATIONS):
        centres = _means(points, sums, totals, edges, centres)
        before, edges = edges, _edges(points, centres)
        # A fixed point; but not while a cluster is empty, which may still find a point.
        if np.array_equal(before, edges) and (np.diff(edges) > 0).all():
            break
    edges = np.unique(edges)
    # Differences of running sums lose digits where values differ much in size, so the final centres are
    # summed per cluster.
    found = np.add.reduceat(points * counts, edges[:-1]) / np.diff(totals[edges])
    return np.unique(_inside(points, edges, found))


def nearest(values: Numbers, centres: Numbers) -> NDArray[np.int64]:
    """Number of the nearest centre for each value, the lower one of two that are equally near.

    Args:
        values: any shape.
        centres: ascending.
    """
    found: NDArray[np.int64] = np.searchsorted(_bounds(centres), values, side="left")
    return found


def initial_centres(
    points: Numbers, counts: NDArray[np.int64], entries: int, initialisation: str, seed: int
) -> Numbers:
    """Initial centres of `kmeans`; ``points`` are distinct and ascending, and occur ``counts`` times."""
    if initialisation == "linear":
        evenly: Numbers = np.linspace(points[0], points[-1], entries)
        return evenly
    ends = np.cumsum(counts)
    if initialisation == "density":
        wanted = (np.arange(entries) + 0.5) / entries * ends[-1]
        chosen = np.searchsorted(ends, wanted, side="left")
    elif initialisation == "random":
        drawn = np.random.default_rng(seed).choice(int(ends[-1]), entries, replace=False)
        chosen = np.searchsorted(ends, np.sort(drawn), side="right")
    else:
        raise QuantizationError(f"k-means begins {', '.join(INITIALISATIONS)}, not {initialisation!r}")
    found: Numbers = points[chosen]
    return found


def _bounds(centres: Numbers) -> Numbers:
    # Halved before they are added: the sum might overflow.
    return centres[:-1] / 2 + centres[1:] / 2


def _edges(points: Numbers, centres: Numbers) -> NDArray[np.int64]:
    """Cluster i holds the points from edge i up to, but not including, edge i + 1."""
    inner = np.searchsorted(points, _bounds(centres), side="right")
    return np.concatenate([[0], inner, [len(points)]])


def _means(
    points: Numbers, sums: Numbers, totals: NDArray[np.int64], edges: NDArray[np.int64], centres: Numbers
) -> Numbers:
    """Means of the clusters; an empty one restarts at the point that is farthest from its centre."""
    full = np.diff(edges) > 0
    sizes = np.where(full, np.diff(totals[edges]), 1)
    means = np.where(full, np.diff(sums[edges]) / sizes, centres)
    means[full] = _inside(points, np.append(edges[:-1][full], len(points)), means[full])
    empty = np.flatnonzero(~full)
    if not len(empty):
        return means
    # The point of an interval that is farthest from its mean is one of its ends.
    ends = np.concatenate([edges[:-1][full], edges[1:][full] - 1])
    distances = np.abs(points[ends] - np.tile(means[full], 2))
    farthest = np.argsort(-distances, kind="stable")[: len(empty)]
    means[empty[: len(farthest)]] = points[ends[farthest]]
    return np.sort(means)


def _inside(points: Numbers, edges: NDArray[np.int64], means: Numbers) -> Numbers:
    """Means, moved back into their clusters where rounding put them outside."""
    return np.clip(means, points[edges[:-1]], points[edges[1:] - 1])
