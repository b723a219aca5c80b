"""Quantized networks for other programs: weights as integers, activations as explicit rounding.

The export network is a copy in which each call computes what an integer runtime will. A weight on a uniform
grid becomes (n - z) * s, with the batch norm behind it folded into s and into the bias, and the batch norm
returns its input; an activation's quantizer is one operator, or a few arithmetic ones. Calls are followed as
for quantizers (`network/attach.py`), which torch.export can trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.networks import copied, drop_companions, in_mode
from cctool.checkpoint.edits.mask import masks_of
from cctool.graph.execution import Watch, following, tensors_in
from cctool.quantization.export.integer_weights import IntegerWeight, fits_byte, from_quantizer
from cctool.quantization.export.onnx_operator import on_grid
from cctool.quantization.network.attach import fold_of, norm_factors, quantizers_of, taken_weights
from cctool.quantization.network.calls import CallSite, Flow, flow_of
from cctool.quantization.network.placement import INPUT_PLACE, Left, PlacedLayer, plan_points
from cctool.quantization.network.points import CallPoint, activation_key, weight_key
from cctool.quantization.quantizers.grid import Grid, aligned

CONTAINER = "exported"
_HUGE = 2.0**100
"""Scale of a grid whose only value is 0: everything divided by it rounds to 0."""


@dataclass(frozen=True, eq=False)
class ExportNetwork:
    """A network as integer runtimes compute it.

    Attributes:
        model: the network, on the CPU, in evaluation mode.
        weights: of its calls; the network contains the values of each bit for bit.
        left: weights that stay in floating point, and why.
    """

    model: nn.Module
    weights: tuple[IntegerWeight, ...]
    left: tuple[Left, ...]


def made_weights(model: nn.Module) -> dict[str, Tensor]:
    """The quantized weights of a network that are parameters, by qualified name; empty without quantizers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return _made(model, {name: parameter.detach() for name, parameter in parameters.items()}, masks_of(model))


def computed_weights(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The quantized weights that calls compute, by name, as these take them; empty without quantizers.

    Args:
        model: with or without quantizers.
        inputs: of its forward, for one pass.
    """
    if quantizers_of(model) is None:
        return {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    taken = {
        name: value
        for name, value in taken_weights(model, inputs).items()
        # Files of old have quantizers with the name of a parameter from which the weight is computed.
        if name not in parameters or not torch.equal(value.reshape(-1), parameters[name].reshape(-1))
    }
    return _made(model, taken, {})


def _made(model: nn.Module, values: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the quantizers make of weights, times their masks."""
    held, found = quantizers_of(model), {}
    with in_mode(model, training=False):
        for name, point in ({} if held is None else held.state.weights).items():
            quantizer = None if held is None else held.quantizer(weight_key(name))
            if quantizer is not None and name in values:
                made = quantizer(values[name], fold_of(model, point))
                found[name] = made * masks[name] if name in masks else made
    return found


def with_weights(model: nn.Module, made: Mapping[str, Tensor]) -> nn.Module:
    """A copy without quantizers that has these parameters, by qualified name, and shares all others."""
    copy = _sharing(model)
    drop_companions(copy)
    known = dict(model.named_parameters(remove_duplicate=False))
    fresh = {
        id(known[name]): nn.Parameter(value.detach(), requires_grad=False) for name, value in made.items()
    }
    for module in copy.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in fresh:
                module._parameters[leaf] = fresh[id(parameter)]
    return copy


def rounding_network(model: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> nn.Module:
    """A copy with the quantized weights as parameters, which rounds activations by arithmetic; on the CPU.

    Args:
        model: with or without quantizers.
        inputs: of its forward, to learn the weights that it computes, which become constants of their calls;
            None if it computes none.
    """
    computed = {} if inputs is None else computed_weights(model, inputs)
    made = {name: value for name, value in made_weights(model).items() if name not in computed}
    copy, held = with_weights(model, made), quantizers_of(model)
    copy.eval()
    constants = {
        place: _Settled(computed[point.weight])
        for place, point in ({} if held is None else held.state.calls).items()
        if point.weight in computed
    }
    _follow(copy, _ExportCalls(model, constants, set(), marked=False))
    return copy


@contextmanager
def other_constants(model: nn.Module, changed: Sequence[tuple[Tensor, Tensor]]) -> Iterator[bool]:
    """Let a network compute with other values of some parameters and buffers, which are found by their own.

    Args:
        model: on the CPU.
        changed: values before and after, float32 of one shape; equal ones in the order of their calls.

    Returns:
        Whether each has its own place in the network.
    """
    known: dict[tuple[tuple[int, ...], bytes], list[Tensor]] = {}
    for before, after in changed:
        known.setdefault(_key(before), []).append(after)
    shapes = {before.shape for before, _ in changed}
    missing, held = Counter({key: len(afters) for key, afters in known.items()}), []
    for module in _container_first(model) if known else ():
        own: tuple[Any, ...] = (module._parameters, module._buffers)
        for states in own:
            for leaf, value in states.items():
                if value is None or value.shape not in shapes or value.dtype != torch.float32:
                    continue
                key = _key(value)
                if key in known:
                    # Several layers may have zeros for a bias; what one of them gets, the others may have.
                    afters = known[key]
                    held.append((states, leaf, value, afters.pop(0) if len(afters) > 1 else afters[0]))
                    missing[key] -= 1
    try:
        for states, leaf, value, after in held:
            states[leaf] = nn.Parameter(after, False) if isinstance(value, nn.Parameter) else after
        yield all(count <= 0 for count in missing.values())
    finally:
        for states, leaf, value, _ in held:
            states[leaf] = value


def _container_first(model: nn.Module) -> Iterator[nn.Module]:
    """All modules; first the one with the tensors of calls, in their order."""
    container = model._modules.get(CONTAINER)
    if container is not None:
        yield container
    yield from (module for module in model.modules() if module is not container)


def _key(value: Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(value.shape), value.detach().numpy().tobytes()


def _sharing(model: nn.Module) -> nn.Module:
    return copied(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def export_network(
    model: nn.Module, inputs: tuple[Tensor, ...], stored: Mapping[str, IntegerWeight] | None = None
) -> ExportNetwork:
    """Build the export network, in which `on_grid` rounds activations whose integers fit 8 bits.

    Args:
        model: with or without quantizers, its layers ordinary ones, on the CPU; not changed.
        inputs: positional arguments of its forward.
        stored: weights that a checkpoint stores as integers, by qualified name.
    """
    copy = _sharing(model)
    drop_companions(copy)
    copy.eval()
    flow = flow_of(copy, inputs)
    builder = _Builder(model, inputs, flow, dict(stored or {}))
    _follow(copy, _ExportCalls(model, builder.settled, builder.norms))
    return ExportNetwork(copy, tuple(builder.weights), tuple(builder.left))


def _follow(copy: nn.Module, run: _ExportCalls) -> None:
    copy.register_module(CONTAINER, _Holder(run.states))
    copy.register_forward_pre_hook(run.begin)
    copy.register_forward_hook(run.end, always_call=True)


class _Holder(nn.Module):
    """Holds the tensors that calls take in place of the network's own; as a layer it returns its input."""

    def __init__(self, states: Mapping[str, Tensor | nn.Module]) -> None:
        super().__init__()
        for key, state in states.items():
            if isinstance(state, nn.Module):
                self._modules[key] = state
            else:
                self._buffers[key] = state

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, eq=False)
class _Settled:
    """The weight that one call takes, and its bias unless that is its own."""

    weight: Tensor
    bias: Tensor | None = None


class _Builder:
    """Weights and biases for the calls of an export network."""

    def __init__(
        self, model: nn.Module, inputs: tuple[Tensor, ...], flow: Flow, stored: dict[str, IntegerWeight]
    ) -> None:
        self.model, self.flow, self.stored = model, flow, stored
        self.made = made_weights(model) | computed_weights(model, inputs)
        self.weights: list[IntegerWeight] = []
        self.left: list[Left] = []
        self.norms: set[CallSite] = set()
        self.settled: dict[CallSite, _Settled] = {}
        held = quantizers_of(model)
        self.calls: Mapping[CallSite, CallPoint] = {} if held is None else held.state.calls
        for layer in plan_points(flow, "none").layers:
            found = self._layer(layer)
            if found is not None:
                self.settled[layer.place] = found
        placed = {weight.name for weight in self.weights}
        self.weights += [weight for name, weight in self.stored.items() if name not in placed]

    def _layer(self, layer: PlacedLayer) -> _Settled | None:
        point = self.calls.get(layer.place)
        if point is not None and point.weight is not None and point.weight in self.made:
            # A parameter may be taken in another shape.
            made = self.made[point.weight].reshape(layer.shape)
            weight, fold = self._quantized(point.weight, made)
            if weight is None:
                self._leave(point.weight, "its levels lie on no uniform grid of 8 bits or fewer")
                return _Settled(made)
        elif layer.weight in self.stored:
            weight, fold = self.stored[layer.weight].shaped(layer.shape), None
            made = weight.values()
        else:
            return None
        return self._folded(layer, weight, fold, made)

    def _leave(self, name: str, reason: str) -> None:
        if all(left.name != name for left in self.left):
            self.left.append(Left(name, reason))

    def _quantized(self, name: str, made: Tensor) -> tuple[IntegerWeight | None, Tensor | None]:
        held = quantizers_of(self.model)
        quantizer = None if held is None else held.quantizer(weight_key(name))
        assert held is not None
        assert quantizer is not None
        fold = fold_of(self.model, held.state.weights[name])
        if fold is not None:
            # As the quantizer does.
            fold = torch.where(fold == 0, 1.0, fold)
        return from_quantizer(name, quantizer, made, fold), fold

    def _folded(
        self, layer: PlacedLayer, weight: IntegerWeight, fold: Tensor | None, made: Tensor
    ) -> _Settled:
        """Fold the batch norm behind a layer if its output channels lie along one dimension."""
        bias = self.flow.at(layer.place).bias
        fixed = bias is None or not bias.fed
        norm = None if layer.norm is None or not fixed else self.model.get_submodule(layer.norm)
        factors = None if norm is None or layer.axis is None else norm_factors(norm)
        if factors is not None and layer.axis is not None:
            # The exact quotient is 1 where the fold is this same batch norm, so the integers do not change.
            ratio = factors.double() if fold is None else factors.double() / fold.double()
            scaled = weight.scaled(ratio, layer.axis)
            if scaled is not None and norm is not None:
                self.weights.append(scaled)
                self.norms.add(self.flow.calls[self.flow.at(layer.place).users[0]].place)
                return _Settled(scaled.values(), self._bias(layer, norm, factors))
        plain = weight if fold is None else weight.scaled(1 / fold.double(), 0)
        if plain is None:
            return _Settled(made)
        self.weights.append(plain)
        # One for each call: its steps in the file are those of the call's input.
        own = self._tensor(self.flow.at(layer.place).tensors.get("bias"))
        return _Settled(plain.values(), None if own is None else own.clone())

    def _bias(self, layer: PlacedLayer, norm: nn.Module, factors: Tensor) -> Tensor:
        """Beta + (b - mean) * gamma / sigma."""
        call = self.flow.at(layer.place)
        own = self._tensor(call.tensors.get("bias")) if call.bias is None else call.bias.value
        mean, beta = norm._buffers["running_mean"], norm._parameters.get("bias")
        assert mean is not None
        shift = -mean.double() if own is None else own.double() - mean.double()
        found = shift * factors.double()
        return (found if beta is None else found + beta.detach().double()).float()

    def _tensor(self, name: str | None) -> Tensor | None:
        if name is None:
            return None
        owner, _, leaf = name.rpartition(".")
        value = getattr(self.model.get_submodule(owner), leaf)
        assert isinstance(value, Tensor)
        return value.detach()


class _RoundingModule(nn.Module):
    """An activation's quantizer: one operator, or arithmetic.

    Args:
        grid: of the values.
        marked: whether to use the operator where 8 bits hold the integers.
    """

    def __init__(self, grid: Grid, *, marked: bool) -> None:
        super().__init__()
        self.low, self.high, self.axis = grid.low, grid.high, grid.axis
        scale = grid.scale.detach().cpu().float()
        self.register_buffer("scale", torch.where(scale > 0, scale, _HUGE))
        self.register_buffer("zero_point", grid.zero_point.detach().cpu().float())
        self.marked = marked and fits_byte(grid.low, grid.high) and grid.axis is None
        self.numbers = (1.0, 0)
        if self.marked:
            # Python numbers, which become constants of the operator in the traced program.
            self.numbers = float(self.get_buffer("scale")), int(self.get_buffer("zero_point"))

    def forward(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        work = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if self.marked:
            return _as(on_grid(work, *self.numbers, self.low, self.high), x)
        scale = aligned(self.get_buffer("scale"), x.dim(), self.axis)
        zero = aligned(self.get_buffer("zero_point"), x.dim(), self.axis)
        n = ((work / scale).round() + zero).clamp(self.low, self.high)
        return _as((n - zero) * scale, x)


class _ExportCalls:
    """The calls of an export network in one pass, and the hooks that follow it."""

    def __init__(
        self,
        model: nn.Module,
        settled: Mapping[CallSite, _Settled],
        norms: set[CallSite],
        *,
        marked: bool = True,
    ) -> None:
        self.states: dict[str, Tensor | nn.Module] = {}
        self.norms = norms
        self.roundings: dict[tuple[CallSite, str], str] = {}
        self.settled: dict[CallSite, tuple[str, str | None]] = {}
        for number, (place, taken) in enumerate(settled.items()):
            weight, bias = f"weight_{number}", f"bias_{number}"
            self.states[weight] = taken.weight
            if taken.bias is not None:
                self.states[bias] = taken.bias
            self.settled[place] = (weight, None if taken.bias is None else bias)
        for place, slot, grid in _grids(model):
            key = activation_key(place, slot)
            self.states[key] = _RoundingModule(grid, marked=marked)
            self.roundings[place, slot] = key
        self._running: list[ExitStack] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._watch = Watch((), {})
        self._model: nn.Module = nn.Identity()

    def begin(self, model: nn.Module, args: tuple[Any, ...]) -> Any:
        self._model, self._counts = model, Counter()
        changed = None
        if args and (INPUT_PLACE, "output") in self.roundings:
            changed = (self._rounded(INPUT_PLACE, "output", args[0]), *args[1:])
        self._watch = Watch((), {module: name for name, module in model.named_modules()}, self._call)
        stack = ExitStack()
        stack.enter_context(following(self._watch))
        stack.enter_context(self._watch)
        self._running.append(stack)
        return changed

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop().close()

    def _call(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        module = self._watch.modules[-1]
        place = CallSite(module, name, self._counts[module, name])
        if place in self.norms:
            # Folded into the weight before it.
            result = args[0] if args else kwargs["input"]
        else:
            given = list(args), dict(kwargs)
            if (place, "input") in self.roundings:
                _set(*given, 0, "input", self._rounded(place, "input", _get(*given, 0, "input")))
            if place in self.settled:
                self._settle(place, *given)
            result = function(*given[0], **given[1])
        result = self._rounded(place, "output", result)
        if next(tensors_in(result), None) is not None:
            self._counts[module, name] += 1
        return result

    def _settle(self, place: CallSite, args: list[Any], kwargs: dict[str, Any]) -> None:
        holder = self._model.get_submodule(CONTAINER)
        weight, bias = self.settled[place]
        for position, name, key in ((1, "weight", weight), (2, "bias", bias)):
            if key is not None:
                value = holder.get_buffer(key)
                _set(args, kwargs, position, name, _as(value, _get(args, kwargs, 0, "input")))

    def _rounded(self, place: CallSite, slot: str, value: Any) -> Any:
        key = self.roundings.get((place, slot))
        return value if key is None else self._model.get_submodule(CONTAINER)._modules[key](value)  # type: ignore[misc]


def _grids(model: nn.Module) -> Iterator[tuple[CallSite, str, Grid]]:
    held = quantizers_of(model)
    if held is None:
        return
    for place, point in held.state.calls.items():
        for slot in ("input", "output"):
            quantizer = held.quantizer(activation_key(place, slot))
            if getattr(point, slot) is not None and quantizer is not None:
                grid = quantizer.grid()
                assert grid is not None, "activations are quantized uniformly"
                yield place, slot, grid


def _as(value: Tensor, other: Tensor) -> Tensor:
    """The value in another's type. A traced cast, even to the same type, forbids later in-place changes."""
    return value if value.dtype == other.dtype else value.to(other.dtype)


def _get(args: list[Any], kwargs: dict[str, Any], position: int, name: str) -> Any:
    return kwargs[name] if name in kwargs else args[position]


def _set(args: list[Any], kwargs: dict[str, Any], position: int, name: str, value: Any) -> None:
    if position < len(args):
        args[position] = value
    else:
        kwargs[name] = value
