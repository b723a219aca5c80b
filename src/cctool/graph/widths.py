"""Integers that remember which width they are: sizes read off activations, and modules' integer attributes.

Code that computes shapes (`C // num_heads`, `3 * self.dim`) requires widths to agree. While a pass runs, the
sizes of activations and the integer attributes of the user's modules are replaced by `Width`, a subclass of
int that keeps track of products and exact quotients as a monomial in the widths it was made of. Sums and
other operations give ordinary integers, about which nothing is known. Scales computed from widths
(`dim ** -0.5`) are tracked in the same way, as `Scale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Symbol:
    """One width: the number of channels in `ids`, or the value of a module's attribute.

    Attributes:
        book: the ledger of the pass that it belongs to; widths of other passes are ignored.
        value: the number.
        ids: the channels that it counts; None for an attribute.
        module: qualified name of the module that has the attribute.
        attribute: its name.
        index: which entry of the attribute, if that is a tuple or a list.
    """

    book: object
    value: int
    ids: Tensor | None = None
    module: str = ""
    attribute: str = ""
    index: int | None = None


Powers = dict[Symbol, float]


def _joined(a: object, b: object, sign: float) -> Powers:
    powers = dict(powers_of(a))
    for symbol, exponent in powers_of(b).items():
        powers[symbol] = powers.get(symbol, 0) + sign * exponent
    return {symbol: exponent for symbol, exponent in powers.items() if exponent}


def powers_of(value: object) -> Mapping[Symbol, float]:
    """The widths that a number is a product of, with their exponents; none for an ordinary number."""
    return value.powers if isinstance(value, (Width, Scale)) else {}


def _number(value: Any, powers: Powers) -> Any:
    if value is NotImplemented or not powers:
        return value
    return Width(value, powers) if isinstance(value, int) else Scale(value, powers)


class _Monomial:
    """A number that is a constant times powers of widths: its products, quotients and powers are too."""

    powers: Powers

    def __mul__(self: Any, other: Any) -> Any:
        plain = int(self) if isinstance(self, int) else float(self)
        return _number(_bare(plain, other, "__mul__"), _joined(self, other, 1))

    __rmul__ = __mul__

    def __neg__(self: Any) -> Any:
        return _number(-(int(self) if isinstance(self, int) else float(self)), self.powers)

    def __truediv__(self: Any, other: Any) -> Any:
        return _number(_bare(float(self), other, "__truediv__"), _joined(self, other, -1))

    def __rtruediv__(self: Any, other: Any) -> Any:
        return _number(_bare(float(self), other, "__rtruediv__"), _joined(other, self, -1))

    def __pow__(self: Any, other: Any, modulo: Any = None) -> Any:
        whole = isinstance(self, int) and isinstance(other, int)
        value = int.__pow__(self, other, modulo) if whole else _bare(float(self), other, "__pow__")
        if modulo is not None or value is NotImplemented or powers_of(other):
            return value
        return _number(value, {symbol: exponent * other for symbol, exponent in self.powers.items()})


class Width(_Monomial, int):
    """An int that is a product of widths.

    >>> width = Width(12, {Symbol(None, 12): 1})
    >>> type(width // 4).__name__, type(width + 1).__name__, type(width**-0.5).__name__
    ('Width', 'int', 'Scale')
    """

    def __new__(cls, value: int, powers: Powers) -> Width:
        """Make an int with its factorization into widths."""
        made = super().__new__(cls, value)
        made.powers = powers
        return made

    # Copies and pickles outlive the pass, to which the widths belong: they are ordinary numbers.
    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other)
        if same is True and isinstance(other, Width):
            _note_equal(self, other)
        return same

    # int defines `!=` itself, which would miss the note of `==`.
    def __ne__(self, other: object) -> bool:
        same = self.__eq__(other)
        return same if same is NotImplemented else not same

    def __floordiv__(self, other: Any) -> Any:
        value = int.__floordiv__(self, other) if isinstance(other, int) else NotImplemented
        exact = value is not NotImplemented and value * int(other) == int(self)
        return _number(value, _joined(self, other, -1)) if exact else value

    def __rfloordiv__(self, other: Any) -> Any:
        value = int.__rfloordiv__(self, other) if isinstance(other, int) else NotImplemented
        exact = value is not NotImplemented and value * int(self) == int(other)
        return _number(value, _joined(other, self, -1)) if exact else value


class Scale(_Monomial, float):
    """A float that is a product of powers of widths and a constant."""

    def __new__(cls, value: float, powers: Powers) -> Scale:
        """Make a float with its factorization into powers of widths."""
        made = super().__new__(cls, value)
        made.powers = powers
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)

    def __deepcopy__(self, memo: Any) -> float:
        return float(self)


def _bare(value: float, other: Any, operation: str) -> Any:
    """Arithmetic on ordinary numbers; for tensors and other types their own operators are called."""
    if isinstance(other, (int, float)):
        plain = int(other) if isinstance(other, int) else float(other)
        if isinstance(value, int) and isinstance(plain, float):
            value = float(value)
        return getattr(value, operation)(plain if isinstance(value, int) else float(plain))
    return NotImplemented


def _note_equal(a: Width, b: Width) -> None:
    """Code such as `assert embed_dim == self.embed_dim` says that the attribute holds the width."""
    for width, attribute in ((a, b), (b, a)):
        (symbol, exponent), *others = width.powers.items()
        (held, power), *more = attribute.powers.items()
        if symbol.ids is None or held.ids is not None or others or more or (exponent, power) != (1, 1):
            continue
        if symbol.book is held.book and symbol.value == held.value:
            symbol.book.count_in(held.module, held.attribute, symbol.ids, held.index)  # type: ignore[attr-defined]


def as_float(value: Any) -> float:
    """As `float`, but the result of a width is a `Scale`.

    >>> type(as_float(Width(4, {Symbol(None, 4): 1}))).__name__
    'Scale'
    """
    return Scale(value, value.powers) if isinstance(value, Width) else float(value)


def _square_root(value: Any) -> Any:
    return value**0.5 if isinstance(value, (Width, Scale)) else _sqrt(value)


_sqrt: Callable[[Any], float] = math.sqrt


def _watched(value: Any, book: object, module: str, attribute: str) -> Any:
    """An integer above 1, or a tuple or list of such integers, as widths; anything else as it is."""
    # 0 and 1 are hardly ever widths, and as factors they would tie nothing.
    if type(value) is int:
        return Width(value, {Symbol(book, value, None, module, attribute): 1}) if value > 1 else value
    if (
        type(value) not in (tuple, list)
        or not all(type(item) is int and item > 1 for item in value)
        or not value
    ):
        return value
    symbols = [Symbol(book, item, None, module, attribute, n) for n, item in enumerate(value)]
    return type(value)(Width(symbol.value, {symbol: 1}) for symbol in symbols)


def _unwatched(value: Any) -> Any:
    if isinstance(value, Width):
        return int(value)
    if isinstance(value, Scale):
        return float(value)
    if type(value) in (tuple, list, torch.Size) and any(isinstance(item, (Width, Scale)) for item in value):
        return type(value)([_unwatched(item) for item in value])
    return value


@contextmanager
def remembered(model: nn.Module, book: object, heads: bool = False) -> Iterator[None]:
    """Replace the integer attributes of the user's modules by widths for a while; all are restored.

    The attributes of torch's own layers have a known meaning and stay, except for the number of heads if
    `heads` says that heads may be cut. `math.sqrt` would return a plain float: it is replaced, too.
    """
    replaced: list[tuple[nn.Module, str]] = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            own = not type(module).__module__.startswith("torch.")
            for key, value in list(vars(module).items()):
                if not own and not (heads and key == "num_heads"):
                    continue
                watched = _watched(value, book, name, key)
                if watched is not value:
                    vars(module)[key] = watched
                    replaced.append((module, key))
        math.sqrt = _square_root
        yield
    finally:
        math.sqrt = _sqrt
        for module in {**dict.fromkeys(model.modules()), **dict.fromkeys(m for m, _ in replaced)}:
            for key, value in list(vars(module).items()):  # including those that the forward pass stored
                plain = _unwatched(value)
                if plain is not value:
                    vars(module)[key] = plain
