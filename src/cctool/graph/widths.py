"""Integers that remember the attribute they came from, so that a call shows whose width it was given.

`F.conv2d(x, w, groups=self.channels)`, `x.split(self.splits, 1)` and `x[:, : self.planes // 2]` hand a width
that was stored in a module to torch. During the traced pass the modules' integer attributes are replaced by
`Width`s, which torch takes as the integers that they are; a rule that meets one binds the attribute to the
channels that it counts, and a cut sets it. A width that stands in the code as a literal stays one. Sizes that
the code reads off a tensor are `Extent`s: after a cut they come out smaller by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Source:
    """An integer attribute of a module, or entry `index` of a tuple or list, and its value."""

    module: str
    attribute: str
    index: int | None
    value: int


class Width(int):
    """An integer that is `scale` times an attribute; products with and exact quotients by integers stay one.

    Anything else that is computed from it is a plain integer, and so is a copy.
    """

    source: Source
    scale: Fraction

    def __new__(cls, value: int, source: Source, scale: Fraction = Fraction(1)) -> Width:
        """The integer `value`, which is `scale` times the source's."""
        made = super().__new__(cls, value)
        made.source, made.scale = source, scale
        return made

    def __mul__(self, other: int) -> int:
        """Width * integer."""
        product = int(self) * other
        if not isinstance(other, int) or not other:
            return product
        return Width(product, self.source, self.scale * int(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> int:
        """Width // integer, a Width where it divides."""
        quotient = int(self) // other
        if not isinstance(other, int) or quotient * other != int(self):
            return quotient
        return Width(quotient, self.source, self.scale / int(other))

    def __neg__(self) -> int:
        """The width counted from the end."""
        return Width(-int(self), self.source, -self.scale)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copies and pickles are plain integers."""
        return int, (int(self),)

    def counted(self, ids: Tensor) -> Tensor | None:
        """Ids of the channels that the attribute counts, one for each of its `value`.

        Args:
            ids: of the channels that this width counts; shape [|self|].

        Returns:
            Shape [source.value]; None where the ids do not show which belong together.

        >>> half = Width(4, Source("m", "width", None, 8), Fraction(1, 2))
        >>> half.counted(torch.tensor([5, 6, 7, 8])).tolist()
        [5, 6, 7, 8, 5, 6, 7, 8]
        """
        factor, divisor = abs(self.scale.numerator), self.scale.denominator
        if ids.numel() != abs(int(self)) or (factor > 1 and divisor > 1):
            return None
        if factor == 1:
            return ids.repeat(divisor)
        for table in (ids.reshape(-1, factor), ids.reshape(factor, -1).T):
            if torch.equal(table, table[:, :1].expand_as(table)):
                return table[:, 0]
        return None


class Extent(int):
    """A size that was read off a tensor's shape, or an exact quotient or a multiple of one."""

    def __mul__(self, other: int) -> int:
        """Extent * integer."""
        product = int(self) * other
        return Extent(product) if isinstance(other, int) else product

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> int:
        """Extent // integer, an Extent where it divides."""
        quotient = int(self) // other
        return Extent(quotient) if isinstance(other, int) and quotient * other == int(self) else quotient

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copies and pickles are plain integers."""
        return int, (int(self),)


def extents(result: Any) -> Any:
    """What `Tensor.shape` or `Tensor.size` returned, with `Extent`s for its integers."""
    if isinstance(result, torch.Size):
        return torch.Size(map(Extent, result))
    return Extent(result) if type(result) is int else result


def _widths_of(name: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    for attribute, value in vars(module).items():
        if attribute.startswith("_"):
            continue
        if type(value) is int and value > 1:
            yield attribute, Width(value, Source(name, attribute, None, value))
        elif type(value) in (tuple, list) and value and all(type(item) is int for item in value):
            items = [Width(v, Source(name, attribute, n, v)) for n, v in enumerate(value)]
            yield attribute, type(value)(items)


@contextmanager
def watched_widths(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Integer attributes of the modules, also in tuples and lists, as `Width`s; they are put back afterwards.

    An attribute that the pass sets to something else keeps its new value.
    """
    lent = []
    for name, module in modules.items():
        if not isinstance(module, torch.jit.ScriptModule):
            lent += [(module, key, vars(module)[key], width) for key, width in _widths_of(name, module)]
    try:
        for module, attribute, _, width in lent:
            vars(module)[attribute] = width
        yield
    finally:
        for module, attribute, value, width in lent:
            if vars(module).get(attribute) is width:
                vars(module)[attribute] = value
