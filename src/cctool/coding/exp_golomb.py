"""Sparse exponential-Golomb code: integer tensors to bits and back, without a Python step per symbol.

`cctool.coding.symbols` defines the code. Codewords follow each other without gaps, but values are grouped
into blocks of a fixed number, and the number of bits of each block is kept too. So all blocks are decoded in
parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cctool.base.errors import BitstreamError, TransformError
from cctool.coding.packing import pack
from cctool.coding.symbols import check_k, symbol_limit
from cctool.coding.unpacking import MAX_BITS, unpack

# A file may claim any block size, and a decoder's steps and memory grow with it: hence an upper limit.
MAX_BLOCK = 1 << 12
# See `block_size` for where these come from.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 10, 3840
_SIDE_BY_SIDE = 64


@dataclass(frozen=True)
class CodedIntegers:
    """Integers in the sparse exponential-Golomb code.

    Attributes:
        payload: the bits, most significant bit of the first byte first, padded with zero bits.
        bits: number of bits before the padding: the sum of the codewords' lengths.
        block_bits: bits of each block, uint32 of shape (ceil(count / block),).
        count: number of values.
        block: values in each block; the last one may hold fewer.
    """

    payload: bytes
    bits: int
    block_bits: NDArray[np.uint32]
    count: int
    block: int


def block_size(count: int) -> int:
    """Values per block of a tensor of ``count`` values, a multiple of 64.

    There are at least 64 blocks to decode in parallel, but none below 1024 values, where the table of block
    sizes would cost too much. With at most 3840 values, blocks of 8-bit values have sizes of two bytes at
    every order.

    >>> block_size(50), block_size(100_000), block_size(10_000_000)
    (1024, 2048, 3840)
    """
    wanted = 1 << max(count // _SIDE_BY_SIDE - 1, 0).bit_length()
    return min(max(wanted, _SMALLEST_BLOCK), _LARGEST_BLOCK)


def encode(values: Tensor, k: int, *, signed: bool) -> CodedIntegers:
    """Encode integers.

    Args:
        values: int8, int16 or int32, or uint8 unless ``signed``; any shape, device and strides. They are
            coded in the order of `values.flatten()`.
        k: order of the code, 0 to 5.
        signed: number the values 0, -1, 1, -2, 2, ... first; otherwise none may be negative.

    Raises:
        TransformError: if the type cannot be coded, or a value is negative without ``signed``.
        UsageError: if ``k`` is out of range.
    """
    check_k(k)
    symbol_limit(values.dtype, signed=signed)
    flat = values.detach().reshape(-1).cpu().contiguous()
    if not signed and flat.numel() and int(flat.min()) < 0:
        raise TransformError(
            f"{int(flat.min())}: the unsigned code takes no negative values; use the signed one"
        )
    block = block_size(flat.numel())
    payload, bits, block_bits = pack(flat.numpy(), k, signed=signed, block=block)
    return CodedIntegers(payload, bits, block_bits, flat.numel(), block)


def _check_coded(coded: CodedIntegers) -> None:
    """Raise BitstreamError if count, block size, block table and payload contradict each other.

    This comes before anything is allocated. A codeword has at least one bit and at most 65.
    """
    count, block, sizes = coded.count, coded.block, coded.block_bits.astype(np.int64)
    if not 1 <= block <= MAX_BLOCK:
        raise BitstreamError(f"{block} values in a block of the stream: 1 to {MAX_BLOCK} are allowed")
    if not 0 <= count <= coded.bits:
        raise BitstreamError(f"{count} values in {coded.bits} bits of the stream: each takes at least one")
    if len(sizes) != -(-count // block):
        raise BitstreamError(f"{len(sizes)} blocks in the stream for {count} values, {block} to a block")
    if int(sizes.sum()) != coded.bits or len(coded.payload) != -(-coded.bits // 8):
        raise BitstreamError(f"the stream's blocks have {sizes.sum()} bits, its payload {coded.bits}")
    counts = block_counts(count, block)
    if (sizes < counts).any() or (sizes > MAX_BITS * counts).any():
        raise BitstreamError("a block of the stream has fewer or more bits than its values can take")
    # Otherwise different payloads would decode to the same values.
    spare = 8 * len(coded.payload) - coded.bits
    if spare and coded.payload[-1] & ((1 << spare) - 1):
        raise BitstreamError("the stream's last byte is not filled up with zero bits")


def decode(coded: CodedIntegers, k: int, *, signed: bool, dtype: torch.dtype) -> Tensor:
    """Decode what `encode` returned, or a file claims to be that, with the same ``k`` and ``signed``.

    Returns:
        A tensor of shape (count,) and type ``dtype`` on the CPU.

    Raises:
        BitstreamError: if the bits are not the codewords of exactly ``count`` values of this type.
        TransformError: if values of this type cannot be coded.
        UsageError: if ``k`` is out of range.
    """
    check_k(k)
    limit = symbol_limit(dtype, signed=signed)
    _check_coded(coded)
    target = torch.empty(0, dtype=dtype).numpy().dtype
    counts = block_counts(coded.count, coded.block)
    values = unpack(coded.payload, coded.block_bits, counts, k, limit, signed=signed, dtype=target)
    return torch.from_numpy(values)


def block_counts(count: int, block: int) -> NDArray[np.int64]:
    """Values in each block of ``count`` values, of shape (ceil(count / block),)."""
    counts = np.full(-(-count // block), block, dtype=np.int64)
    if count % block:
        counts[-1] = count % block
    return counts
