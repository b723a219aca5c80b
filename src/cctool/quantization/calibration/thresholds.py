"""Ranges with the least loss: searches over a histogram, and closed forms for two distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import lambertw
from torch import Tensor

from cctool.quantization.calibration.histogram import BINS, Distribution
from cctool.quantization.quantizers.grid import Grid, fitted

Floats = NDArray[np.float64]
Bounds = tuple[float, float]

# As in TensorRT.
_ENTROPY_BINS = 2048
_LEAST_FRACTION = 2.0**-10
_CANDIDATES = 96
_ROUNDS = 8


def percentile_bounds(seen: Distribution, percentile: float, *, symmetric: bool) -> Bounds:
    """The range that contains ``percentile`` percent of the values.

    With ``symmetric`` it is symmetric about 0. Otherwise equally many values lie below and above it, or, if
    all values have one sign, all on the far side from 0. Within a bin values count as evenly distributed.
    """
    share = percentile / 100
    if symmetric:
        magnitudes, counts = _magnitudes(seen)
        edge = _quantile(magnitudes, counts, share)
        return max(-edge, seen.low), min(edge, seen.high)
    both = seen.low < 0 < seen.high
    outside = (1 - share) / (2 if both else 1)
    edges = (seen.lower.numpy(), seen.upper.numpy())
    low = _quantile(edges, seen.counts.numpy(), outside) if seen.low < 0 else seen.low
    high = _quantile(edges, seen.counts.numpy(), 1 - outside) if seen.high > 0 else seen.high
    return max(low, seen.low), min(high, seen.high)


def n_std_bounds(seen: Distribution, n_std: float) -> Bounds:
    """The mean and ``n_std`` standard deviations on either side, clipped to the observed extremes."""
    reach = n_std * seen.std
    return _clipped(seen.mean - reach, seen.mean + reach, seen)


def mse_bounds(seen: Distribution, limits: tuple[int, int], *, symmetric: bool) -> Bounds:
    """The range whose grid has the least mean squared error, to about one part in a thousand.

    Fractions of the full range are tried, 96 of them in geometric order down to 2^-10, then finer ones around
    the best. If both ends can move, they are searched alternately.

    Args:
        seen: the values.
        limits: lowest and highest integer.
        symmetric: whether the zero point is 0, and both ends move together.
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)

    def errors(lows: Floats, highs: Floats) -> Floats:
        # Broadcasts either end to the other's shape.
        return _errors(seen, lows + 0 * highs, highs + 0 * lows, limits, symmetric)

    if symmetric:
        size = max(-low, high)
        clip = size * _best(lambda f: errors(np.maximum(-f * size, low), np.minimum(f * size, high)))
        return max(-clip, low), min(clip, high)
    ends = np.array([low, high])
    for _ in range(_ROUNDS):
        before = ends.copy()
        if high > 0:
            ends[1] = high * _best(lambda f: errors(ends[:1], f * high))
        if low < 0:
            ends[0] = low * _best(lambda f: errors(f * low, ends[1:]))
        if (ends == before).all():
            break
    return float(ends[0]), float(ends[1])


def entropy_bounds(seen: Distribution, levels: int) -> Bounds:
    """TensorRT's calibration: the threshold whose levels preserve most of the distribution of magnitudes.

    For every threshold of ``levels`` bins or more, P is the histogram with everything above added to its last
    bin, and Q the histogram with the bins of each level replaced by their average over the non-empty ones;
    the least KL(P || Q) wins (Migacz 2017). Levels take equal shares of the bins. Zeros are ignored, because
    every threshold represents them exactly.

    Args:
        seen: the values.
        levels: on one side of 0.
    """
    counts = _magnitude_counts(seen)
    width = seen.width * (BINS // _ENTROPY_BINS)
    used = np.flatnonzero(counts)
    if not len(used):
        return seen.low, seen.high
    last = int(used[-1]) + 1
    above = counts.sum() - np.cumsum(counts)
    divergences = {n: _divergence(counts[:n], above[n - 1], levels) for n in range(levels, last)}
    # The threshold without clipping is tried last, so that clipping wins a tie.
    divergences[last] = _divergence(counts[:last], 0.0, levels)
    best = min(divergences, key=divergences.__getitem__)
    edge = best * width
    return max(-edge, seen.low), min(edge, seen.high)


def aciq_bounds(
    seen: Distribution, shape: Literal["gauss", "laplace"], bits: int, *, signed: bool, symmetric: bool
) -> Bounds:
    """Analytical clipping (Banner 2019) for normally or Laplace distributed values.

    The scale is the standard deviation, or the mean absolute deviation from the mean; from 0 if the range is
    ``symmetric``. Values of one sign are treated as one half of a distribution about 0 whose other half
    became zeros, which are ignored. If all levels lie on that side, they count as one bit more.
    """
    one_sided = seen.low >= 0 or seen.high <= 0
    counts, centers = seen.counts, seen.centers
    if one_sided:
        counts, centers = counts[centers != 0], centers[centers != 0]
    number = float(counts.sum())
    if not number:
        return 0.0, 0.0
    middle = 0.0 if symmetric or one_sided else seen.mean
    if shape == "laplace":
        scale = float((counts * (centers - middle).abs()).sum()) / number
    else:
        square = seen.square * float(seen.counts.sum()) / number
        scale = math.sqrt(square) if symmetric or one_sided else seen.std
    halved = not signed if symmetric else one_sided
    clip = scale * aciq_clip(shape, bits + halved)
    return _clipped(middle - clip, middle + clip, seen)


@lru_cache(maxsize=64)
def aciq_clip(shape: Literal["gauss", "laplace"], bits: int) -> float:
    """Where clipping and rounding to 2^bits levels have the least error (Banner 2019, eq. 2 to 9).

    In units of the standard deviation, or of Laplace's b. At the solution a, the derivatives of the expected
    squared errors are zero::

        a = W(3 * 4^bits)                                                    Laplace; W is Lambert's
        a * erfc(a / sqrt 2) + a / (3 * 4^bits) = sqrt(2 / pi) exp(-a^2 / 2)       Gauss

    >>> round(aciq_clip("laplace", 4), 2), round(aciq_clip("gauss", 4), 2)
    (5.03, 2.56)
    """
    rounding = 1 / (3 * 4.0**bits)
    if shape == "laplace":
        return float(lambertw(1 / rounding).real)

    def slope(a: float) -> float:
        density = math.sqrt(2 / math.pi) * math.exp(-a * a / 2)
        return a * math.erfc(a / math.sqrt(2)) + a * rounding - density

    return float(brentq(slope, 0.1, 20.0, xtol=1e-12))


def _clipped(low: float, high: float, seen: Distribution) -> Bounds:
    return min(max(low, seen.low), seen.high), max(min(high, seen.high), seen.low)


def _best(errors: Callable[[Floats], Floats]) -> float:
    """The fraction of a range with the least error: the best of coarse ones, then of finer ones around it."""
    coarse = np.geomspace(_LEAST_FRACTION, 1.0, _CANDIDATES)
    best = int(np.argmin(errors(coarse)))
    around = coarse[max(best - 1, 0)], coarse[min(best + 1, len(coarse) - 1)]
    fine = np.append(np.linspace(*around, _CANDIDATES // 2), coarse[best])
    return float(fine[int(np.argmin(errors(fine)))])


def _errors(
    seen: Distribution, lows: Floats, highs: Floats, limits: tuple[int, int], symmetric: bool
) -> Floats:
    """Sums of squared errors of the grids of K ranges."""
    scale, zero = fitted(torch.from_numpy(lows), torch.from_numpy(highs), limits, symmetric=symmetric)
    x = seen.centers.expand(len(lows), -1)
    errors: Tensor = (Grid(scale, zero, *limits, 0).nearest(x) - x).square_() @ seen.counts
    return errors.numpy()


def _magnitudes(seen: Distribution) -> tuple[tuple[Floats, Floats], Floats]:
    """Bins of |x| in ascending order: their edges, and their counts."""
    near = torch.minimum(seen.lower.abs(), seen.upper.abs()).numpy()
    far = torch.maximum(seen.lower.abs(), seen.upper.abs()).numpy()
    order = np.lexsort((far, near))
    return (near[order], far[order]), seen.counts.numpy()[order]


def _quantile(edges: tuple[Floats, Floats], counts: Floats, share: float) -> float:
    sums = np.cumsum(counts)
    wanted = share * sums[-1]
    at = min(int(np.searchsorted(sums, wanted)), len(sums) - 1)
    part = (wanted - (sums[at] - counts[at])) / counts[at]
    return float(edges[0][at] + min(max(part, 0.0), 1.0) * (edges[1][at] - edges[0][at]))


def _magnitude_counts(seen: Distribution) -> Floats:
    """Counts of |x| in 2048 bins, without zeros."""
    near = torch.minimum(seen.lower.abs(), seen.upper.abs())
    zeros = seen.lower == seen.upper
    numbers = (near / seen.width).round().long() // (BINS // _ENTROPY_BINS)
    return np.bincount(
        numbers[~zeros].numpy(), weights=seen.counts[~zeros].numpy(), minlength=_ENTROPY_BINS
    ).astype(np.float64)


def _divergence(counts: Floats, above: float, levels: int) -> float:
    """KL(P || Q) of the bins below a threshold; infinite where Q is 0 and P is not."""
    n = len(counts)
    p = counts.copy()
    p[-1] += above
    level = np.arange(n) * levels // n if n > levels else np.arange(n)
    filled = counts > 0
    sums, sizes = np.bincount(level, weights=counts), np.bincount(level, weights=filled)
    q = np.where(filled, (sums / np.maximum(sizes, 1))[level], 0.0)
    held = p > 0
    if not q[held].all() or not q.sum():
        return math.inf
    p, q = p[held] / p.sum(), q[held] / q.sum()
    return float(np.sum(p * np.log(p / q)))
