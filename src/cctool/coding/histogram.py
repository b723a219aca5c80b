"""Histograms of symbols, counted where the values are: on a GPU nothing waits for the host.

From a histogram the bits of any order follow without another look at the values (`cctool.coding.entropy`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cctool.base.errors import TransformError
from cctool.coding.symbols import symbol_limit, to_unsigned

__all__ = ["Histogram", "histogram"]

_PIECE = 1 << 21
# Most symbols are 0, and additions to one place of a GPU's memory wait for each other: each bin has copies.
_COPIES = 1024
_FEW_BINS = 1 << 10


class Histogram:
    """Counts of symbols, batch by batch.

    Types of up to 16 bits have bins for every symbol from the first batch on, and then no batch makes the
    host wait. For int32 the bins grow with the largest symbol seen, which the host has to know.

    Args:
        signed: whether values are numbered 0, -1, 1, -2, 2, ... (`to_unsigned`) first.
        limit: most bins that int32 values may ask for; 2^24 unless given.

    Example::

        seen = Histogram(signed=True)
        for batch in batches:
            seen.add(batch)
        best_k(seen.counts)
    """

    def __init__(self, *, signed: bool, limit: int = 1 << 24) -> None:
        self.signed = signed
        self.limit = limit
        self._counts = torch.zeros(1, dtype=torch.int64)

    @property
    def counts(self) -> Tensor:
        """Counts by symbol, int64 of shape (bins,) on the device of the values, with at least one bin."""
        return self._counts

    def add(self, values: Tensor) -> None:
        """Count every element of ``values``.

        Args:
            values: int8, int16 or int32, or uint8 unless ``signed``; any shape. None may be negative unless
                ``signed``: on the CPU that is refused, on a GPU such values stop the device.

        Raises:
            TransformError: if the type cannot be coded, or a symbol lies beyond the bins allowed.
        """
        bins = symbol_limit(values.dtype, signed=self.signed) + 1
        if self._counts.device != values.device:
            self._counts = self._counts.to(values.device)
        for piece in torch.split(values.detach().reshape(-1), _PIECE):
            symbols = (to_unsigned(piece) if self.signed else piece).long()
            self._reserve(self._needed(symbols) if values.dtype == torch.int32 else bins)
            self._count(symbols)

    def _needed(self, symbols: Tensor) -> int:
        needed = int(symbols.max()) + 1 if symbols.numel() else 1
        if needed > self.limit:
            raise TransformError(
                f"symbol {needed - 1}: a histogram of at most {self.limit} bins was asked for"
            )
        return needed

    def _reserve(self, bins: int) -> None:
        missing = bins - len(self._counts)
        if missing > 0:
            self._counts = torch.cat([self._counts, self._counts.new_zeros(missing)])

    def _count(self, symbols: Tensor) -> None:
        bins = len(self._counts)
        if symbols.device.type == "cpu":
            if symbols.numel() and int(symbols.min()) < 0:
                raise TransformError(f"{int(symbols.min())}: unsigned symbols are not negative")
            self._counts += torch.bincount(symbols, minlength=bins)
        else:
            self._scatter(symbols)

    def _scatter(self, symbols: Tensor) -> None:
        """Count without `torch.bincount`, which asks the device for the largest symbol and waits."""
        bins = len(self._counts)
        copies = _COPIES if bins <= _FEW_BINS else 1
        lanes = torch.arange(symbols.numel(), device=symbols.device) % copies
        spread = self._counts.new_zeros(bins * copies)
        spread.scatter_add_(0, symbols * copies + lanes, torch.ones_like(symbols))
        self._counts += spread.view(bins, copies).sum(1)


def histogram(values: Tensor, *, signed: bool) -> Tensor:
    """Counts of the symbols of ``values``, int64 of shape (bins,) on their device.

    >>> histogram(torch.tensor([0, 0, -1, 1], dtype=torch.int8), signed=True)[:4].tolist()
    [2, 1, 1, 0]

    Raises:
        TransformError: as `Histogram.add` does.
    """
    counted = Histogram(signed=signed)
    counted.add(values)
    return counted.counts
