"""The result of coupling channels: families of units, frozen dims, and calls that depend on widths."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cctool.graph.ledger import Kind, Role


@dataclass(frozen=True)
class Place:
    """The indices that a family owns in one dim of one tensor.

    Attributes:
        tensor: qualified name of a parameter or buffer.
        dim: the dim that is cut.
        indices: row u holds the indices that unit u owns; shape [units, indices per unit].
        role: what the tensor does for the unit.
    """

    tensor: str
    dim: int
    indices: Tensor
    role: Role


@dataclass(frozen=True)
class Family:
    """Units (channels that are cut as one) that touch the same dims of the same tensors.

    For `conv1 (3 -> 8), bn1, conv2 (8 -> 5)` there is one family, "conv1", of 8 units with the places
    conv1.weight dim 0, bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var dim 0, conv2.weight dim 1.

    Attributes:
        name: the first module that produces the channels.
        labels: number of each unit in the whole graph; shape [units].
        places: every place that the units touch.
    """

    name: str
    labels: Tensor
    places: tuple[Place, ...]

    @property
    def units(self) -> int:
        """Number of units."""
        return self.labels.numel()

    @property
    def width(self) -> int:
        """Number of output channels of its first layer in one unit."""
        return self.places[0].indices.shape[1]


@dataclass(frozen=True)
class Frozen:
    """A parameter's dim of which some indices cannot be cut.

    Attributes:
        parameter: qualified name of the parameter or buffer.
        dim: the dim.
        indices: number of frozen indices.
        of: size of the dim.
        op: function that froze them.
        module: the module that called it, "" for the root.
        reason: why.
    """

    parameter: str
    dim: int
    indices: int
    of: int
    op: str
    module: str
    reason: str


@dataclass(frozen=True)
class Labelled:
    """A tensor's dim, or a module's integer attribute: index i is cut when unit `labels[i]` is."""

    name: str
    key: int | str
    labels: Tensor
    index: int | None = None


@dataclass(frozen=True)
class Statistic:
    """A call whose result depends on how many channels are kept.

    Zeroing channels does not change their number. So the cut network equals a masked one only if these calls
    are computed over the kept channels there, too.

    Attributes:
        op: function that was called.
        ordinal: how many calls of that function came before it in the forward pass.
        module: the module that called it, "" for the root.
        kind: how it depends.
        place: channel dim of its first tensor; for a factor its position or keyword among the arguments.
        widths: (labels of the channels, exponent) of each width that it depends on.
        families: names of the families that those channels belong to.
        reason: the same for a report.
    """

    op: str
    ordinal: int
    module: str
    kind: Kind
    place: int | str
    widths: tuple[tuple[Tensor, float], ...]
    families: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class ChannelGraph:
    """What can be cut, and what cannot.

    Attributes:
        families: in the order of the forward pass; a family always keeps at least one unit.
        frozen: every parameter dim with indices that cannot be cut, and why.
        tensors: labels of each bound dim of each tensor (`key` is the dim).
        attributes: labels of the channels that each integer attribute counts (`key` is its name).
        label_count: labels are below this.
        statistics: calls that depend on how many channels are kept, in the order of the forward pass.
    """

    families: tuple[Family, ...]
    frozen: tuple[Frozen, ...]
    tensors: tuple[Labelled, ...]
    attributes: tuple[Labelled, ...]
    label_count: int = field(default=0)
    statistics: tuple[Statistic, ...] = ()
