"""Cross-layer equalization: gives each channel the same range of weights in two consecutive layers.

M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section
4.1. If f(s x) = s f(x) for all s > 0, channel i of the first layer may be divided by s_i and multiplied by it
in the second. The network computes the same, but one scale for the tensor suits all channels better.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cctool.quantization.network.attach import norm_factors
from cctool.quantization.network.calls import COMPUTING, Flow, FlowCall
from cctool.quantization.network.placement import Left, PlacedLayer, plan_points

_HOMOGENEOUS = frozenset(
    {"relu", "leaky_relu", "prelu", "rrelu", "contiguous", "clone", "detach"}
    | {"dropout", "dropout1d", "dropout2d", "dropout3d"}
)
"""Functions with f(s x) = s f(x) for s > 0 that do not move channels."""
_POOLS = frozenset(
    f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp") for n in (1, 2, 3)
)
_RESHAPES = frozenset({"flatten", "view", "reshape"})
_MOST_ROUNDS = 100
_CONVERGED = 1e-3
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Pair:
    """Two layers, the second of which takes the channels of the first.

    Attributes:
        first: the layer whose output channels are divided.
        second: the layer whose input channels are multiplied.
        repeat: number of input features of the second for each channel of the first.
    """

    first: PlacedLayer
    second: PlacedLayer
    repeat: int

    @property
    def title(self) -> str:
        """For reports."""
        return f"{self.first.place.title} -> {self.second.place.title}"


@dataclass(frozen=True)
class EqualizeReport:
    """What was equalized.

    Attributes:
        pairs: titles of the pairs of layers.
        skipped: layers that are the first of no pair, and why; without those followed by the network's output
            only.
        rounds: number of iterations over all pairs.
        largest: the largest factor that a channel was multiplied or divided by; 1 without pairs.
    """

    pairs: tuple[str, ...]
    skipped: tuple[Left, ...]
    rounds: int
    largest: float


class _NoPairError(Exception):
    """Says why no pair begins at a layer."""


@torch.no_grad()
def equalize(model: nn.Module, flow: Flow) -> EqualizeReport:
    """Equalize ranges of channels across layers, in place.

    With r1_i and r2_i the ranges of channel i's weights in the two layers, each times the factors of its
    batch norm in evaluation mode, s_i = sqrt(r1_i r2_i) / r2_i (eq. 11). The first layer's weight and bias,
    or gamma and beta of the batch norm behind it, are divided by s_i, and the second's weights are
    multiplied. This is repeated over all pairs until no factor differs from 1 by more than a thousandth, so
    that chains of layers, such as those around a depthwise convolution, reach the same range, too. Channels
    whose range is 0, or below a millionth of their layer's, are not changed.

    Args:
        model: floating point, without quantizers.
        flow: of it.
    """
    pairs, skipped = find_pairs(model, flow)
    repeats = {pair.second.place: pair.repeat for pair in pairs}
    layers = {layer.place: layer for pair in pairs for layer in (pair.first, pair.second)}
    strengths = {
        place: _strengths(model, flow, layer, repeats.get(place, 1)) for place, layer in layers.items()
    }
    gains = [torch.ones((), device=strengths[pair.first.place].device) for pair in pairs]
    rounds, change = 0, float("inf")
    while pairs and rounds < _MOST_ROUNDS and change >= _CONVERGED:
        rounds += 1
        change = 0.0
        for number, pair in enumerate(pairs):
            factors = _equalized(strengths[pair.first.place], strengths[pair.second.place])
            gains[number] = gains[number] * factors
            change = max(change, _magnitude(factors))
    for pair, gain in zip(pairs, gains, strict=True):
        _divide(model, flow, pair.first, gain)
        _multiply(model, flow, pair.second, gain.repeat_interleave(pair.repeat))
    largest = math.exp(max(map(_magnitude, gains), default=0.0))
    return EqualizeReport(tuple(pair.title for pair in pairs), skipped, rounds, largest)


def find_pairs(model: nn.Module, flow: Flow) -> tuple[tuple[Pair, ...], tuple[Left, ...]]:
    """Pairs of layers that can be equalized, and the layers that begin none, with the reason."""
    finder = _Finder(model, flow)
    found = [finder.pair_or_reason(layer) for layer in finder.layers.values()]
    return (
        tuple(pair for pair in found if isinstance(pair, Pair)),
        tuple(left for left in found if isinstance(left, Left)),
    )


class _Finder:
    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self.flow = flow
        self.layers = {layer.place: layer for layer in plan_points(flow, "none").layers}
        self.parameters = dict(model.named_parameters())
        self.uses = Counter(name for call in flow.calls for name in call.tensors.values())
        self.numbers = {call.place: number for number, call in enumerate(flow.calls)}

    def pair_or_reason(self, layer: PlacedLayer) -> Pair | Left | None:
        """The pair that a layer begins, or why there is none; None if only the output follows."""
        try:
            return self._pair(layer)
        except _NoPairError as error:
            return Left(layer.place.title, str(error))

    def _pair(self, layer: PlacedLayer) -> Pair | None:
        number = self.numbers[layer.place]
        call = self.flow.calls[number]
        if number in self.flow.outputs and not call.users:
            return None
        self._check_first(call, layer)
        shape, repeat = call.shape, 1
        if layer.norm is not None:
            number = call.users[0]
        while True:
            user = self._user(number)
            if user is None:
                return None
            follower = self.flow.calls[user]
            if follower.place.function in COMPUTING and (follower.kernel or follower.bias):
                raise _NoPairError(f"the weight or the bias of {follower.place.title} is computed")
            if len(follower.sources) != 1:
                raise _NoPairError(f"its result goes into {follower.place.function} with another")
            if follower.place.function in COMPUTING:
                break
            repeat *= _spread(follower, shape)
            number, shape = user, follower.shape
        second = self.layers.get(follower.place)
        if second is None:
            raise _NoPairError(f"{follower.place.title} is no layer with a weight of its own")
        self._check_tensor(follower, "weight", follower.place.title)
        if len(follower.shape) != _dims(follower):
            raise _NoPairError(f"{follower.place.title} takes in other dimensions than images and channels")
        return Pair(layer, second, repeat)

    def _user(self, number: int) -> int | None:
        """The only call that takes a result; None at the network's output."""
        users = self.flow.calls[number].users
        if not users and number in self.flow.outputs:
            return None
        if len(users) != 1 or number in self.flow.outputs:
            raise _NoPairError("its result is used more than once")
        return users[0]

    def _check_first(self, call: FlowCall, layer: PlacedLayer) -> None:
        if len(call.shape) != _dims(call):
            raise _NoPairError("what it puts out has other dimensions than images and channels")
        if len(call.sources) != 1:
            raise _NoPairError("its weight or its bias is computed")
        self._check_tensor(call, "weight", "it")
        if "bias" in call.tensors:
            self._check_tensor(call, "bias", "it")
        if layer.norm is not None:
            norm = self.flow.calls[call.users[0]]
            for name in ("weight", "bias"):
                if name not in norm.tensors:
                    raise _NoPairError(
                        f"the batch norm {layer.norm} has no scale and shift to take the factor"
                    )
                self._check_tensor(norm, name, layer.norm)

    def _check_tensor(self, call: FlowCall, argument: str, owner: str) -> None:
        name = call.tensors.get(argument)
        if name is None or name not in self.parameters:
            raise _NoPairError(f"the {argument} of {owner} is computed")
        if self.uses[name] > 1:
            raise _NoPairError(f"{name} is used {self.uses[name]} times")


def _dims(call: FlowCall) -> int:
    """Dimensions of a layer's result whose first two are images and channels."""
    return 2 if call.place.function == "linear" else 2 + int(call.place.function[-2])


def _spread(call: FlowCall, before: Sequence[int]) -> int:
    """How many features a channel becomes in a call; an error if its factor does not pass through."""
    name, after = call.place.function, call.shape
    if name in _HOMOGENEOUS and after == before:
        return 1
    if name in _POOLS and len(before) > 2 and after[:2] == before[:2]:
        return 1
    if name in _RESHAPES and after == (before[0], math.prod(before[1:])):
        return math.prod(before[2:])
    if name == "mean" and _only_places(call, len(before)):
        return 1
    raise _NoPairError(f"its result passes through {name}, where f(s x) is not s f(x) for each channel")


def _only_places(call: FlowCall, dims: int) -> bool:
    """Whether a mean runs over neither images nor channels."""
    given = call.settings.get("dim")
    over = given if isinstance(given, (tuple, list)) else [given]
    return all(isinstance(dim, int) and dim % dims > 1 for dim in over)


def _equalized(first: Tensor, second: Tensor) -> Tensor:
    """Equalize the strengths of two layers in place; returns the factors s, float32 (C,)."""
    made, taken = first.amax(2).reshape(-1), second.amax(1).reshape(-1)
    # s = sqrt(r1 r2) / r2, written so that nothing overflows or underflows.
    factors = torch.sqrt(made) / torch.sqrt(taken)
    # Dead channels would get factors near 0 or infinity.
    kept = (made > _NEGLIGIBLE * made.amax()) & (taken > _NEGLIGIBLE * taken.amax())
    factors = torch.where(kept, factors, torch.ones_like(factors))
    first.div_(factors.reshape(*first.shape[:2], 1))
    second.mul_(factors.reshape(len(second), 1, -1))
    return factors


def _magnitude(factors: Tensor) -> float:
    """The largest distance of a factor from 1, as a logarithm."""
    return float(factors.log().abs().amax()) if factors.numel() else 0.0


def _strengths(model: nn.Module, flow: Flow, layer: PlacedLayer, repeat: int) -> Tensor:
    """Largest magnitudes of a layer's folded weights per channel: (groups, outputs, inputs), float32.

    ``repeat`` is the number of features that each input channel has become.
    """
    seen = _connections(model, flow, layer).detach()
    found = seen.abs().amax(tuple(range(3, seen.dim()))) if seen.dim() > 3 else seen.abs()
    if repeat > 1:
        found = torch.unflatten(found, 2, (-1, repeat)).amax(3)
    factors = norm_factors(model.get_submodule(layer.norm)) if layer.norm is not None else None
    if factors is not None:
        found = found * factors.abs().reshape(*found.shape[:2], 1)
    return found.float()


def _connections(model: nn.Module, flow: Flow, layer: PlacedLayer) -> Tensor:
    """A view of a layer's weight as (groups, outputs of a group, inputs of a group, ...)."""
    weight = model.get_parameter(layer.weight)
    call = flow.at(layer.place)
    groups = int(call.settings.get("groups", 1))
    seen = torch.unflatten(weight, 0, (groups, -1))
    return seen.transpose(1, 2) if layer.place.function.startswith("conv_transpose") else seen


def _multiply(model: nn.Module, flow: Flow, layer: PlacedLayer, factors: Tensor) -> None:
    """Multiply a layer's input channels."""
    seen = _connections(model, flow, layer)
    seen.mul_(factors.to(seen.dtype).reshape(len(seen), 1, -1, *[1] * (seen.dim() - 3)))


def _divide(model: nn.Module, flow: Flow, layer: PlacedLayer, factors: Tensor) -> None:
    """Divide a layer's output channels, or those of the batch norm behind it."""
    call = flow.at(layer.place)
    if layer.norm is not None:
        tensors = flow.calls[call.users[0]].tensors
        for name in ("weight", "bias"):
            parameter = model.get_parameter(tensors[name])
            parameter.div_(factors.to(parameter.dtype))
        return
    seen = _connections(model, flow, layer)
    seen.div_(factors.to(seen.dtype).reshape(*seen.shape[:2], *[1] * (seen.dim() - 2)))
    if "bias" in call.tensors:
        bias = model.get_parameter(call.tensors["bias"])
        bias.div_(factors.to(bias.dtype))
