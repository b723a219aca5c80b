"""What the traced pass writes down: channel ids of activations, and what ties, binds or freezes them.

Every output channel of a layer has an id. Each activation has a tensor of ids of its own shape, with stride 0
along the dims where the id does not vary: those are *neutral*, the others *varying*. Two ids that must be cut
together are *tied*; a parameter's dim is *bound* to the ids of the channels that its indices belong to; ids
that cannot be cut are *frozen* with a reason. `solution.py` solves for the units.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from cctool.graph.widths import Powers, Symbol, Width

FIXED = 0
"""Id of channels that are never cut: constants, results of operations without a rule."""
INPUT = 1
"""Id of the model's inputs."""

_MAXIMUM_ELEMENTS = 1 << 22  # a larger parameter used as an activation would cost more ids than it is worth


class Role(str, Enum):
    """What the indices of a parameter are to the unit that owns them."""

    FILTER = "filter"  # weights that produce the channel
    BIAS = "bias"
    SCALE = "scale"  # batch norm's gamma
    SHIFT = "shift"  # batch norm's beta
    STATISTIC = "statistic"  # running mean and variance
    NORM = "norm"  # weight and bias of group and layer norm
    CONSUMER = "consumer"  # weights that read the channel
    ELEMENT = "element"  # a parameter used elementwise


@dataclass(frozen=True)
class Binding:
    """Index i of `dim` of the tensor belongs to channel `ids[i]`."""

    tensor: str
    dim: int
    ids: Tensor
    role: Role


@dataclass(frozen=True)
class Elements:
    """A parameter used as an activation: its element i (row-major) has the id `ids[i]`."""

    tensor: str
    shape: tuple[int, ...]
    ids: Tensor


@dataclass(frozen=True)
class AttributeBinding:
    """A module's integer attribute (or entry `index` of a tuple) that counts the channels in `ids`."""

    module: str
    attribute: str
    index: int | None
    ids: Tensor


@dataclass(frozen=True)
class Freeze:
    """Ids that cannot be cut, the number of the call that froze them, and why."""

    ids: Tensor
    call: int
    reason: str


class Kind(str, Enum):
    """How a call depends on the number of channels."""

    KEPT = "kept"  # it runs over the channels, after a cut over the kept ones
    SUM = "sum"  # it runs over the channels, but those that are 0 add nothing
    SCALE = "scale"  # attention divides by the square root of the width of the queries
    FACTOR = "factor"  # one of its arguments was computed from the width


@dataclass(frozen=True)
class StatisticEntry:
    """A call whose result depends on how many channels there are.

    Attributes:
        call: its number in `Ledger.calls`.
        ordinal: how many calls of the same function came before it in the pass.
        kind: how it depends.
        place: channel dim of its first tensor; for a factor its position or keyword among the arguments.
        powers: the widths that it depends on, with their exponents.
        reason: the same for a report.
    """

    call: int
    ordinal: int
    kind: Kind
    place: int | str
    powers: Powers
    reason: str


@dataclass(frozen=True)
class EqualWidth:
    """The code needs as many channels in `ids` as in `others`, or a fixed multiple or fraction of them."""

    ids: Tensor
    others: Tensor
    call: int


def varying(ids: Tensor) -> list[int]:
    """Dims along which ids differ: by construction those with a stride."""
    return [dim for dim, stride in enumerate(ids.stride()) if stride and ids.shape[dim] > 1]


def compact(ids: Tensor) -> Tensor:
    """The same ids with size 1 along neutral dims."""
    shape = [size if stride else 1 for size, stride in zip(ids.shape, ids.stride(), strict=True)]
    return ids.as_strided(shape, ids.stride(), ids.storage_offset())


def canonical_ids(ids: Tensor) -> Tensor:
    """The same ids with stride 0 along every dim where they do not differ."""
    # Compared on the compact form: the expanded one may have as many elements as the activation.
    small = compact(ids)
    for dim in varying(small):
        first = small.narrow(dim, 0, 1)
        if torch.equal(first.expand_as(small), small):
            small = first
    return small.expand(ids.shape)


def _repeated(ids: Tensor, count: int) -> Tensor | None:
    """The `count` channels of which `ids` is made, each repeated equally often in runs or in turn; else None.

    >>> _repeated(torch.tensor([7, 7, 8, 8]), 2).tolist(), _repeated(torch.tensor([7, 8, 7, 8]), 2).tolist()
    ([7, 8], [7, 8])
    """
    for table in (ids.reshape(count, -1), ids.reshape(-1, count).T):
        if torch.equal(table, table[:, :1].expand_as(table)):
            return table[:, 0]
    return None


class Ledger:
    """Ids, ties, bindings and freezes of one model, filled call by call.

    With `exact`, widths over which statistics run are frozen instead of noted. With `heads`, channels that
    are split into heads are cut by whole heads, else the same positions in each head.
    """

    def __init__(self, model: nn.Module, exact: bool = False, heads: bool = False) -> None:
        self.model = model
        self.exact = exact
        self.heads = heads
        self.ordinals: Counter[str] = Counter()
        self.statistics: list[StatisticEntry] = []
        self.equal_widths: list[EqualWidth] = []
        self.modules = dict(model.named_modules())
        self.names = {id(tensor): name for name, tensor in model.named_buffers()}
        self.names.update({id(tensor): name for name, tensor in model.named_parameters()})
        self.count = INPUT + 1
        self.calls: list[tuple[str, str]] = []
        self.ties: list[tuple[Tensor, Tensor, int]] = []
        self.freezes: list[Freeze] = []
        self.bindings: dict[tuple[str, int], Binding] = {}
        self.elements: dict[str, Elements] = {}
        self.attributes: dict[tuple[str, str, int | None], AttributeBinding] = {}
        # Weak, because Python reuses the `id` of a freed tensor, and the pass should not keep activations.
        self._ids: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._turned: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        # Tensors held as ordinary attributes: neither parameters nor activations of unknown origin.
        self._constants = {
            id(value)
            for module in self.modules.values()
            for value in vars(module).values()
            if isinstance(value, Tensor)
        }

    # ---- calls -----------------------------------------------------------------------------------------
    def begin(self, function: str, module: str) -> None:
        """Start a call: ties and freezes that follow are recorded under its number."""
        self.calls.append((function, module))
        self.ordinals[function] += 1

    @property
    def call(self) -> int:
        """Number of the current call."""
        return len(self.calls) - 1

    # ---- ids of tensors --------------------------------------------------------------------------------
    def new(self, size: int) -> Tensor:
        """Fresh ids."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def set(self, tensor: Tensor, ids: Tensor) -> None:
        """Set the ids of an activation."""
        self._ids[id(tensor)] = (weakref.ref(tensor), ids)

    def known(self, tensor: Tensor) -> bool:
        """Whether this very tensor has ids."""
        entry = self._ids.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Ids of a tensor; parameters get one per element, an unknown tensor freezes all ids so far."""
        if self.known(tensor):
            return self._ids[id(tensor)][1]
        name = self.names.get(id(tensor))
        if name is not None:
            return self._element_ids(tensor, name)
        if id(tensor) not in self._constants and tensor.ndim:
            reason = "an activation of unknown origin (scripted or opaque code) may depend on any channel"
            self.freezes.append(Freeze(torch.arange(INPUT + 1, self.count), self.call, reason))
            self.set(tensor, constant_ids(FIXED, tensor.shape))
        return constant_ids(FIXED, tensor.shape)

    def _element_ids(self, tensor: Tensor, name: str) -> Tensor:
        # A single number belongs to no channel.
        if tensor.numel() == 1 or tensor.numel() > _MAXIMUM_ELEMENTS:
            self.pin(tensor)
            return constant_ids(FIXED, tensor.shape)
        if name not in self.elements:
            shape = tuple(tensor.shape)
            self.elements[name] = Elements(name, shape, self.new(tensor.numel()))
            for dim, _ in enumerate(shape):
                if (name, dim) in self.bindings:
                    self.freeze(self.elements[name].ids, "a parameter both of a layer and used elementwise")
                    self.freeze(self.bindings[name, dim].ids, "a parameter of a layer also used elementwise")
        return canonical_ids(self.elements[name].ids.view(tensor.shape))

    def turn(self, tensor: Tensor, name: str) -> None:
        """Remember that a tensor is the transpose of a matrix parameter."""
        self._turned[id(tensor)] = (weakref.ref(tensor), name)

    def turned(self, tensor: Tensor) -> str | None:
        """Name of the matrix parameter whose transpose this is."""
        entry = self._turned.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def name(self, tensor: Tensor | None) -> str | None:
        """Qualified name of a parameter or buffer."""
        return None if tensor is None else self.names.get(id(tensor))

    # ---- widths ----------------------------------------------------------------------------------------
    def sizes(self, tensor: Tensor, result: Any) -> Any:
        """What the model sees of a tensor's sizes: the number of channels as a `Width`, the rest as is."""
        if not isinstance(tensor, Tensor) or not self.known(tensor):
            return result
        ids = self._ids[id(tensor)][1]
        moving = varying(ids)
        if len(moving) != 1:
            return result
        (dim,), channels = moving, compact(ids).reshape(-1)
        if int(channels.max()) <= INPUT:
            return result
        width = Width(ids.shape[dim], {Symbol(self, ids.shape[dim], channels): 1})
        if isinstance(result, tuple):
            return torch.Size([width if d == dim else size for d, size in enumerate(result)])
        return width if result == width else result

    def sized(self, ids: Tensor, width: Width) -> bool:
        """Record that the code sizes these channels by a width: that of other channels, or an attribute.

        Returns:
            Whether the width will be right after a cut.
        """
        ids = ids.reshape(-1)
        channels = [(s, e) for s, e in width.powers.items() if s.ids is not None]
        attributes = [s for s, e in width.powers.items() if s.ids is None and e == 1]
        if any(symbol.book is not self for symbol in width.powers):
            return False
        if channels:
            (symbol, exponent), *others = channels
            if exponent != 1 or others or symbol.ids is None:
                return False
            self.same_width(ids, symbol.ids)
            return True
        return len(attributes) == 1 and self._held(attributes[0], ids)

    def _held(self, symbol: Symbol, ids: Tensor) -> bool:
        """Record that an attribute holds the number of these channels, or a multiple or fraction of it."""
        value, size = symbol.value, ids.numel()
        if value % size and size % value:
            return False
        counted = ids.repeat(value // size) if value >= size else _repeated(ids, value)
        if counted is None:
            counted = ids[:value]
            self.same_width(ids, counted)
        key = (symbol.module, symbol.attribute, symbol.index)
        existing = self.attributes.get(key)
        if existing is None:
            self.count_in(symbol.module, symbol.attribute, counted, symbol.index)
        elif not torch.equal(existing.ids, counted):
            self.same_width(existing.ids, counted)
        return True

    def same_width(self, ids: Tensor, others: Tensor) -> None:
        """Require the ratio of these two numbers of channels to stay what it is."""
        self.equal_widths.append(EqualWidth(ids.reshape(-1), others.reshape(-1), self.call))

    def statistic(self, kind: Kind, place: int | str, powers: Powers, reason: str) -> None:
        """Note that the current call's result depends on how many channels there are."""
        ordinal = self.ordinals[self.calls[-1][0]] - 1
        self.statistics.append(StatisticEntry(self.call, ordinal, kind, place, powers, reason))

    # ---- what the ids mean -----------------------------------------------------------------------------
    def tie(self, a: Tensor, b: Tensor) -> None:
        """Ids at the same position (after broadcasting) must be cut together."""
        if a is not b:
            shape = torch.Size(max(n, m) for n, m in zip(a.shape, b.shape, strict=True))
            self.ties.append((a.expand(shape).reshape(-1), b.expand(shape).reshape(-1), self.call))

    def freeze(self, ids: Tensor, reason: str) -> None:
        """These ids cannot be cut."""
        flat = compact(ids).reshape(-1)
        # The ids of constants and inputs are fixed already.
        if flat.numel() > 1 or int(flat[0]) > INPUT:
            self.freezes.append(Freeze(flat, self.call, reason))

    def bind(self, tensor: Tensor | None, dim: int, ids: Tensor, role: Role) -> None:
        """The indices of a parameter's or buffer's dim belong to these ids; None is passed over."""
        name = self.name(tensor)
        if name is None:
            if tensor is not None:
                self._bind_computed(tensor, dim, ids)
            return
        existing = self.bindings.get((name, dim))
        if name in self.elements:
            self.freeze(ids, "a parameter of a layer also used elementwise")
            self.freeze(self.elements[name].ids, "a parameter both of a layer and used elementwise")
        if existing is not None:
            self.tie(existing.ids, ids)
        else:
            self.bindings[name, dim] = Binding(name, dim, ids.reshape(-1), role)

    def _bind_computed(self, tensor: Tensor, dim: int, ids: Tensor) -> None:
        """A bias computed from a parameter can be cut if its own ids vary in this dim alone."""
        own = self.of(tensor)
        if varying(own) == [dim]:
            self.tie(compact(own).reshape(-1), ids.reshape(-1))
        else:
            self.freeze(ids, "a weight computed on the fly, not a parameter, has this width")
            self.freeze(own, "a weight is computed from it on the fly")

    def produce(self, tensor: Tensor, dim: int, size: int) -> Tensor:
        """Ids of a layer's outputs: new ones, or those of an earlier call of a shared layer."""
        existing = self.bindings.get((self.names.get(id(tensor), ""), dim))
        return self.new(size) if existing is None else existing.ids

    def count_in(self, module: str, attribute: str, ids: Tensor, index: int | None = None) -> None:
        """If a module's integer attribute has the number of these channels as its value, it counts them."""
        value = getattr(self.modules.get(module), attribute, None)
        if index is not None:
            value = value[index] if isinstance(value, (tuple, list)) and len(value) > index else None
        # An attribute of another value counts something else, whatever its name.
        if isinstance(value, int) and not isinstance(value, bool) and value == ids.numel():
            key = (module, attribute, index)
            existing = self.attributes.get(key)
            if existing is None:
                # Also called while the model compares widths: a reshape there would be traced as its call.
                flat = ids if ids.ndim == 1 else ids.reshape(-1)
                self.attributes[key] = AttributeBinding(module, attribute, index, flat)
            elif not torch.equal(existing.ids, ids.reshape(-1)):
                self.same_width(existing.ids, ids)

    def pin(self, tensor: Tensor) -> None:
        """No dim of this parameter can be cut."""
        for dim, size in enumerate(tensor.shape):
            self.bind(tensor, dim, torch.full((size,), FIXED), Role.ELEMENT)


def constant_ids(value: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Ids that vary nowhere."""
    return torch.tensor(value).expand(shape)
