"""Which weights go together under a mask: ``--pattern 2:4`` and ``--block 4x1``."""

from __future__ import annotations

from dataclasses import dataclass

from cctool.base.errors import UsageError


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of every `of` neighbours along the input dim, `keep` are kept."""

    keep: int = 2
    of: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise UsageError(f"--pattern {self.keep}:{self.of}: fewer must stay than there are, as in 2:4")


def parse_pattern(text: str) -> Pattern:
    """Parse ``N:M``.

    >>> parse_pattern("2:4")
    Pattern(keep=2, of=4)
    """
    pieces = text.split(":")
    if len(pieces) != 2 or not all(piece.isdecimal() for piece in pieces):
        raise UsageError(f"--pattern {text}: N:M is expected, as in 2:4")
    return Pattern(int(pieces[0]), int(pieces[1]))


@dataclass(frozen=True)
class Block:
    """Rows (output channels) and columns of one block of a weight seen as a matrix."""

    rows: int = 4
    columns: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise UsageError(f"--block {self.rows}x{self.columns}: positive numbers are needed")


def parse_block(text: str) -> Block:
    """Parse ``RxC``.

    >>> parse_block("4x1")
    Block(rows=4, columns=1)
    """
    pieces = text.lower().split("x")
    if len(pieces) != 2 or not all(piece.isdecimal() for piece in pieces):
        raise UsageError(f"--block {text}: ROWSxCOLUMNS is expected, as in 4x1")
    return Block(int(pieces[0]), int(pieces[1]))
