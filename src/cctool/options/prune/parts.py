"""Parts of the options of `cctool prune` that have values of their own: targets, patterns, training."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from cctool.base.errors import UsageError
from cctool.options.common import Choice, ModelOptions

__all__ = [
    "Block",
    "Pattern",
    "Quantity",
    "Sparsifier",
    "SparsifyOptions",
    "Target",
    "TeacherOptions",
    "parse_block",
    "parse_pattern",
    "parse_target",
]


class Quantity(Choice):
    """What a target limits."""

    MACS = "macs"
    PARAMS = "params"
    BYTES = "bytes"
    LATENCY = "latency"


@dataclass(frozen=True)
class Target:
    """What the network may cost afterwards.

    Attributes:
        quantity: what is limited.
        value: at most 1: a fraction of what the network that comes in costs. Above 1: an absolute number, of
            multiply-accumulates, parameters, bytes, or microseconds for one input.
        absolute: whether even a value up to 1 is such a number.
    """

    quantity: Quantity
    value: float
    absolute: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise UsageError(f"--target {self.quantity}={self.value:g}: a positive number is needed")

    @property
    def relative(self) -> bool:
        """Whether the value is a fraction of what came in."""
        return self.value <= 1 and not self.absolute

    def __str__(self) -> str:
        if self.relative:
            return f"{self.quantity}={self.value:g}"
        return f"{self.quantity}={self.value:.12g}{'us' if self.quantity is Quantity.LATENCY else ''}"


_COUNTS = {"k": 1e3, "m": 1e6, "g": 1e9}
_UNITS = {
    Quantity.MACS: _COUNTS,
    Quantity.PARAMS: _COUNTS,
    Quantity.BYTES: _COUNTS | {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9},
    Quantity.LATENCY: {"us": 1.0, "ms": 1e3, "s": 1e6},
}


def parse_target(text: str) -> Target:
    """Parse ``QUANTITY=VALUE``; values take % or the quantity's units: k, M, G, kB, MB, us, ms, s.

    Raises:
        UsageError: what it names is no quantity, number or unit of that quantity; more than 100 %; or a time
            without its unit.

    >>> parse_target("bytes=1.2MB").value, parse_target("macs=50%").relative
    (1200000.0, True)
    """
    name, equals, value = text.partition("=")
    name = name.strip()
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z%]*)\s*", value, re.IGNORECASE)
    known = [quantity.value for quantity in Quantity]
    if not equals or name not in known or found is None:
        raise UsageError(
            f"--target {text}: QUANTITY=VALUE is expected, as in macs=0.5, params=30%, bytes=1.2MB, "
            f"latency=5ms; quantities are {', '.join(known)}"
        )
    quantity, number, unit = Quantity(name), float(found[1]), found[2].lower()
    if unit == "%":
        if number > 100:
            raise UsageError(f"--target {text}: at most 100 % of what comes in can be asked for")
        return Target(quantity, number / 100)
    if unit and unit not in _UNITS[quantity]:
        raise UsageError(
            f"--target {text}: {found[2]} is no unit of {quantity}, QUANTITY=VALUE is expected with "
            f"{'us, ms, s' if quantity is Quantity.LATENCY else 'k, M, G'}"
            f"{', B, kB, MB, GB' if quantity is Quantity.BYTES else ''} or %"
        )
    if quantity is Quantity.LATENCY and not unit and number > 1:
        raise UsageError(f"--target {text}: a time needs its unit, us, ms or s, as in latency={found[1]}ms")
    scaled = number * _UNITS[quantity].get(unit, 1.0)
    return Target(quantity, scaled, absolute=bool(unit) and scaled <= 1)


@dataclass(frozen=True)
class Pattern:
    """Of every `of` neighbours along the input dim, `keep` stay."""

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


class Sparsifier(Choice):
    """How training drives units towards zero before they are cut."""

    GAMMA_L1 = "gamma-l1"
    GROUP_LASSO = "group-lasso"
    GROWING = "growing"


@dataclass(frozen=True)
class SparsifyOptions:
    """Training that drives units towards zero before they are cut.

    Attributes:
        method: see `Sparsifier`.
        epochs: of it.
        strength: weight of the penalty; of the growing one, what it grows by. None is the method's default.
        lr: learning rate; None takes the optimizer's default for trained networks.
    """

    method: Sparsifier
    epochs: int = 1
    strength: float | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        problems = [
            text
            for wrong, text in (
                (self.epochs < 1, f"--sparsify-epochs {self.epochs}: 1 or more is allowed"),
                (
                    self.strength is not None and not self.strength > 0,
                    f"--sparsify-strength {self.strength}: a positive number is needed",
                ),
                (self.lr is not None and not self.lr > 0, f"--sparsify-lr {self.lr} is not positive"),
            )
            if wrong
        ]
        if problems:
            raise UsageError("; ".join(problems))


@dataclass(frozen=True)
class TeacherOptions:
    """A network that is followed while fine-tuning.

    Attributes:
        path: its checkpoint or foreign file.
        model: how a foreign one is named.
        temperature: T of the softened outputs, above 0.
        alpha: weight of the teacher in [0, 1]; the labels weigh 1 - alpha.
    """

    path: str
    model: ModelOptions = field(default_factory=ModelOptions)
    temperature: float = 4.0
    alpha: float = 0.9

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"--temperature {self.temperature}: a positive number is needed")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"--alpha {self.alpha}: [0, 1] is allowed")
