"""The sparse exponential-Golomb code, symbol by symbol and bit by bit: the oracle of the fast coder."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def symbol(value: int, signed: bool) -> int:
    if not signed:
        return value
    return 2 * value if value >= 0 else -2 * value - 1


def codeword(u: int, k: int) -> str:
    """A flag; then u - 1 in groups of 2^k, 2^(k+1), 2^(k+2), ...: the group in unary, the place in binary."""
    if u == 0:
        return "1"
    rest, group = u - 1, 0
    while rest >= 1 << (k + group):
        rest -= 1 << (k + group)
        group += 1
    return "0" + "0" * group + "1" + (f"{rest:0{k + group}b}" if k + group else "")


def encoded(values: Iterable[int], k: int, signed: bool) -> str:
    return "".join(codeword(symbol(value, signed), k) for value in values)


def decoded(bits: str, count: int, k: int, signed: bool) -> list[int]:
    values, at = [], 0
    for _ in range(count):
        at += 1
        if bits[at - 1] == "1":
            values.append(0)
            continue
        group = 0
        while bits[at] == "0":
            at, group = at + 1, group + 1
        at += 1
        rest = int(bits[at : at + k + group] or "0", 2)
        at += k + group
        u = 1 + rest + sum(1 << (k + g) for g in range(group))
        values.append((u // 2 if u % 2 == 0 else -(u + 1) // 2) if signed else u)
    assert at == len(bits)
    return values


def bit_string(payload: bytes, bits: int) -> str:
    text = "".join(f"{byte:08b}" for byte in payload)
    assert set(text[bits:]) <= {"0"}
    assert len(text) - bits < 8
    return text[:bits]


def bits_of(symbols: Tensor, k: int) -> int:
    """Bits of all symbols, as the codewords have them."""
    found, counts = symbols.long().unique(return_counts=True)
    return sum(len(codeword(u, k)) * count for u, count in zip(found.tolist(), counts.tolist(), strict=True))


def to_signed(symbols: Tensor) -> Tensor:
    """Values that the numbers 0, 1, 2, 3, 4, ... stand for: 0, -1, 1, -2, 2, ..."""
    return torch.where(symbols % 2 == 1, -(symbols + 1) // 2, symbols // 2)
