"""Symbols of the sparse exponential-Golomb code (SEG) and the lengths of their codewords.

SEG is the code of Georgiadis, "Accelerating Convolutional Neural Networks via Activation Map Compression"
(CVPR 2019, arXiv:1812.04056), section 3.3. A symbol u >= 0 is written as

    u = 0     the bit 1
    u >= 1    the bit 0, then floor(log2 x) - k zero bits, then x = u - 1 + 2^k in binary

that is, a flag and the exponential-Golomb code of order k of u - 1. Its length is 2 floor(log2 x) + 2 - k. A
codeword is therefore the number x, right-aligned in a field of its length. Order 0 has the flag as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cctool.base.errors import TransformError, UsageError

MAX_K = 5

# The symbols of signed values need a wider type: -2^(b-1) becomes 2^b - 1.
_WIDER = {torch.int8: torch.int16, torch.int16: torch.int32, torch.int32: torch.int64}
_UNSIGNED = {torch.uint8: torch.uint8, **{dtype: dtype for dtype in _WIDER}}


def check_k(k: int) -> None:
    """Raise UsageError unless 0 <= ``k`` <= 5."""
    if not 0 <= k <= MAX_K:
        raise UsageError(f"k {k}: the order of the exponential-Golomb code is 0 to {MAX_K}")


def symbol_limit(dtype: torch.dtype, *, signed: bool) -> int:
    """Largest symbol of a value of ``dtype``; TransformError if values of this type cannot be coded.

    >>> symbol_limit(torch.int8, signed=True), symbol_limit(torch.uint8, signed=False)
    (255, 255)
    """
    taken = _WIDER if signed else _UNSIGNED
    if dtype not in taken:
        names = ", ".join(str(name).removeprefix("torch.") for name in taken)
        kind = "signed" if signed else "unsigned"
        raise TransformError(f"{str(dtype).removeprefix('torch.')}: the {kind} code takes {names}")
    top = torch.iinfo(dtype).max
    return 2 * top + 1 if signed else top


def to_unsigned(values: Tensor) -> Tensor:
    """Number signed values 0, -1, 1, -2, 2, ...: 2 v for v >= 0, 2 |v| - 1 for v < 0.

    ``values`` are int8, int16 or int32 of any shape and device, the symbols of the next wider type.

    >>> to_unsigned(torch.tensor([0, -1, 1, -2, 2], dtype=torch.int8)).tolist()
    [0, 1, 2, 3, 4]
    """
    symbol_limit(values.dtype, signed=True)
    wide = values.to(_WIDER[values.dtype])
    return torch.where(wide < 0, -2 * wide - 1, 2 * wide)


def code_lengths(count: int, k: int) -> Tensor:
    """Bits of the symbols 0, 1, ..., ``count`` - 1 in the code of order ``k``, int64 of shape (count,).

    >>> code_lengths(6, 2).tolist()
    [1, 4, 4, 4, 4, 6]
    """
    check_k(k)
    symbols = torch.arange(count)
    # frexp's exponent is the number of binary digits, 1 + floor(log2 x); float64 holds every symbol exactly.
    digits = torch.frexp((symbols - 1 + (1 << k)).clamp_(min=1).double()).exponent.long()
    return torch.where(symbols == 0, 1, 2 * digits - k)


def code_length(symbol: int, k: int) -> int:
    """Bits of one symbol in the code of order ``k``.

    >>> code_length(0, 3), code_length(1, 3), code_length(256, 3)
    (1, 5, 15)
    """
    check_k(k)
    return 2 * (symbol - 1 + (1 << k)).bit_length() - k if symbol else 1
