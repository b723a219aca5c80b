"""Unsigned integers of 1 to 16 bits, packed into bytes without gaps.

The bits of all integers form one stream: integer i has the bits i n to i n + n - 1, least significant first,
and bit j of the stream is the bit of value 2^(j mod 8) in byte floor(j / 8). So two 4-bit integers a, b make
the byte a + 16 b, and 8-bit integers are bytes. Padding bits of the last byte are zero.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError, QuantizationError

WIDEST = 16
"""Most bits of an integer."""
_PIECE = 1 << 20
"""Integers packed at a time; a multiple of eight, so that each piece is a whole number of bytes."""


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` integers."""
    return -(-count * bits // 8)


def pack_integers(integers: Tensor, bits: int) -> Tensor:
    """Pack integers in C order.

    Args:
        integers: of an integer type, any shape, each from 0 to 2^bits - 1.
        bits: 1 to 16.

    Returns:
        uint8 of shape (ceil(elements * bits / 8),), on the CPU.

    Raises:
        QuantizationError: if ``bits`` is out of range or an integer does not fit.

    >>> pack_integers(torch.tensor([1, 2, 3]), 4).tolist()
    [33, 3]
    """
    _check_width(bits)
    flat = integers.detach().cpu().reshape(-1)
    if flat.is_floating_point() or flat.is_complex():
        raise QuantizationError(f"only integers are packed, not {str(flat.dtype).removeprefix('torch.')}")
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 1 << bits:
        raise QuantizationError(
            f"integers from {int(flat.min())} to {int(flat.max())} do not fit into {bits} bits"
        )
    packed = np.empty(packed_size(flat.numel(), bits), dtype=np.uint8)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE].numpy()
        at = packed_size(start, bits)
        packed[at : at + packed_size(len(piece), bits)] = _packed(piece, bits)
    return torch.from_numpy(packed)


def _packed(integers: NDArray[np.generic], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return integers.astype(np.uint8)
    octets = _width_in_bytes(bits)
    as_bytes = np.ascontiguousarray(integers.astype(f"<u{octets}")).view(np.uint8).reshape(-1, octets)
    # The bits of each integer, of which only the lowest count.
    digits = np.unpackbits(as_bytes, axis=1, count=bits, bitorder="little")
    return np.packbits(digits.reshape(-1), bitorder="little")


def unpack_integers(packed: Tensor, bits: int, count: int, owner: str) -> Tensor:
    """Inverse of `pack_integers`.

    Args:
        packed: from `pack_integers`.
        bits: 1 to 16.
        count: number of integers.
        owner: the part's name for error messages.

    Returns:
        Shape (count,), uint8 for up to 8 bits, else int32.

    Raises:
        CorruptCheckpointError: if there are more or fewer bytes, or padding is not zero.
    """
    _check_width(bits)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (packed_size(count, bits),):
        raise CorruptCheckpointError(
            f"{owner}: {packed.dtype} {list(packed.shape)} instead of the {packed_size(count, bits):,} bytes "
            f"that {count:,} integers of {bits} bits take"
        )
    used = count * bits % 8
    if used and int(packed[-1]) >> used:
        raise CorruptCheckpointError(f"{owner}: the bits that fill up the last byte are not zero")
    data = packed.contiguous().numpy()
    found = np.empty(count, dtype=np.uint8 if bits <= 8 else np.int32)
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        at = packed_size(start, bits)
        found[start : start + size] = _unpacked(data[at : at + packed_size(size, bits)], bits, size)
    return torch.from_numpy(found)


def _unpacked(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.generic]:
    if bits == 8:
        return data
    octets = _width_in_bytes(bits)
    digits = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    as_bytes = np.packbits(digits, axis=1, bitorder="little")
    return as_bytes.reshape(-1).view(f"<u{octets}")


def _width_in_bytes(bits: int) -> int:
    return 1 if bits <= 8 else 2


def _check_width(bits: int) -> None:
    if not 1 <= bits <= WIDEST:
        raise QuantizationError(f"integers of {bits} bits cannot be packed: 1 to {WIDEST} are allowed")
