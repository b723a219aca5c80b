"""How sure a share of samples is: intervals, and whether two shares are told apart."""

from __future__ import annotations

import math

from cctool.tasks.base import Measure

# Of the standard normal distribution: 95 % of it lies within this distance of 0.
_Z = 1.959963984540054


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share, in percent.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference", Journal of the
    American Statistical Association 22(158), pages 209 to 212. It stays within 0 and 100, and has a width
    even where all samples or none are right.

    Args:
        right: how many samples count, 0 to ``n``.
        n: number of samples, independent of each other; with 0 nothing is known.
    """
    if not n:
        return 0.0, 100.0
    share, scale = right / n, 1 + _Z**2 / n
    centre = (share + _Z**2 / (2 * n)) / scale
    half = _Z / scale * math.sqrt(max(share * (1 - share), 0.0) / n + (_Z / (2 * n)) ** 2)
    # At the ends the difference is exactly 0 or 1, but for rounding.
    low = 0.0 if right <= 0 else 100 * (centre - half)
    high = 100.0 if right >= n else 100 * (centre + half)
    return low, high


def interval_of(percent: float, n: int) -> tuple[float, float]:
    """`wilson` of a share that is known in percent of ``n`` samples."""
    return wilson(round(percent * n / 100), n)


def mcnemar(only_first: int, only_second: int) -> float:
    """Probability that two networks of equal accuracy differ on the same samples at least as much as seen.

    The exact two-sided test of McNemar 1947, "Note on the sampling error of the difference between correlated
    proportions or percentages", Psychometrika 12, pages 153 to 157: of the samples that only one of the two
    gets right, either has half.

    Args:
        only_first: samples that the first gets right and the second wrong.
        only_second: the other way round.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    logs = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def difference_interval(first: float, first_n: int, second: float, second_n: int) -> tuple[float, float]:
    """The 95 % interval of ``second - first``, shares in percent of different samples, in points.

    Newcombe 1998, "Interval estimation for the difference between independent proportions", Statistics in
    Medicine 17, pages 873 to 890, method 10: made of the two Wilson intervals.
    """
    low_1, high_1 = interval_of(first, first_n)
    low_2, high_2 = interval_of(second, second_n)
    points = second - first
    return (
        points - math.hypot(second - low_2, high_1 - first),
        points + math.hypot(high_2 - second, first - low_1),
    )


def interval_text(low: float, high: float) -> str:
    """An interval in percent, as `88.85..90.05`."""
    return f"{low:.2f}..{high:.2f}"


def shown(measure: Measure, value: float, n: int) -> str:
    """A measured value as people read it; a share as ``89.47 % (88.85..90.05, n = 10,000)``."""
    if measure.share:
        return f"{value:.2f} % ({interval_text(*interval_of(value, n))}, n = {n:,})"
    if measure.unit == "%":
        return f"{value:.2f} %"
    return f"{value:.4g} {measure.unit}".rstrip()
