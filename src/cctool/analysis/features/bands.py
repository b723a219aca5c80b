"""Sub-bands of coded feature maps, as sheets and pictures show them."""

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
        counts: how many there are of each.
    """

    name: str
    symbols: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """How many symbols there are."""
        return sum(self.counts)

    @property
    def zeros(self) -> int:
        """How many of them are zero."""
        return dict(zip(self.symbols, self.counts, strict=True)).get(0, 0)


def bands_of(tap: TapFigures) -> list[Band]:
    """Bands of a tap, from low to high frequencies for blocks, from fine to coarse for wavelets."""
    return [_band(band, tap.signed) for band in tap.bands]


def _band(band: BandCounts, signed: bool) -> Band:
    found = sorted((_value(u) if signed else u, count) for u, count in enumerate(band.counts) if count)
    name = f"i+j={band.name}" if band.name.isdecimal() else band.name
    return Band(name, tuple(value for value, _ in found), tuple(count for _, count in found))


def _value(symbol: int) -> int:
    """What an unsigned symbol stands for: 0, -1, 1, -2, 2, ..."""
    return -(symbol + 1) // 2 if symbol % 2 else symbol // 2


def grouped(bands: Sequence[Band], most: int) -> list[Band]:
    """Join neighbours, where there are more than ``most`` bands, to as many groups of about equal length."""
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
