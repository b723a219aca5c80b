"""Layers of ours in the place of an architecture's: the `swap` edit, and what every such layer can do.

A swapped layer computes its ``weight`` from what it stores (coefficients, frequencies). Whatever must see
ordinary layers (coupling channels, counting, exporting) works on a network whose swapped layers are set
aside (`plain.py`); a cut that was planned there is carried over by `SwappedLayer.taken`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn

from cctool.base.cache import Cache
from cctool.checkpoint.edits.mask import drop_masks, mask_name, masks_of
from cctool.checkpoint.edits.thin import Cut
from cctool.checkpoint.spec import Edit, ModelSpec, Record
from cctool.graph.execution import hidden

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ComputedLayer",
    "Swap",
    "SwapKind",
    "SwappedLayer",
    "WeightCache",
    "remade",
    "swapped_layers",
    "with_swaps",
]

_Kind = TypeVar("_Kind", bound=nn.Module)


class Swap(Edit):
    """One module that is replaced by a layer of ours.

    Attributes:
        layer: name of the layer in the table of swaps.
        arguments: of the layer, validated by its own record.
    """

    kind: Literal["swap"] = "swap"
    layer: str
    arguments: dict[str, JsonValue] = Field(default={})


class WeightCache(Cache[Tensor]):
    """Holds a computed weight.

    Args:
        keeps: whether a weight is kept at all; whoever follows where tensors come from must see it made.
    """

    def __init__(self, *, keeps: bool = True) -> None:
        self._keeps = keeps
        super().__init__()

    def get(self, compute: Callable[[], Tensor], sources: Sequence[Tensor]) -> Tensor:
        """See `Cache`; making a weight is hidden from whoever watches the network's calls."""
        if not self._keeps:
            return compute()
        # How a weight is made is no business of whoever counts or quantizes the layer's own calls.
        with hidden():
            return super().get(compute, sources)


class SwappedLayer(nn.Module):
    """Base of the layers that take an architecture's layer's place."""

    @abstractmethod
    def swap(self, module: str) -> Swap:
        """The edit that makes this layer, as it is now, out of the architecture's (thinned) layer."""

    @abstractmethod
    def plain(self) -> nn.Module | None:
        """The ordinary layer that computes the same, its weight a new parameter.

        Returns:
            None where there is none, as for layers that compute with complex numbers.
        """

    def factored(self) -> nn.Module | None:
        """Ordinary layers one after the other that compute the same with fewer bytes and products.

        Returns:
            None where there are none.
        """
        return None

    @abstractmethod
    def taken(self, cuts: Mapping[str, Sequence[Cut]]) -> SwappedLayer:
        """What is left of this layer once its plain one was cut.

        Args:
            cuts: of the plain layer's tensors by their own names, ``weight`` and ``bias``.

        Raises:
            TransformError: if this layer cannot be cut so.
        """


class ComputedLayer(SwappedLayer):
    """A linear layer or convolution whose weight is computed from parameters of its own, and kept.

    Attributes:
        ordinary: the class whose place it takes.
        kind: its name in the table of swaps.
        arguments: those of the edit.
        cache: holds the weight.
    """

    ordinary: type[nn.Module]
    kind: str
    arguments: Record
    cache: WeightCache

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight that the ordinary layer would hold."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget the weight that was computed last."""
        self.cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.cache.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def swap(self, module: str) -> Swap:
        """See `SwappedLayer`."""
        return Swap(module=module, layer=self.kind, arguments=self.arguments.model_dump(mode="json"))

    def made_ordinary(self, parameters: Sequence[str], buffers: Sequence[str]) -> nn.Module:
        """The ordinary layer with the present weight as its parameter, trained as the first of these are.

        Args:
            parameters: names of what the weight is made of, which go with their masks.
            buffers: names of further tensors that go.
        """
        layer, trained = remade(self, self.ordinary), self.get_parameter(parameters[0]).requires_grad
        held = vars(layer)
        del held["arguments"], held["cache"]
        for name in parameters:
            if name in masks_of(layer):
                drop_masks(layer, [name])
            del layer._parameters[name]
        for name in buffers:
            layer._buffers.pop(name, None)
        weight = nn.Parameter(self.weight.detach().clone(), requires_grad=trained)
        # In the order of the ordinary layer, whose state dict begins with the weight.
        layer._parameters = {"weight": weight, **layer._parameters}
        return layer

    def keep_rows(self, name: str, keep: Tensor, dim: int = 0) -> None:
        """Keep some indices of one dim of a parameter and of its mask."""
        parameter = self.get_parameter(name)
        kept = parameter.detach().index_select(dim, keep.to(parameter.device))
        self._parameters[name] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
        mask = self._buffers.get(mask_name(name))
        if mask is not None:
            self._buffers[mask_name(name)] = mask.index_select(dim, keep.to(mask.device))

    def fit_attributes(self, cuts: Sequence[Cut]) -> None:
        """Set the attributes that hold widths after the weight was cut."""
        layer = cast(Any, self)
        if not isinstance(layer, nn.Conv2d):
            for cut in cuts:
                setattr(layer, ("out_features", "in_features")[cut.dim], len(cut.keep))
            return
        width = layer.in_channels // layer.groups
        for cut in cuts:
            if cut.dim == 0:
                # A group whose outputs are all gone is gone with its inputs.
                layer.groups = len(torch.unique(cut.keep // (layer.out_channels // layer.groups)))
                layer.out_channels = len(cut.keep)
            elif cut.dim == 1:
                width = len(cut.keep)
        layer.in_channels = width * layer.groups


@dataclass(frozen=True)
class SwapKind:
    """One kind of swapped layer.

    Attributes:
        build: (the architecture's layer, arguments) -> the layer in its place, its parameters where those of
            the architecture's are (the meta device while a file is loaded), their values to be assigned.
            Raises SpecError where the arguments do not fit the layer, before anything is allocated.
        check: raises CorruptCheckpointError where the values that a file gave the layer contradict its
            arguments; None checks nothing.
    """

    build: Callable[[nn.Module, Mapping[str, Any]], nn.Module]
    check: Callable[[nn.Module], None] | None = None


def swapped_layers(model: nn.Module) -> dict[str, SwappedLayer]:
    """Swapped layers by qualified name, shared ones under their first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SwappedLayer)}


def with_swaps(spec: ModelSpec, model: nn.Module) -> ModelSpec:
    """The spec whose swap edits are those of ``model``, whatever it said of swaps before.

    Swapped modules that are no `SwappedLayer` (activations of complex networks) keep their edits.
    """
    layers = swapped_layers(model)
    others = tuple(
        edit for edit in spec.edits if edit.get("kind") != "swap" or edit.get("module") not in layers
    )
    edits = tuple(layer.swap(name) for name, layer in layers.items())
    return spec.model_copy(update={"edits": others}).with_edits(edits)


def remade(layer: nn.Module, kind: type[_Kind]) -> _Kind:
    """A module of another class with all that a layer holds: hooks, buffers, marks of masks."""
    made = kind.__new__(kind)
    held = dict(vars(layer))
    containers = {
        key: value.copy()
        for key, value in held.items()
        if key.startswith("_") and isinstance(value, (dict, set))
    }
    vars(made).update(held | containers)
    return made
