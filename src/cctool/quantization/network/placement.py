"""Where quantizers go: weights of layers, and the activations between them.

There are three ways, for different uses. An integer runtime needs every tensor between its kernels quantized
once, but nothing inside what it fuses (``all``); LSQ quantizes the inputs of layers (``inputs``); DoReFa,
PACT and WRPN quantize the outputs of clipping activations (``clips``). A *layer* here is a call with a
weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cctool.quantization.network.calls import COMPUTING, INPUT, CallSite, Flow, FlowCall, channel_dim
from cctool.quantization.network.kernels import Kernel

Way = Literal["all", "inputs", "clips", "none"]
Slot = Literal["input", "output"]

INPUT_PLACE = CallSite("", "input", 0)
"""Place of the network's own input."""

CLIPS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clip"})
# fmt: off
_MOVES = frozenset([
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose", "t",
    "swapaxes", "swapdims", "movedim", "unsqueeze", "squeeze", "expand", "expand_as", "contiguous", "clone",
    "detach", "type_as", "getitem", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "pad",
    "roll", "channel_shuffle", "native_channel_shuffle", "pixel_shuffle", "pixel_unshuffle",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
    "stochastic_depth", "max_pool1d", "max_pool2d", "max_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
])
# fmt: on
"""Functions whose results contain only values of their argument, and zeros: what is quantized stays so."""
# fmt: off
_INTEGER = COMPUTING | frozenset([
    "add", "mul", "cat", "mean", "sigmoid", "leaky_relu", "softmax", "matmul", "bmm",
    "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
])
# fmt: on
"""Functions that integer runtimes have kernels for."""

_NORMED_DIM = 1  # which a batch norm takes for channels


@dataclass(frozen=True)
class PlacedLayer:
    """A call with a weight.

    Attributes:
        place: of the call.
        weight: name of its weight, see `FlowCall`.
        shape: of that weight.
        axis: dim of the weight's output channels; None if they do not lie along one.
        norm: name of the module whose batch norm is the only user of its result; None without.
        first: whether the network's input reaches it without passing another layer.
        last: whether its result reaches the network's output without passing another layer.
        kernel: of a weight that is no parameter.
        varies: why its weight is not fixed, see `FlowCall`.
        at_call: whether what the call takes is rounded; else the parameters that it is made of are.
    """

    place: CallSite
    weight: str
    shape: tuple[int, ...]
    axis: int | None
    norm: str | None
    first: bool
    last: bool
    kernel: Kernel | None = None
    varies: str = ""
    at_call: bool = True


@dataclass(frozen=True)
class Activation:
    """A tensor between calls.

    Attributes:
        place: of the call, or `INPUT_PLACE`.
        slot: whether it is the call's input or output.
        takers: layers that take it, possibly after its values were moved around.
        edge: whether all of these are first or last layers.
        clip: whether a clipping activation makes it.
    """

    place: CallSite
    slot: Slot
    takers: tuple[CallSite, ...] = ()
    edge: bool = False
    clip: bool = False


@dataclass(frozen=True)
class Left:
    """What stays in floating point, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Points:
    """Where quantizers go in one network."""

    layers: tuple[PlacedLayer, ...]
    activations: tuple[Activation, ...]
    left: tuple[Left, ...]


def plan_points(flow: Flow, way: Way) -> Points:
    """Choose places in a network's flow; the way ``none`` is weights only."""
    plan = _Placement(flow)
    layers = tuple(plan.layers())
    if way == "none":
        return Points(layers, (), ())
    found = {"all": plan.everything, "inputs": plan.inputs, "clips": plan.clips}[way]()
    lost = dict.fromkeys(activation.place for activation in found if plan.is_lost(activation))
    reason = "the network goes on with what {} wrote in place, not with its result"
    left = [Left(place.title, reason.format(place.function)) for place in lost]
    looped = {call.place: call.looped for call in flow.calls if call.looped}
    left += dict.fromkeys(Left(a.place.title, looped[a.place]) for a in found if a.place in looped)
    kept = tuple(a for a in found if a.place not in lost and a.place not in looped)
    if way == "clips":
        left += plan.unclipped(kept)
    return Points(layers, kept, tuple(left))


def stored_alone(points: Points) -> Points:
    """The same layers if nothing but stored parameters is rounded.

    A layer whose weight is computed from a parameter that has its shape and bears its name stands for that.
    """

    def stored(layer: PlacedLayer) -> PlacedLayer:
        if layer.kernel is None:
            return replace(layer, varies="")
        return replace(layer, weight=layer.kernel.own or layer.weight, varies="", at_call=False)

    return replace(points, layers=tuple(map(stored, points.layers)))


class _Placement:
    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.calls = flow.calls
        self._before = self._reaching(range(len(self.calls)), lambda call: call.sources)
        backwards = range(len(self.calls) - 1, -1, -1)
        self._after = self._reaching(backwards, lambda call: call.users)
        self._for_kernels = self._making_kernels(backwards)

    def _making_kernels(self, backwards: Collection[int]) -> list[bool]:
        """For each call whether its result is used for weights and biases of layers alone.

        What a layer makes, and what it takes in, are activations all the same.
        """
        found = [False] * len(self.calls)
        for number in backwards:
            users = self.calls[number].users
            found[number] = (
                bool(users)
                and number not in self.flow.outputs
                and all(self._for_kernel(number, user, found) for user in users)
            )
        return found

    def _for_kernel(self, number: int, user: int, found: Sequence[bool]) -> bool:
        call = self.calls[user]
        if self._is_layer(call):
            return number in call.kernel_sources and call.sources.count(number) == 1
        return found[user]

    def _reaching(
        self, order: Collection[int], neighbours: Callable[[FlowCall], Collection[int]]
    ) -> list[bool]:
        """For each call whether a layer lies on some path to it, seen along ``neighbours``."""
        found = [False] * len(self.calls)
        for number in order:
            found[number] = any(
                other != INPUT and (found[other] or self._is_layer(self.calls[other]))
                for other in neighbours(self.calls[number])
            )
        return found

    @staticmethod
    def _is_layer(call: FlowCall) -> bool:
        return call.weight is not None and not call.constant

    def layers(self) -> Iterator[PlacedLayer]:
        for number, call in enumerate(self.calls):
            if call.weight is None or not self._is_layer(call):
                continue
            yield PlacedLayer(
                place=call.place,
                weight=call.weight,
                shape=call.weight_shape,
                axis=_axis(call),
                norm=self._norm(number),
                first=not self._before[number],
                last=not self._after[number],
                kernel=call.kernel,
                varies=call.varies,
            )

    def _norm(self, number: int) -> str | None:
        """Name of the module whose batch norm of its channels is the only user of a call's result."""
        call = self.calls[number]
        if len(call.users) != 1 or number in self.flow.outputs or not self._is_layer(call):
            return None
        if channel_dim(call.place, len(call.shape)) != _NORMED_DIM:
            return None
        user = self.calls[call.users[0]]
        statistics = {"running_mean", "running_var"} <= set(user.tensors)
        if user.place.function != "batch_norm" or not statistics or user.settings.get("training"):
            return None
        owners = {name.rpartition(".")[0] for name in user.tensors.values()}
        return owners.pop() if len(owners) == 1 else None

    def everything(self) -> list[Activation]:
        found = [self._made(INPUT)] if self._wanted(INPUT) else []
        for number, call in enumerate(self.calls):
            if call.shape and not call.constant and self._wanted(number) and not self._absorbed(number):
                found.append(self._made(number))
        return found

    def _made(self, number: int) -> Activation:
        """The output of a call, or the network's input."""
        takers = [taker for taker in self._takers(number) if self._is_layer(taker)]
        place = INPUT_PLACE if number == INPUT else self.calls[number].place
        return Activation(
            place,
            "output",
            tuple(dict.fromkeys(taker.place for taker in takers)),
            edge=bool(takers) and all(self._is_edge(taker) for taker in takers),
            clip=place.function in CLIPS,
        )

    def _wanted(self, number: int) -> bool:
        """Whether an integer kernel makes a result, or takes it, possibly after it was moved around."""
        if number != INPUT and (self.calls[number].place.function in _MOVES or self._for_kernels[number]):
            return False
        takers = list(self._takers(number))
        if any(taker.place.function in _INTEGER for taker in takers):
            return True
        made = number != INPUT and (
            self.calls[number].place.function in _INTEGER or self._is_norm_of_layer(number)
        )
        # The network's own outputs stay in floating point.
        return made and bool(takers)

    def _is_norm_of_layer(self, number: int) -> bool:
        """Whether a call is a batch norm that is fused into the layer before it."""
        sources = self.calls[number].sources
        return (
            self.calls[number].place.function == "batch_norm"
            and len(sources) == 1
            and sources[0] != INPUT
            and self._is_layer(self.calls[sources[0]])
            and self._norm(sources[0]) is not None
        )

    def _takers(self, number: int) -> Iterator[FlowCall]:
        """Calls that take a result, seen through calls that only move values."""
        users = self.flow.input_users if number == INPUT else self.calls[number].users
        for user in users:
            call = self.calls[user]
            if call.place.function in _MOVES:
                yield from self._takers(user)
            elif call.shape:
                yield call

    def _absorbed(self, number: int) -> bool:
        """Whether the next call is fused into the same kernel."""
        call = self.calls[number]
        if len(call.users) != 1 or number in self.flow.outputs:
            return False
        if self._norm(number) is not None and self._is_layer(call):
            return True
        return self.calls[call.users[0]].place.function in CLIPS and call.place.function not in CLIPS

    def _is_edge(self, call: FlowCall) -> bool:
        number = self.calls.index(call)
        return not self._before[number] or not self._after[number]

    def inputs(self) -> list[Activation]:
        return [
            Activation(call.place, "input", (call.place,), self._is_edge(call), self._clipped(call))
            for call in self.calls
            if self._is_layer(call)
        ]

    def clips(self) -> list[Activation]:
        found = [
            replace(self._made(number), edge=False)
            for number, call in enumerate(self.calls)
            if call.place.function in CLIPS and call.shape and not call.constant and _from_zero(call)
            if not self._for_kernels[number]
        ]
        edges = [
            Activation(call.place, "input", (call.place,), edge=True)
            for call in self.calls
            if self._is_layer(call) and self._is_edge(call)
        ]
        return [*found, *edges]

    def _clipped(self, call: FlowCall) -> bool:
        """Whether the input of a layer was clipped, and at most pooled or moved afterwards."""
        source = call.sources[0] if call.sources else INPUT
        while source != INPUT:
            before = self.calls[source]
            if before.place.function in CLIPS and _from_zero(before):
                return True
            # Averages of values that are 0 or more are so, too.
            moved = before.place.function in _MOVES or "avg_pool" in before.place.function
            if not (moved or before.place.function == "mean"):
                return False
            source = before.sources[0] if before.sources else INPUT
        return False

    def unclipped(self, activations: Collection[Activation]) -> list[Left]:
        """Layers whose input no clipping activation made."""
        covered = {activation.place for activation in activations if activation.slot == "input"}
        return [
            Left(call.place.title, "takes in activations that no clipping activation made: they stay float")
            for call in self.calls
            if self._is_layer(call) and call.place not in covered and not self._clipped(call)
        ]

    def is_lost(self, activation: Activation) -> bool:
        lost = any(call.lost for call in self.calls if call.place == activation.place)
        return lost and activation.slot == "output"


def _axis(call: FlowCall) -> int | None:
    if not call.place.function.startswith("conv_transpose"):
        return 0
    # Shape (in, out / groups, ...): with several groups an output channel is not a slice of the weight.
    groups = call.settings.get("groups", 1)
    return 1 if groups == 1 else None


def _from_zero(call: FlowCall) -> bool:
    """Whether a clipping function's smallest value is zero."""
    if call.place.function in ("relu", "relu6"):
        return True
    given = call.settings
    low = next((given[name] for name in ("min_val", "min", "argument1") if name in given), None)
    # Its default.
    if low is None and call.place.function == "hardtanh":
        low = -1.0
    return isinstance(low, (int, float)) and low == 0
