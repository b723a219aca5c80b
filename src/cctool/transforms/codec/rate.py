"""A differentiable stand-in for the bits that coefficients take in the sparse exponential-Golomb code.

The symbol of a coefficient z, in units of its step, is round(z). The code of order 1 writes a signed symbol
s in 1 + 2 ceil(log2(1 + |s|)) bits: 1 for 0, 3 for +-1, 5 for +-2 and +-3. The stand-in has neither rounding:

    bits(z) = 1 + 2 log2(1 + |z|)

It meets the code at |z| = 0, 1, 3, 7 and so on. Near 0 it is an L1 norm, the term by which Georgiadis (CVPR
2019, arXiv 1812.04056) makes maps sparse before they are coded; large coefficients are pulled less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["soft_bits", "soft_bits_slope"]


def soft_bits(z: Tensor) -> Tensor:
    """Bits of coefficients in units of their steps; any shape, at least 1 each.

    >>> soft_bits(torch.tensor([0.0, -1.0, 3.0])).tolist()
    [1.0, 3.0, 5.0]
    """
    return 1 + 2 / math.log(2) * torch.log1p(z.abs())


def soft_bits_slope(z: Tensor) -> Tensor:
    """Derivative of `soft_bits`: 2 sign(z) / (ln 2 (1 + |z|)), 0 at 0."""
    return torch.sign(z) * (2 / math.log(2)) / (1 + z.abs())
