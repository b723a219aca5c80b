"""What a network may cost afterwards: ``--target macs=0.5``, ``bytes=1.2MB``, ``latency=5ms``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cctool.base.errors import UsageError
from cctool.options.fields import Choice


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
        value: at most 1: a fraction of the input network's cost. Above 1: an absolute number of
            multiply-accumulates, parameters, bytes, or microseconds for one input.
        absolute: whether a value up to 1 is an absolute number, too.
    """

    quantity: Quantity
    value: float
    absolute: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise UsageError(f"--target {self.quantity}={self.value:g}: a positive number is needed")

    @property
    def relative(self) -> bool:
        """Whether the value is a fraction of the input network's cost."""
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
        UsageError: for an unknown quantity, number or unit; more than 100 %; or a time without its unit.

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


class Drop(float):
    """How much of a metric may be lost: in its own unit, or relative to its value before.

    Attributes:
        relative: whether the number is a fraction of the value before.
    """

    relative: bool

    def __new__(cls, value: float, relative: bool = False) -> Drop:
        """Make one of a number from 0 on."""
        made = super().__new__(cls, value)
        made.relative = relative
        return made

    def __str__(self) -> str:
        return f"{100 * float(self):g}%" if self.relative else f"{float(self):g}"

    def as_recorded(self) -> float | str:
        """As history stores it: a number, or text with a percent sign."""
        return str(self) if self.relative else float(self)


def parse_drop(text: str) -> Drop:
    """Parse ``1.5`` (in the metric's unit) or ``2%`` (of its value before).

    Raises:
        UsageError: for anything else, and for negative numbers.

    >>> parse_drop("1.5"), parse_drop("2%").relative
    (1.5, True)
    """
    number, relative = text.removesuffix("%"), text.endswith("%")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UsageError(
            f"--max-drop {text}: 0 or more is allowed, in the metric's own unit or with %, as in 1.5 or 2%"
        )
    return Drop(value / 100 if relative else value, relative)
