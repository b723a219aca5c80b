"""Quantizers of a network: how they are attached, and what they do in a forward pass.

A forward pass of the whole network is followed call by call (`graph/execution.py`): a call's weight, first
argument and result go through the quantizers of its place (`calls.CallSite`). No class and no method of the
network's modules changes, and functional, shared and computed tensors are quantized like others. The
quantizers are modules in a container that is added to the network's own modules, so they are copied, moved,
saved and loaded with it. Parts of the network that are called separately compute in floating point.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import SpecError
from cctool.base.networks import device_of, drop_companions, in_mode
from cctool.checkpoint.edits.mask import masks_of
from cctool.graph.execution import Watch, following, tensors_in
from cctool.quantization.network.calls import CallSite
from cctool.quantization.network.placement import INPUT_PLACE
from cctool.quantization.network.points import CallPoint, Observing, WeightPoint, activation_key, weight_key
from cctool.quantization.quantizers.base import Quantizer
from cctool.quantization.quantizers.make import make_quantizer

CONTAINER = "quantizers"

Follower = Callable[[str, Tensor], None]
"""Called with (key, value) of each tensor before it is quantized."""
CallFollower = Callable[[CallSite, Sequence[Any], Mapping[str, Any], Any], None]
"""Called with the place of a call, its (quantized) arguments, and its result before that is quantized."""


@dataclass
class _State:
    """The settings of a network's quantizers that are not tensors.

    Attributes:
        weights: by qualified name.
        calls: by place.
        fingerprint, images, observing, method: see `Quantize`.
        enabled: keys of the quantizers that are active; None is all.
        follower: is called with values before they are quantized.
        call_follower: is called with each call that has a quantizer.
        bypassed: whether nothing is quantized.
    """

    weights: dict[str, WeightPoint] = field(default_factory=dict)
    calls: dict[CallSite, CallPoint] = field(default_factory=dict)
    fingerprint: str = ""
    images: int = 0
    observing: Observing | None = None
    method: str = ""
    enabled: frozenset[str] | None = None
    follower: Follower | None = None
    call_follower: CallFollower | None = None
    bypassed: bool = False


class NetworkQuantizers(nn.Module):
    """The quantizers of a network by key, and where they act.

    As a layer it returns its input, because containers that run all their modules in turn run this one, too.
    """

    is_companion = True

    def __init__(self) -> None:
        super().__init__()
        self.state = _State()

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x

    def quantizer(self, key: str) -> Quantizer | None:
        """The quantizer of a key."""
        found = self._modules.get(key)
        return found if isinstance(found, Quantizer) else None

    def named(self) -> Iterator[tuple[str, Quantizer]]:
        """Keys and quantizers: weights first, then activations in the order in which they were attached."""
        for key, module in self._modules.items():
            if isinstance(module, Quantizer):
                yield key, module

    @property
    def activation_keys(self) -> tuple[str, ...]:
        """Keys of the activations' quantizers."""
        return tuple(
            activation_key(place, slot)
            for place, point in self.state.calls.items()
            for slot in ("input", "output")
            if getattr(point, slot) is not None
        )

    def take(self, weight: str, indices: Tensor) -> None:
        """Keep the scales of some channels (int64 (kept,)) of the weight with this qualified name."""
        quantizer = self.quantizer(weight_key(weight))
        if quantizer is not None:
            quantizer.taken(indices)
            point = self.state.weights[weight]
            self.state.weights[weight] = point.model_copy(update={"channels": len(indices)})

    def drop_within(self, modules: Collection[str]) -> bool:
        """Remove the quantizers of these modules' weights and calls; returns whether there were any."""
        owned = tuple(f"{module}." for module in modules)
        weights = [name for name in self.state.weights if name.startswith(owned)]
        calls = [place for place in self.state.calls if f"{place.module}.".startswith(owned)]
        for name in weights:
            del self.state.weights[name]
            self._modules.pop(weight_key(name), None)
        for place in calls:
            del self.state.calls[place]
            for slot in ("input", "output"):
                self._modules.pop(activation_key(place, slot), None)
        return bool(weights or calls)

    def drop(self, place: CallSite, slot: str) -> None:
        """Remove the quantizer of one activation, "input" or "output" of a call."""
        self._modules.pop(activation_key(place, slot), None)
        self.state.calls[place] = self.state.calls[place].model_copy(update={slot: None})

    def act(self, key: str, value: Any, fold: Tensor | None = None) -> Any:
        """Pass a value to the follower, and quantize it if its quantizer is active."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        state = self.state
        if state.follower is not None:
            state.follower(key, value)
        quantizer = self.quantizer(key)
        if quantizer is None or state.bypassed or (state.enabled is not None and key not in state.enabled):
            return value
        return quantizer(value) if fold is None else quantizer(value, fold)


class _QuantizedPass:
    """One forward pass: replaces the calls that the watch sees."""

    def __init__(self, model: nn.Module, held: NetworkQuantizers) -> None:
        self.held = held
        self.counts: Counter[tuple[str, str]] = Counter()
        self.watch = Watch((), {module: name for name, module in model.named_modules()}, self.call)
        self.model = model
        self.masks = masks_of(model)
        self._weights: dict[tuple[str, torch.Size | None], Tensor] = {}

    def call(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        module = self.watch.modules[-1]
        result: Any
        place = CallSite(module, name, self.counts[module, name])
        point = self.held.state.calls.get(place)
        if point is None:
            result = function(*args, **kwargs)
        else:
            args, kwargs = list(args), dict(kwargs)  # type: ignore[assignment]
            if point.input is not None:
                self._change(args, kwargs, 0, "input", lambda x: self._activation(place, "input", x))
            if point.weight is not None:
                weight = point.weight
                self._change(args, kwargs, 1, "weight", lambda w: self._weight(weight, w))
            result = function(*args, **kwargs)
            if self.held.state.call_follower is not None:
                self.held.state.call_follower(place, args, kwargs, result)
            if point.output is not None:
                result = self._activation(place, "output", result)
        # Calls without tensors in their result are not numbered, as in `calls._Recorder.record`.
        if next(tensors_in(result), None) is not None:
            self.counts[module, name] += 1
        return result

    @staticmethod
    def _change(args: Any, kwargs: Any, position: int, name: str, change: Callable[[Any], Any]) -> None:
        if name in kwargs:
            kwargs[name] = change(kwargs[name])
        elif position < len(args):
            args[position] = change(args[position])

    def _activation(self, place: CallSite, slot: str, value: Any) -> Any:
        return self.held.act(activation_key(place, slot), value)

    def _weight(self, name: str, value: Any) -> Any:
        """The quantized weight, computed once per pass even if several calls use it."""
        # A parameter may be taken in several shapes.
        key = name, value.shape if isinstance(value, Tensor) else None
        if key not in self._weights:
            fold = fold_of(self.model, self.held.state.weights[name])
            found = self.held.act(weight_key(name), value, fold)
            # Not every grid has a 0, but masked weights must stay 0.
            mask = self.masks.get(name)
            self._weights[key] = found if mask is None else found * mask.view_as(found)
        return self._weights[key]


def norm_factors(norm: nn.Module) -> Tensor | None:
    """What a batch norm in evaluation mode multiplies each channel by, gamma / sqrt(var + eps); (C,).

    None if it has no running statistics.
    """
    variance, scale = norm._buffers.get("running_var"), norm._parameters.get("weight")
    if variance is None:
        return None
    factors = torch.rsqrt(variance + float(getattr(norm, "eps", 1e-5)))
    return factors if scale is None else (scale.detach() * factors)


def fold_of(model: nn.Module, point: WeightPoint) -> Tensor | None:
    """`norm_factors` of the batch norm that a weight is quantized together with, (C,); None if there is none.

    With a scale per channel the factor would cancel out, so there is none either.
    """
    if point.norm is None or point.config.axis is not None:
        return None
    return norm_factors(model.get_submodule(point.norm))


class _Begin:
    """The root's forward pre-hook, which starts to follow calls."""

    is_companion = True

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> Any:
        held = held_by(model)
        stack, run = ExitStack(), _QuantizedPass(model, held)
        changed = None
        point = held.state.calls.get(INPUT_PLACE)
        if point is not None and point.output is not None and args:
            changed = (held.act(activation_key(INPUT_PLACE, "output"), args[0]), *args[1:])
        stack.enter_context(following(run.watch))
        stack.enter_context(run.watch)
        _RUNNING.setdefault(id(held), []).append(stack)
        return changed


class _End:
    """The root's forward hook, called even if the pass raised an error."""

    is_companion = True

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        running = _RUNNING.get(id(held_by(model)), [])
        if running:
            running.pop().close()


# Not an attribute of the hooks, which are copied with the network. A stack, because passes may nest.
_RUNNING: dict[int, list[ExitStack]] = {}


def held_by(model: nn.Module) -> NetworkQuantizers:
    """The quantizers of a network that is known to have some."""
    found = quantizers_of(model)
    assert found is not None
    return found


def quantizers_of(model: nn.Module) -> NetworkQuantizers | None:
    """The quantizers of a network; None if it has none."""
    found = model._modules.get(CONTAINER)
    return found if isinstance(found, NetworkQuantizers) else None


def attach(
    model: nn.Module, weights: Mapping[str, WeightPoint], calls: Mapping[CallSite, CallPoint]
) -> NetworkQuantizers:
    """Attach quantizers in place; present ones stay, except those with the same key.

    Args:
        model: the whole network.
        weights: by the weights' qualified names.
        calls: by place.

    Raises:
        SpecError: if the network has another attribute called ``quantizers``, or is scripted.
    """
    held = quantizers_of(model)
    if held is None:
        if isinstance(model, torch.jit.ScriptModule):
            raise SpecError("quantize: a scripted network takes no quantizers")
        if hasattr(model, CONTAINER):
            raise SpecError(f"quantize: the network has something called {CONTAINER!r} of its own")
        held = NetworkQuantizers().train(model.training)
        model.register_module(CONTAINER, held)
        model.register_forward_pre_hook(_Begin())
        # Also after an error: otherwise later calls, outside of any pass, would still be followed.
        model.register_forward_hook(_End(), always_call=True)
    device = device_of(model)
    # While a file is loaded, parameters are on the meta device, but buffers are not.
    if device.type == "meta":
        device = torch.device("cpu")
    made: dict[str, Quantizer] = {}
    for name, weight in weights.items():
        made[weight_key(name)] = make_quantizer(weight.config, weight=True, channels=weight.channels)
    for place, call in calls.items():
        for slot in ("input", "output"):
            config = getattr(call, slot)
            if config is not None:
                made[activation_key(place, slot)] = make_quantizer(config, weight=False, channels=None)
    for key, quantizer in made.items():
        held._modules[key] = quantizer.to(device).train(held.training)
    held.state.weights.update(weights)
    held.state.calls.update(calls)
    return held


def detach(model: nn.Module) -> bool:
    """Remove all quantizers, in place; returns whether there were any."""
    if quantizers_of(model) is None:
        return False
    drop_companions(model)
    return True


@contextmanager
def _changed(model: nn.Module, **changes: object) -> Iterator[None]:
    """Change attributes of the state within a context."""
    state = vars(held_by(model).state)
    before = {name: state[name] for name in changes}
    state.update(changes)
    try:
        yield
    finally:
        state.update(before)


def following_values(
    model: nn.Module, follower: Follower, *, quantized: bool = False
) -> AbstractContextManager[None]:
    """Call ``follower`` with the values at all places; nothing is quantized unless ``quantized``."""
    return _changed(model, follower=follower, bypassed=not quantized)


class EndOfPassError(Exception):
    """Raised by a follower of calls to end a pass whose rest is not needed."""


def following_calls(
    model: nn.Module, follower: CallFollower, *, quantized: bool
) -> AbstractContextManager[None]:
    """Call ``follower`` with the calls at all places; nothing is quantized unless ``quantized``.

    An error that the follower raises, such as `EndOfPassError`, ends the pass and propagates to its caller.
    """
    return _changed(model, call_follower=follower, bypassed=not quantized)


def taken_weights(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Weights as calls take them before they are quantized, by the names of their quantizers.

    Takes one pass in evaluation mode, which changes nothing in the network.
    """
    held = held_by(model)
    names = {weight_key(name): name for name in held.state.weights}
    found: dict[str, Tensor] = {}

    def follow(key: str, value: Tensor) -> None:
        if key in names:
            found.setdefault(names[key], value.detach().clone())

    with in_mode(model, training=False), following_values(model, follow):
        model(*inputs)
    return found


def only(model: nn.Module, keys: Collection[str]) -> AbstractContextManager[None]:
    """Activate only some quantizers."""
    return _changed(model, enabled=frozenset(keys))
