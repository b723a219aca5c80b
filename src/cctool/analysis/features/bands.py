"""Sub-bands of coded feature maps, for sheets and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cctool.transforms.codec.figures import BandCounts, TapFigures


@dataclass(frozen=True)
class Band:
    """Symbols of one sub-band.

    Attributes:
        name: of the band, as ``i+j=3`` or ``LH1``.
        symbols: quantized values, ascending.
        counts: number of occurrences of each.
    """

    name: str
    symbols: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """Number of all symbols."""
        return sum(self.counts)

    @property
    def zeros(self) -> int:
        """Number of zeros."""
        return dict(zip(self.symbols, self.counts, strict=True)).get(0, 0)


def bands_of(tap: TapFigures) -> list[Band]:
    """Bands of a tap, from low to high frequencies for blocks, from fine to coarse for wavelets."""
    return [_band(band, tap.signed) for band in tap.bands]


def _band(band: BandCounts, signed: bool) -> Band:
    found = sorted((_value(u) if signed else u, count) for u, count in enumerate(band.counts) if count)
    # Bands of block transforms are diagonals of the block, named by the sum of their indices.
    name = f"i+j={band.name}" if band.name.isdecimal() else band.name
    return Band(name, tuple(value for value, _ in found), tuple(count for _, count in found))


def _value(symbol: int) -> int:
    """The signed value of a symbol of the code: 0, -1, 1, -2, 2, ..."""
    return -(symbol + 1) // 2 if symbol % 2 else symbol // 2


def grouped(bands: Sequence[Band], most: int) -> list[Band]:
    """Join neighbouring bands into ``most`` groups of about equal length, if there are more bands."""
    if len(bands) <= most:
        return list(bands)
    edges = [round(i * len(bands) / most) for i in range(most + 1)]
    return [_joined(bands[start:end]) for start, end in pairwise(edges)]


def _joined(bands: Sequence[Band]) -> Band:
    counts: dict[int, int] = {}
    for band in bands:
        for symbol, count in zip(band.symbols, band.counts, strict=True):
            counts[symbol] = counts.get(symbol, 0) + count
    name = bands[0].name if len(bands) == 1 else f"{bands[0].name} to {bands[-1].name.rpartition('=')[2]}"
    found = sorted(counts.items())
    return Band(name, tuple(symbol for symbol, _ in found), tuple(count for _, count in found))
