"""What a histogram of symbols costs: in the sparse exponential-Golomb code, and at least."""

from __future__ import annotations

import torch
from torch import Tensor

from cctool.coding.symbols import MAX_K, code_lengths

__all__ = ["best_k", "code_bits", "entropy_bits"]


def entropy_bits(counts: Tensor) -> float:
    """Bits that no code of single symbols goes below: n times their zero-order entropy, -sum c log2(c / n).

    Shannon, "A Mathematical Theory of Communication" (1948), theorem 9.

    Args:
        counts: int64 of shape (bins,), any device.

    >>> entropy_bits(torch.tensor([2, 1, 1]))
    6.0
    """
    seen = counts.double()
    share = seen / seen.sum().clamp_(min=1)
    # x log x is 0 at 0.
    return float(-(torch.special.xlogy(seen, share)).sum() / torch.log(seen.new_tensor(2.0))) + 0.0


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
