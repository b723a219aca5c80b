"""Decoder of the sparse exponential-Golomb code: packed bits to arrays of symbols.

All blocks are decoded in parallel. In each step every block looks up its next 15 bits, a *window*, in a
table: how many whole codewords it holds, and how many bits they take. Their values are filled in later, for
all windows together. A codeword longer than a window (an *escape*) is decoded by arithmetic.

The stream is not trusted: sizes are checked against the payload before anything is read, a block that runs
past its bits or its values is refused, and each round takes every block forward by at least one codeword.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cctool.base.errors import BitstreamError
from cctool.coding.packing import WORD, Values, Words

MAX_BITS = 65
"""Bits of the longest codeword: symbol 2^32 - 1 at order 1."""

_WINDOW = 15
_ESCAPE = 1 << _WINDOW
_MASK = np.uint64((1 << 30) - 1)
# Blocks that are decoded in parallel: many, to share the overhead of a step, but no more than fit the cache
# and memory, of which long codewords need most.
_GROUP_BLOCKS = 2048
_GROUP_BITS = 1 << 26
_LONGEST_ROUND = 64
_PIECE = 1 << 13

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class _WindowTable:
    """The contents of every 15-bit window; the last entry stands for one escape.

    Attributes:
        bits: of the whole codewords in it, int64.
        held: number of values in it, uint8.
        values: these values as bytes, of shape (windows, places).
        used: whether a place has a value, of the same shape.
    """

    bits: Integers
    held: NDArray[np.uint8]
    values: NDArray[np.uint8]
    used: NDArray[np.bool_]


@dataclass(frozen=True)
class _BlocksApart:
    """Blocks copied apart, in reverse, each followed by zero bits, which never are a whole codeword.

    A position is the number of a bit counted from the end.

    Attributes:
        halves: the 30 bits that start at each 16-bit half word, int64, the last half word first.
        start: position of each block's first bit.
        end: position behind each block's last bit.
    """

    halves: Integers
    start: Integers
    end: Integers


def unpack(
    payload: bytes,
    block_bits: NDArray[np.uint32],
    counts: Integers,
    k: int,
    limit: int,
    *,
    signed: bool,
    dtype: np.dtype[Any],
) -> Values:
    """Decode every value.

    Args:
        payload: the bits of all blocks, without gaps.
        block_bits: bits of each block; their sum is the length of the payload in bits.
        counts: values in each block, between 1 and ``block_bits``.
        k: order of the code, 0 to 5.
        limit: largest symbol that a value of ``dtype`` can have.
        signed: whether symbols number the values 0, -1, 1, -2, 2, ...
        dtype: of the result.

    Returns:
        A flat array of ``counts.sum()`` values.

    Raises:
        BitstreamError: if a block does not hold its values in exactly its bits, or a value does not fit.
    """
    ends = np.cumsum(block_bits, dtype=np.int64)
    values = np.empty(int(counts.sum()), dtype)
    words = np.frombuffer(payload + bytes(-len(payload) % 8 + 16), dtype=">u8").astype(np.uint64)
    # Places per window: eight for short codewords, of which a window holds many, four for longer ones.
    places = (8 if int(ends[-1]) < 4 * len(values) else 4) if len(values) else 1
    table = _table(k, signed, min(limit, 255), places)
    first = done = 0
    while first < len(counts):
        begin = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, begin + _GROUP_BITS, side="right"))
        last = min(max(last, first + 1), first + _GROUP_BLOCKS)
        source = _spread(words, begin, ends[first:last])
        progress = _Cursors(source, counts[first:last], table)
        while len(progress.active):
            progress.advance(k, limit)
        size = int(counts[first:last].sum())
        _fill(values[done : done + size], progress, last - first, signed)
        first, done = last, done + size
    return values


def _spread(words: Words, begin: int, ends: Integers) -> _BlocksApart:
    starts = np.concatenate(([begin], ends[:-1]))
    sizes = (ends - starts) // WORD + 2
    tops = np.cumsum(sizes)
    # Two extra words, so that a codeword that claims to run past the end reads zeros.
    total = int(tops[-1]) + 2
    halves = np.zeros((total, 4), dtype=np.int64)
    first = 0
    while first < len(ends):
        row = int(tops[first] - sizes[first])
        last = max(int(np.searchsorted(tops, row + _PIECE, side="right")), first + 1)
        back = _blocks_apart(words, starts[first:last], ends[first:last], sizes[first:last])[::-1]
        rows = halves[total - row - len(back) : total - row]
        rows[:, 3] = back >> np.uint64(34)
        rows[:, 2] = (back >> np.uint64(18)) & _MASK
        rows[:, 1] = (back >> np.uint64(2)) & _MASK
        # The last word of a block is 0, so the bits that would come from beyond it do not matter.
        rows[1:, 0] = (back[1:] << np.uint64(14) | back[:-1] >> np.uint64(50)) & _MASK
        first = last
    start = WORD * (total - tops + sizes) - 1
    return _BlocksApart(halves.reshape(-1), start, start - (ends - starts))


def _blocks_apart(words: Words, starts: Integers, ends: Integers, sizes: Integers) -> Words:
    """The bits of each block, aligned to a word, padded with zero bits to the block's ``sizes`` words."""
    tops = np.cumsum(sizes)
    inner = WORD * (np.arange(int(tops[-1])) - np.repeat(tops - sizes, sizes))
    at = np.minimum(np.repeat(starts, sizes) + inner, np.repeat(ends, sizes))
    shift = (at & (WORD - 1)).astype(np.uint64)
    index = at >> 6
    # numpy shifts by 64 give 0, as is needed for blocks that begin at a word's first bit.
    apart = np.take(words, index) << shift | np.take(words, index + 1) >> (np.uint64(WORD) - shift)
    surplus = np.clip(WORD + inner - np.repeat(ends - starts, sizes), 0, WORD).astype(np.uint64)
    kept: Words = apart >> surplus << surplus
    return kept


class _Cursors:
    """The reading position of each block, and what was read.

    Attributes:
        active: numbers of the blocks that are not finished.
        at: position of each of these.
        end: where each has to end.
        left: number of values that each still has to yield.
        rounds: for each round the blocks that took part and their windows, of shape (windows, blocks).
        escapes: for each round with escapes: the blocks, the row of the round, and the symbols.
        rows: windows per block so far.
        steps: windows per block in the next round; 0 decodes every codeword by arithmetic.
    """

    def __init__(self, source: _BlocksApart, counts: Integers, table: _WindowTable) -> None:
        self.halves, self.table = source.halves, table
        self.active = np.arange(len(counts))
        self.at, self.end, self.left = source.start, source.end, counts
        self.rounds: list[tuple[Integers, NDArray[np.uint16]]] = []
        self.escapes: list[tuple[Integers, int, Integers]] = []
        self.rows, self.steps = 0, 8

    def advance(self, k: int, limit: int) -> None:
        """Read ``steps`` windows of every block, and then one escape where that comes next."""
        windows, stuck = self._windows()
        held = np.take(self.table.held, windows)
        self.left = self.left - held.sum(0, dtype=np.int64)
        long = np.flatnonzero(stuck & (self.at > self.end))
        share = 0.0
        if len(long):
            before = self.at[long]
            symbols, self.at[long] = _long_codeword(self.halves, before, k, limit)
            share = np.count_nonzero(before - self.at[long] > _WINDOW) / len(long)
            self.escapes.append((self.active[long], self.rows + len(windows), symbols))
            row = np.zeros((1, len(stuck)), dtype=np.uint16)
            row[0, long] = _ESCAPE
            self.left[long] -= 1
            windows = np.concatenate((windows, row))
        self.rounds.append((self.active, windows))
        self.rows += len(windows)
        self._pace(share if self.steps == 0 else 1.0 - np.count_nonzero(held) / held.size)
        self._drop_finished()

    def _windows(self) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        """The next windows of each block, and which blocks are stuck behind them.

        A block is stuck where an escape comes next, or at its end.
        """
        at = self.at
        windows = np.empty((self.steps, len(at)), dtype=np.uint16)
        index, window, shift = np.empty_like(at), np.empty_like(at), np.zeros_like(at)
        for step in range(self.steps):
            # The hot loop of decoding: it writes into the same three arrays instead of allocating new ones.
            np.right_shift(at, 4, out=index)
            np.take(self.halves, index, out=window, mode="clip")
            np.bitwise_and(at, 15, out=shift)
            np.right_shift(window, shift, out=window)
            np.bitwise_and(window, _ESCAPE - 1, out=window)
            windows[step] = window
            np.take(self.table.bits, window, out=shift, mode="clip")
            np.subtract(at, shift, out=at)
        return windows, shift == 0

    def _pace(self, idle: float) -> None:
        """Adapt the windows per round; ``idle`` is the share of them that held no whole codeword."""
        if self.steps == 0:
            self.steps = 0 if idle > 0.4 else 1
        elif self.steps == 1:
            self.steps = 0 if idle > 0.6 else 2 if idle < 0.1 else 1
        elif idle > 0.2:
            self.steps //= 2
        elif idle < 0.1:
            self.steps = min(_LONGEST_ROUND, 2 * self.steps)

    def _drop_finished(self) -> None:
        on = self.at > self.end
        full = self.left == 0
        # An active block has values left exactly if it has bits left; anything else is a corrupt stream.
        if (self.at < self.end).any() or (self.left < 0).any() or (full == on).any():
            raise BitstreamError("a block of the stream does not hold the values that it should")
        if full.any():
            self.active, self.left = self.active[on], self.left[on]
            self.at, self.end = self.at[on], self.end[on]


def _long_codeword(halves: Integers, at: Integers, k: int, limit: int) -> tuple[Integers, Integers]:
    """Decode a codeword of any length at each position; return its symbol and the position behind it."""
    # No codeword has more than 33 leading zeros; the 34 bits are exact in float64, so frexp counts them.
    digits = np.frexp(_bits(halves, at, 34).astype(np.float64))[1].astype(np.int64)
    zeros = 34 - digits
    if (digits == 0).any():
        raise BitstreamError("a codeword of the stream begins with more zeros than any has")
    numbers = _bits(halves, at - zeros, 38) >> (38 - np.maximum(zeros + k, 1))
    symbols = np.where(zeros == 0, 0, numbers - (1 << k) + 1)
    if (symbols > limit).any():
        raise BitstreamError(
            f"symbol {symbols.max()} of the stream is above {limit}, the largest of its type"
        )
    return symbols, at - np.where(zeros == 0, 1, 2 * zeros + k)


def _bits(halves: Integers, at: Integers, count: int) -> Integers:
    """The next ``count`` <= 38 bits at each position, as numbers."""
    index = at >> 4
    # The 62 bits from the start of the half word, which is up to 15 bits before the position.
    first, second, third = (np.take(halves, index - part, mode="clip") for part in range(3))
    joined = (first >> 14 << 46) | (second >> 14 << 30) | third
    return (joined >> (62 - 15 - count + (at & 15))) & ((1 << count) - 1)


def _fill(values: Values, progress: _Cursors, blocks: int, signed: bool) -> None:
    """Write the values of all windows, block by block."""
    grid = np.zeros((blocks, progress.rows), dtype=np.uint16)
    row = 0
    for active, windows in progress.rounds:
        columns = slice(row, row + len(windows))
        if len(active) == blocks:
            grid[:, columns] = windows.T
        else:
            grid[active, columns] = windows.T
        row += len(windows)
    flat = grid.ravel()
    table, done = progress.table, 0
    full = len(values) > 0.8 * table.values.shape[1] * len(flat)
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE]
        used = np.take(table.used, piece, axis=0).reshape(-1)
        octets = np.take(table.values, piece, axis=0).reshape(-1)
        # Boolean indexing copies whole runs, which is faster where most places are used.
        octets = octets[used] if full else np.compress(used, octets)
        values[done : done + len(octets)] = octets.view(np.int8) if signed else octets
        done += len(octets)
    if progress.escapes:
        order = np.concatenate([active * progress.rows + row for active, row, _ in progress.escapes])
        symbols = np.concatenate([symbols for _, _, symbols in progress.escapes])[np.argsort(order)]
        # An escape stands in the grid as one value, whose byte is replaced here.
        places = np.cumsum(np.take(table.held, flat), dtype=np.int64)[np.flatnonzero(flat == _ESCAPE)] - 1
        values[places] = _numbered(symbols) if signed else symbols


def _numbered(symbols: Integers) -> Integers:
    return (symbols >> 1) ^ -(symbols & 1)


@lru_cache(maxsize=16)
def _table(k: int, signed: bool, limit: int, places: int) -> _WindowTable:
    """Decode every window, place by place, all windows in parallel; symbols above ``limit`` are not taken."""
    size = 1 << _WINDOW
    windows = np.arange(size)
    bits, held = np.zeros(size + 1, dtype=np.int64), np.zeros(size + 1, dtype=np.uint8)
    values, used = np.zeros((size + 1, places), np.uint8), np.zeros((size + 1, places), np.bool_)
    going = np.ones(size, dtype=bool)
    for place in range(places):
        rest = (windows << bits[:-1]) & (size - 1)
        zeros = _WINDOW - np.frexp(rest.astype(np.float64))[1].astype(np.int64)
        length = np.where(zeros == 0, 1, 2 * zeros + k)
        numbers = (rest >> np.maximum(_WINDOW - length, 0)) - (1 << k) + 1
        symbols = np.where(zeros == 0, 0, numbers)
        # Codewords that do not fit gave nonsense above, and end their window.
        going &= (rest > 0) & (bits[:-1] + length <= _WINDOW) & (symbols <= limit)
        found = _numbered(symbols) if signed else symbols
        values[:-1, place][going] = found[going].astype(np.uint8)
        used[:-1, place][going] = True
        bits[:-1][going] += length[going]
        held[:-1][going] += 1
    # The entry of escapes has room for one value, which `_fill` writes.
    held[-1], used[-1, 0] = 1, True
    return _WindowTable(bits, held, values, used)
