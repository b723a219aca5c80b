"""Layers that other things are folded into, and what one fold does to a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cctool.base.networks import qualified
from cctool.checkpoint.edits.fold import Fold, apply_fold
from cctool.checkpoint.edits.mask import masked_places
from cctool.graph.trace import argument
from cctool.transforms.fold.passes import LAYERS, TracedCall, TracedPass


@dataclass(frozen=True)
class TakingLayer:
    """A convolution or linear layer whose weight is a parameter of its own.

    Attributes:
        name: of the module.
        module: that owns the weight and calls the function.
        calls: numbers of its calls in the pass.
        masked: its parameters that have a mask.
    """

    name: str
    module: nn.Module
    calls: tuple[int, ...]
    masked: frozenset[str]

    @property
    def takes_bias(self) -> bool:
        """Whether a shift can be added: it has a bias without a mask, or its forward would use one."""
        if self.module._parameters.get("bias") is not None:
            return "bias" not in self.masked
        return isinstance(self.module, (nn.Linear, _ConvNd)) and "bias" in self.module._parameters


@dataclass(frozen=True)
class Candidate:
    """One fold that can be tried.

    Attributes:
        layer: name of the module that gets the values.
        what: is folded into it, in words.
        modules: that are gone or empty afterwards.
        change: carries it out on a network, and returns edits and the values of the tensors that it set.
    """

    layer: str
    what: tuple[str, ...]
    modules: tuple[str, ...]
    change: Callable[[nn.Module], tuple[Sequence[Fold], dict[str, Tensor]]]


@dataclass(frozen=True)
class Stays:
    """A module that is not folded, and why."""

    name: str
    reason: str


def layer_at(model: nn.Module, recorded: TracedPass, number: int) -> TakingLayer | str:
    """The layer that a call belongs to, or why its weight cannot take a fold."""
    call = recorded.calls[number]
    if call.function not in LAYERS:
        return f"{call.function} takes no fold"
    weight = recorded.name_of(call, "weight")
    if weight is None or weight not in {name for name, _ in model.named_parameters()}:
        return f"the code of {call.module or 'the network'} computes the weight of its {call.function}"
    owner, _, leaf = weight.rpartition(".")
    module = model.get_submodule(owner)
    if owner != call.module or leaf != "weight":
        return f"{call.module or 'the network'} calls {call.function} with {weight}, which is not its own"
    if not module.get_parameter("weight").is_floating_point():
        return f"{weight} is no floating-point tensor"
    bias = argument(call.event, "bias")
    if bias is not None and bias is not module._parameters.get("bias"):
        return f"the code of {owner} computes its bias"
    for parameter in module._parameters.values():
        sharing = [name for name in recorded.owners.get(id(parameter), ()) if name != owner]
        if sharing:
            return f"{owner} shares a parameter with {sharing[0]}"
    calls = recorded.takers[weight]
    foreign = [
        n for n in calls if (recorded.calls[n].module, recorded.calls[n].function) != (owner, call.function)
    ]
    if foreign:
        return f"{recorded.calls[foreign[0]].function} takes {weight}, too"
    return TakingLayer(
        owner,
        module,
        calls,
        frozenset(place.leaf for place in masked_places(module) if place.module is module),
    )


def near(name: str, layer: str) -> str:
    """A module's name without what it shares with a layer's, the last part excepted.

    >>> near("stem.bn", "stem.conv"), near("bn1", "conv1")
    ('bn', 'bn1')
    """
    parts, others = name.split("."), layer.split(".")
    shared = 0
    while shared < min(len(parts), len(others)) - 1 and parts[shared] == others[shared]:
        shared += 1
    return ".".join(parts[shared:])


def whole_module(recorded: TracedPass, name: str, call: TracedCall, number: int) -> bool:
    """Whether a call is all that a module does in its only execution."""
    entries = recorded.entries.get(name, ())
    own = [other for other in recorded.calls if other.module == name]
    return (
        own == [call]
        and len(entries) == 1
        and entries[0].given == call.sources[0]
        and entries[0].returned == number
    )


@torch.no_grad()
def carry_out(model: nn.Module, edits: Sequence[Fold], values: dict[str, Tensor]) -> None:
    """Apply edits to a network, and give tensors their values in the types that they have."""
    for edit in edits:
        apply_fold(model, edit)
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


def set_layer(
    model: nn.Module, name: str, weight: Tensor, bias: Tensor | None
) -> tuple[Fold, dict[str, Tensor]]:
    """Edit and values that give a layer a weight of its present shape, and a bias if there is one."""
    layer = model.get_submodule(name)
    values = {qualified(name, "weight"): weight}
    if bias is not None:
        values[qualified(name, "bias")] = bias
    fresh = bias is not None and layer._parameters.get("bias") is None
    return Fold(module=name, bias=fresh), values


def weight_and_bias(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer in float64."""
    layer = model.get_submodule(name)
    bias = layer._parameters.get("bias")
    return layer.get_parameter("weight").detach().double(), None if bias is None else bias.detach().double()
