"""Histograms of symbols, counted where the values are: on a GPU nothing waits for the host.

From a histogram the bits of any order follow without another look at the values (`cctool.coding.histogram`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cctool.base.errors import TransformError
from cctool.coding.symbols import MAX_K, code_lengths, symbol_limit, to_unsigned

__all__ = ["Histogram", "best_k", "code_bits", "entropy_bits", "histogram"]

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

    Attributes:
        counts: by symbol, int64 of shape (bins,) on the device of the values, with at least one bin.

    Example::

        seen = Histogram(signed=True)
        for batch in batches:
            seen.add(batch)
        best_k(seen.counts)
    """

    def __init__(self, *, signed: bool, limit: int = 1 << 24) -> None:
        self.signed = signed
        self.limit = limit
        self.counts = torch.zeros(1, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count every element of ``values``.

        Args:
            values: int8, int16 or int32, or uint8 unless ``signed``; any shape. None may be negative unless
                ``signed``: on the CPU that is refused, on a GPU such values stop the device.

        Raises:
            TransformError: if the type cannot be coded, or a symbol lies beyond the bins allowed.
        """
        bins = symbol_limit(values.dtype, signed=self.signed) + 1
        if self.counts.device != values.device:
            self.counts = self.counts.to(values.device)
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
        missing = bins - len(self.counts)
        if missing > 0:
            self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])

    def _count(self, symbols: Tensor) -> None:
        bins = len(self.counts)
        if symbols.device.type == "cpu":
            if symbols.numel() and int(symbols.min()) < 0:
                raise TransformError(f"{int(symbols.min())}: unsigned symbols are not negative")
            self.counts += torch.bincount(symbols, minlength=bins)
        else:
            self._scatter(symbols)

    def _scatter(self, symbols: Tensor) -> None:
        """Count without `torch.bincount`, which asks the device for the largest symbol and waits."""
        bins = len(self.counts)
        copies = _COPIES if bins <= _FEW_BINS else 1
        lanes = torch.arange(symbols.numel(), device=symbols.device) % copies
        spread = self.counts.new_zeros(bins * copies)
        spread.scatter_add_(0, symbols * copies + lanes, torch.ones_like(symbols))
        self.counts += spread.view(bins, copies).sum(1)


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


def entropy_bits(counts: Tensor) -> float:
    """Bits that no code of single symbols goes below: n times their zero-order entropy, -sum c log2(c / n).

    Shannon, "A Mathematical Theory of Communication" (1948), theorem 9.

    Args:
        counts: int64 of shape (bins,), any device.

    >>> entropy_bits(torch.tensor([2, 1, 1]))
    6.0
    """
    seen = counts[counts > 0].double()
    return float((seen * (seen.sum().log2() - seen.log2())).sum())


def code_bits(counts: Tensor) -> Tensor:
    """Bits of all symbols in the codes of order 0 to 5, int64 of shape (6,) on the histogram's device.

    Args:
        counts: int64 of shape (bins,): how often symbol 0, 1, ... occurs.

    >>> code_bits(torch.tensor([10, 1, 1])).tolist()
    [16, 16, 18, 20, 22, 24]
    """
    # Products and sums of int64 are exact; CUDA multiplies no matrices of integers.
    lengths = torch.stack([code_lengths(len(counts), k) for k in range(MAX_K + 1)])
    return (lengths.to(counts.device) * counts).sum(1)


def best_k(counts: Tensor, *, smallest: int = 1) -> int:
    """Order from ``smallest`` to 5 with the fewest bits, the smaller of equal ones.

    Order 0, which the published tables leave out, takes ``smallest=0``.

    >>> best_k(torch.tensor([10, 1, 1])), best_k(torch.tensor([1, 0, 0, 0, 0, 0, 0, 9]))
    (1, 3)
    """
    bits = code_bits(counts)[smallest:].tolist()
    return smallest + bits.index(min(bits))
