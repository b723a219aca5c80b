"""Encoder of the sparse exponential-Golomb code: arrays of symbols to packed bits.

Codewords are looked up in tables, for 8-bit values two neighbours at a time. Neighbouring codewords are
joined while two fit into a word. A running sum then adds up the codes that start in the same 64-bit word:
their bits do not overlap, so a sum is as good as a bitwise or. Everything runs on pieces that fit the cache.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint64]
Values: TypeAlias = NDArray[np.signedinteger[Any]] | NDArray[np.unsignedinteger[Any]]

WORD = 64
_PIECE = 1 << 17
# Two codes of at most half a word can be joined without comparing their lengths.
_HALF = 32
# Of values of more than one byte, codewords of symbols below this are looked up.
_TABLE = 1 << 12
# A table entry is codeword << 7 | length: a codeword has at most 33 digits, a length is at most 65.
_LENGTH_BITS = np.uint64(7)
_LENGTH_MASK = np.uint64(127)


def pack(values: Values, k: int, *, signed: bool, block: int) -> tuple[bytes, int, NDArray[np.uint32]]:
    """Encode a flat array.

    Args:
        values: int8, uint8, int16 or int32 of shape (count,), contiguous, none negative unless ``signed``.
        k: order of the code, 0 to 5.
        signed: whether values are numbered 0, -1, 1, -2, 2, ... first.
        block: values per block, a multiple of 64.

    Returns:
        The bits, most significant first, padded with zero bits to a whole byte; their number without the
        padding; and the bits of each block, of shape (ceil(count / block),).
    """
    step = max(_PIECE // block, 1) * block
    packed: list[Words] = []
    blocks: list[NDArray[np.uint64]] = []
    carry, offset, bits = np.uint64(0), 0, 0
    for start in range(0, len(values), step):
        codes, lengths, run = _joined(*_codewords(values[start : start + step], k, signed))
        ends = np.cumsum(lengths, dtype=np.uint64)
        words = _words(codes, lengths, ends, offset)
        # The last word of the previous piece was not full yet.
        words[0] |= carry
        at = np.minimum(np.arange(block // run, len(ends) + block // run, block // run), len(ends)) - 1
        blocks.append(np.diff(ends[at], prepend=np.uint64(0)))
        size = int(ends[-1])
        whole, offset = divmod(offset + size, WORD)
        packed.append(words[:whole])
        carry = words[whole]
        bits += size
    packed.append(np.array([carry], dtype=np.uint64))
    payload = np.concatenate(packed).astype(">u8").tobytes()[: (bits + 7) // 8]
    table = np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.uint64)
    return payload, bits, table.astype(np.uint32)


def _words(codes: Words, lengths: Words, ends: Words, offset: int) -> Words:
    """64-bit words with each code at its place, ending at ``ends``, ``offset`` bits into the first word."""
    ends = ends + np.uint64(offset)
    # Of a field of up to 65 bits at most the last 33 are not zero, so clipping it to 64 loses nothing.
    fields = np.minimum(lengths, np.uint64(WORD))
    starts = ends - fields
    codes = codes << (np.uint64(WORD) - fields)
    index = (starts >> np.uint64(6)).astype(np.int64)
    shifts = starts & np.uint64(WORD - 1)
    sums = np.cumsum(codes >> shifts, dtype=np.uint64)
    last = np.append(np.flatnonzero(index[1:] != index[:-1]), len(index) - 1)
    words = np.zeros(int(index[-1]) + 2, dtype=np.uint64)
    # The running sum may overflow; differences modulo 2^64 are still right.
    words[index[last]] = np.diff(sums[last], prepend=np.uint64(0))
    # Only the last code of a word can reach into the next; numpy shifts by 64 give 0.
    words[index[last] + 1] |= codes[last] << (np.uint64(WORD) - shifts[last])
    return words


def _joined(codes: Words, lengths: Words, run: int) -> tuple[Words, Words, int]:
    """Join neighbours while two fit into a word; ``run`` is the number of values in each entry."""
    while run < WORD and len(codes) > 1 and int(lengths.max()) <= _HALF:
        if len(codes) % 2:
            # An empty code of length 0 makes the number even and adds no bits.
            codes, lengths = np.append(codes, np.uint64(0)), np.append(lengths, np.uint64(0))
        codes = codes[0::2] << lengths[1::2] | codes[1::2]
        lengths = lengths[0::2] + lengths[1::2]
        run *= 2
    return codes, lengths, run


def _codewords(values: Values, k: int, signed: bool) -> tuple[Words, Words, int]:
    """Codewords, their lengths, and the number of values in each entry."""
    if values.dtype.itemsize > 1:
        symbols = _symbols(values, signed)
        if int(symbols.max()) >= _TABLE:
            return *_split(_entries(symbols, k)), 1
        return *_split(np.take(_symbol_table(k), symbols)), 1
    single, pairs = _byte_tables(k, signed and values.dtype == np.int8)
    octets = values.view(np.uint8)
    even = len(octets) // 2 * 2
    found = np.take(pairs, octets[:even].view(np.uint16))
    if even < len(octets):
        found = np.append(found, single[octets[even]])
    return *_split(found), 2


def _split(entries: Words) -> tuple[Words, Words]:
    return entries >> _LENGTH_BITS, entries & _LENGTH_MASK


def _symbols(values: Values, signed: bool) -> NDArray[np.int64]:
    wide = values.astype(np.int64)
    return (wide << 1) ^ (wide >> 63) if signed else wide


def _entries(symbols: NDArray[np.int64], k: int) -> Words:
    numbers = np.maximum(symbols - 1 + (1 << k), 1)
    # frexp's exponent is the number of binary digits; float64 holds every number exactly.
    digits = np.frexp(numbers.astype(np.float64))[1].astype(np.int64)
    entries = (numbers << 7) | (2 * digits - k)
    return np.where(symbols == 0, (1 << 7) | 1, entries).astype(np.uint64)


@cache
def _symbol_table(k: int) -> Words:
    return _entries(np.arange(_TABLE), k)


@cache
def _byte_tables(k: int, signed: bool) -> tuple[Words, Words]:
    """Entries by byte, and by two bytes read as a 16-bit number in native byte order."""
    octets = np.arange(256, dtype=np.uint8)
    single = _entries(_symbols(octets.view(np.int8), True) if signed else _symbols(octets, False), k)
    both = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    codes, lengths = _split(single[both])
    joined = codes[:, 0] << lengths[:, 1] | codes[:, 1]
    return single, joined << _LENGTH_BITS | lengths.sum(1, dtype=np.uint64)
