"""The `swap` edit, and the interface of *swapped* layers: our layers in place of an architecture's.

A swapped layer computes its ``weight`` from what it stores (coefficients, frequencies). Whatever needs
ordinary layers (finding coupled channels, counting operations, exporting) works on a *plain* network instead,
which has ordinary layers in their place (`plain.py`); a cut planned there is carried over by
`SwappedLayer.taken`.
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


_Kind = TypeVar("_Kind", bound=nn.Module)


class Swap(Edit):
    """One module that is replaced by one of our layers.

    Attributes:
        layer: name of the layer in the table of swaps.
        arguments: of the layer, validated by its own record.
    """

    kind: Literal["swap"] = "swap"
    layer: str
    arguments: dict[str, JsonValue] = Field(default={})


class WeightCache(Cache[Tensor]):
    """A cache for a computed weight.

    Args:
        keeps: whether to cache at all. Code that traces where tensors come from has to see the computation.
    """

    def __init__(self, *, keeps: bool = True) -> None:
        self._keeps = keeps
        super().__init__()

    def get(self, compute: Callable[[], Tensor], sources: Sequence[Tensor]) -> Tensor:
        """See `Cache`; the computation is hidden from those who follow the network's calls."""
        if not self._keeps:
            return compute()
        # Counters and quantizers should see the layer's own call only, not how its weight is computed.
        with hidden():
            return super().get(compute, sources)


class SwappedLayer(nn.Module):
    """Base of the layers that replace an architecture's layer."""

    @abstractmethod
    def swap(self, module: str) -> Swap:
        """The edit that builds this layer, as it is now, from the architecture's (thinned) layer."""

    @abstractmethod
    def plain(self) -> nn.Module | None:
        """The ordinary layer that computes the same, its weight a new parameter.

        Returns:
            None if there is none, as for layers that compute with complex numbers.
        """

    def factored(self) -> nn.Module | None:
        """Consecutive ordinary layers that compute the same with fewer bytes and products; None if none."""
        return None

    @abstractmethod
    def taken(self, cuts: Mapping[str, Sequence[Cut]]) -> SwappedLayer:
        """This layer after its plain counterpart was cut.

        Args:
            cuts: by the plain layer's own tensor names, ``weight`` and ``bias``.

        Raises:
            TransformError: if this layer cannot be cut like that.
        """


class ComputedLayer(SwappedLayer):
    """A linear layer or convolution whose weight is computed from its own parameters, and cached.

    Attributes:
        ordinary: the class that it replaces.
        kind: its name in the table of swaps.
        arguments: of the edit.
        cache: of the weight.
    """

    ordinary: type[nn.Module]
    kind: str
    arguments: Record
    cache: WeightCache

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight of the equivalent ordinary layer."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and clear the cached weight."""
        self.cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.cache.clear()
        # `to`, `half` and the like would leave the cached weight behind.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def swap(self, module: str) -> Swap:
        """See `SwappedLayer`."""
        return Swap(module=module, layer=self.kind, arguments=self.arguments.model_dump(mode="json"))

    def made_ordinary(self, parameters: Sequence[str], buffers: Sequence[str]) -> nn.Module:
        """The ordinary layer with the present weight as its parameter.

        Args:
            parameters: names of what the weight is computed from; they are removed, with their masks. The
                weight requires a gradient if the first of them does.
            buffers: names of further tensors to remove.
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
        # As in the ordinary layer, whose state dict begins with the weight.
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
                # A group without outputs disappears, and its inputs with it.
                layer.groups = len(torch.unique(cut.keep // (layer.out_channels // layer.groups)))
                layer.out_channels = len(cut.keep)
            elif cut.dim == 1:
                width = len(cut.keep)
        layer.in_channels = width * layer.groups


@dataclass(frozen=True)
class SwapKind:
    """One kind of swapped layer.

    Attributes:
        build: (the architecture's layer, arguments) -> the layer that replaces it. Its parameters are where
            the architecture's are (on the meta device while a file is loaded); their values are assigned
            later. Raises SpecError if the arguments do not fit the layer, before anything is allocated.
        check: raises CorruptCheckpointError if the values from a file contradict the arguments; None checks
            nothing.
    """

    build: Callable[[nn.Module, Mapping[str, Any]], nn.Module]
    check: Callable[[nn.Module], None] | None = None


def swapped_layers(model: nn.Module) -> dict[str, SwappedLayer]:
    """Swapped layers by qualified name, shared ones under their first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SwappedLayer)}


def with_swaps(spec: ModelSpec, model: nn.Module) -> ModelSpec:
    """The spec with the swap edits of ``model`` in place of its former ones.

    Swapped modules that are not a `SwappedLayer` (activations of complex networks) keep their edits.
    """
    layers = swapped_layers(model)
    others = tuple(
        edit for edit in spec.edits if edit.get("kind") != "swap" or edit.get("module") not in layers
    )
    edits = tuple(layer.swap(name) for name, layer in layers.items())
    return spec.model_copy(update={"edits": others}).with_edits(edits)


def remade(layer: nn.Module, kind: type[_Kind]) -> _Kind:
    """A module of another class with everything that ``layer`` holds: hooks, buffers, marks of masks."""
    # Without __init__, which would allocate and initialise a weight. The containers of parameters, buffers
    # and hooks are copied, so that changes to one module do not reach the other.
    made = kind.__new__(kind)
    held = dict(vars(layer))
    containers = {
        key: value.copy()
        for key, value in held.items()
        if key.startswith("_") and isinstance(value, (dict, set))
    }
    vars(made).update(held | containers)
    return made
