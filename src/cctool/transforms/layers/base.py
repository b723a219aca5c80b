"""Layers of ours in the place of an architecture's: the `swap` edit, and what every such layer can do.

A swapped layer computes its ``weight`` from what it stores (coefficients, frequencies). Whatever must see
ordinary layers (coupling channels, counting, exporting) works on a network whose swapped layers are set
aside (`plain.py`); a cut that was planned there is carried over by `SwappedLayer.taken`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, JsonValue
from torch import Tensor, nn

from cctool.base.cache import Cache
from cctool.checkpoint.edits.thin import Cut
from cctool.checkpoint.spec import Edit, ModelSpec
from cctool.graph.execution import hidden

__all__ = ["Swap", "SwapKind", "SwappedLayer", "WeightCache", "swapped_layers", "with_swaps"]


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
