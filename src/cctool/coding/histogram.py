"""Histograms of symbols, counted on the device of the values without waiting for it.

A histogram is enough to compute the coded size at every order, without the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cctool.base.errors import TransformError
from cctool.coding.symbols import MAX_K, code_lengths, symbol_limit, to_unsigned

_PIECE = 1 << 21
# Most symbols are 0, and atomic additions to one address of a GPU serialise: small histograms have copies of
# each bin, which are summed at the end.
_COPIES = 1024
_FEW_BINS = 1 << 10


class Histogram:
    """Counts of symbols, batch by batch.

    Types of up to 16 bits get bins for every symbol at the first batch; from then on nothing waits for the
    device. For int32 the bins grow with the largest symbol seen, which has to be read from the device.

    Args:
        signed: whether values are numbered 0, -1, 1, -2, 2, ... (`to_unsigned`) first.
        limit: most bins that int32 values may need.

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
            values: int8, int16 or int32, or uint8 unless ``signed``; any shape. Without ``signed`` none may
                be negative: the CPU raises an error, a GPU stops with a device assertion.

        Raises:
            TransformError: if the type cannot be coded, or a symbol needs more than ``limit`` bins.
        """
        bins = symbol_limit(values.dtype, signed=self.signed) + 1
        if self.counts.device != values.device:
            self.counts = self.counts.to(values.device)
        # In pieces, because the symbols are int64: eight times the memory of int8 values.
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
    """Lower bound for codes of single symbols: n times the zero-order entropy, -sum c log2(c / n), in bits.

    Shannon, "A Mathematical Theory of Communication" (1948), theorem 9. ``counts`` is int64 of shape (bins,).

    >>> entropy_bits(torch.tensor([2, 1, 1]))
    6.0
    """
    seen = counts[counts > 0].double()
    return float((seen * (seen.sum().log2() - seen.log2())).sum())


def code_bits(counts: Tensor) -> Tensor:
    """Bits of all symbols at the orders 0 to 5, int64 of shape (6,) on the histogram's device.

    ``counts`` is int64 of shape (bins,): how often symbol 0, 1, ... occurs.

    >>> code_bits(torch.tensor([10, 1, 1])).tolist()
    [16, 16, 18, 20, 22, 24]
    """
    # Integers, because float sums would round. Not a matrix product: CUDA has none for integers.
    lengths = torch.stack([code_lengths(len(counts), k) for k in range(MAX_K + 1)])
    return (lengths.to(counts.device) * counts).sum(1)


def best_k(counts: Tensor, *, smallest: int = 1) -> int:
    """The order from ``smallest`` to 5 with the fewest bits; of equal ones the smallest.

    The published tables leave order 0 out; ``smallest=0`` includes it.

    >>> best_k(torch.tensor([10, 1, 1])), best_k(torch.tensor([1, 0, 0, 0, 0, 0, 0, 9]))
    (1, 3)
    """
    bits = code_bits(counts)[smallest:].tolist()
    return smallest + bits.index(min(bits))
