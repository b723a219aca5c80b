"""Which quality reaches a compression ratio: a bisection over what is really counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cctool.errors import TransformError

__all__ = ["Trial", "search_quality"]

LOWEST, HIGHEST = 1.0, 100.0
_NEAR = 0.005
_NARROW = 0.05


@dataclass(frozen=True)
class Trial:
    """One quality that was tried.

    Attributes:
        quality: 1 to 100.
        ratio: bits of 8-bit maps over all coded bits, side information included.
        bits_per_element: all coded bits over elements.
    """

    quality: float
    ratio: float
    bits_per_element: float


def search_quality(ratio: float, measure: Callable[[float], Trial]) -> tuple[Trial, tuple[Trial, ...]]:
    """Find the best quality whose ratio is at least ``ratio``.

    The ratio falls as the quality rises, so qualities are bisected, until one exceeds the ratio by less than
    0.5 % or is known to 0.05.

    Args:
        ratio: against 8 bit, above 1.
        measure: codes images at a quality and counts.

    Returns:
        The quality found, and all that were tried, in their order.

    Raises:
        TransformError: if quality 1 does not reach the ratio.
    """
    tried = [measure(HIGHEST)]
    if tried[0].ratio >= ratio:
        return tried[0], tuple(tried)
    tried.append(measure(LOWEST))
    found = tried[1]
    if found.ratio < ratio:
        raise TransformError(
            f"--target ratio={ratio:g}: even quality 1 compresses {found.ratio:.3g} times only; ask for "
            "less, or give a coarser --q-table"
        )
    low, high = LOWEST, HIGHEST
    while high - low > _NARROW and found.ratio > ratio * (1 + _NEAR):
        middle = (low + high) / 2
        tried.append(measure(middle))
        if tried[-1].ratio >= ratio:
            low, found = middle, tried[-1]
        else:
            high = middle
    return found, tuple(tried)
