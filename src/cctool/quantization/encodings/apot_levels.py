"""Levels that are sums of powers of two: APoT (Li, Dong and Wang 2020, equations 3 to 5).

A level is a sign and a sum of n terms. With k bits a term is one of 0, 2^-i, 2^-(i+n), .., 2^-(i+(2^k-2)n),
i = 0 .. n-1 being the number of the term. No power occurs in two terms, so all sums differ, and a product
with a level takes n shifts. One term gives plain powers of two; as many terms as bits give evenly spaced
levels.

If the number of bits is not a multiple of n, the first terms have one bit more. Powers are then dealt out in
rounds; terms with fewer take part in the last rounds only, before the others, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from cctool.base.errors import QuantizationError

_FACTORS = 32
_REFINEMENTS = 50

Numbers = NDArray[np.float64]


def default_terms(bits: int) -> int:
    """Terms of two bits each, as in the paper, and one of a single bit if one is left over."""
    return max(1, bits // 2)


def apot_levels(bits: int, terms: int) -> Numbers:
    """All levels, ascending.

    Args:
        bits: 2 to 8, one of them the sign.
        terms: 1 to ``bits`` - 1.

    Returns:
        Shape (2^bits - 1,), symmetric about 0, not normalised: the largest power is 1.

    Raises:
        QuantizationError: if bits or terms are out of range.

    >>> (apot_levels(3, 1) + 0.0).tolist()
    [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]
    """
    if not 2 <= bits <= 8 or not 1 <= terms < bits:
        raise QuantizationError(
            f"additive powers of two: {bits} bits and {terms} terms; there are 2 to 8 bits, and fewer terms"
        )
    each, more = divmod(bits - 1, terms)
    return sums_of_powers([each + (term < more) for term in range(terms)])


def sums_of_powers(term_bits: Sequence[int]) -> Numbers:
    """All levels of terms with these numbers of bits, ascending; otherwise as `apot_levels`."""
    counts = [2**width - 1 for width in term_bits]
    powers: list[list[float]] = [[0.0] for _ in counts]
    exponent = 0
    for left in range(max(counts), 0, -1):
        for term in sorted(
            (term for term, count in enumerate(counts) if count >= left), key=lambda t: counts[t]
        ):
            powers[term].append(2.0**-exponent)
            exponent += 1
    sums = np.array([sum(chosen) for chosen in product(*powers)])
    return np.unique(np.concatenate([-sums, sums]))


def best_scale(values: Numbers, levels: Numbers) -> float:
    """The scale s whose levels s * l approximate the values best in the sense of least squares.

    The best of a series of scales is refined by alternating nearest levels and least-squares scale until the
    error no longer falls. Values that lie on such a grid give its scale, provided that a large level occurs.

    Args:
        values: finite, shape (count,).
        levels: ascending, symmetric about 0.

    Returns:
        More than 0; 1 if all values are 0.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if not largest:
        return 1.0
    points = np.sort(values / largest)
    top = levels[-1]
    factors = np.geomspace(0.1, 1.25, _FACTORS) / top
    # Scales at which the largest value is itself a level.
    scales = np.concatenate([factors, 1 / levels[levels >= top / 4]])
    # With running sums over the sorted values, the sum of each level's values is one difference.
    sums = np.concatenate([[0.0], np.cumsum(points)])
    bounds = levels[:-1] / 2 + levels[1:] / 2
    found, errors = _fitted(points, sums, bounds, levels, scales)
    best = int(np.argmin(errors))
    scale, error = found[best], errors[best]
    for _ in range(_REFINEMENTS):
        further, less = _fitted(points, sums, bounds, levels, np.array([scale]))
        if not less[0] < error:
            break
        scale, error = further[0], less[0]
    return float(scale * largest)


def _fitted(
    points: Numbers, sums: Numbers, bounds: Numbers, levels: Numbers, scales: Numbers
) -> tuple[Numbers, Numbers]:
    """For each scale: the least-squares scale for its nearest levels, and its error minus sum w^2.

    With the level l of each value, the error sum (w - s l)^2 is least for s = sum w l / sum l^2.
    """
    edges = np.zeros((len(scales), len(levels) + 1), dtype=np.int64)
    edges[:, 1:-1] = np.searchsorted(points, scales[:, None] * bounds, side="right")
    edges[:, -1] = len(points)
    products = np.diff(sums[edges], axis=1) @ levels
    squares = np.diff(edges, axis=1) @ levels**2
    used = squares > 0
    best = np.where(used & (products > 0), products / np.where(used, squares, 1), scales)
    return best, best**2 * squares - 2 * best * products
