"""Taps: codecs behind named modules, as forward hooks, and the `tap` edit that restores them from a file.

A hook changes neither a module's class nor the names of its tensors. Calibrated tensors are persistent
buffers of the module, ``tap_range`` and, where there are bases, ``tap_channels``, ``tap_rows``, ... So taps
are copied, moved, saved and loaded with their module, and a module that is called twice codes twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cctool.base.errors import CorruptCheckpointError, SpecError, TransformError
from cctool.base.networks import device_of, qualified
from cctool.checkpoint.file.payload import fingerprint_of
from cctool.checkpoint.spec import Edit, ModelSpec
from cctool.checkpoint.tables import EditKind
from cctool.graph.execution import hidden
from cctool.transforms.codec.codec import CodecConfig, CodecState, Symbols, encode, reconstruct
from cctool.transforms.codec.training import simulate, simulate_rated
from cctool.transforms.kernels.spatial import block_sizes

_PREFIX = "tap_"
_RANGE = "range"
# A file may claim any shape; this limits what its bases allocate.
_LARGEST_BASIS = 8192

Sink = Callable[[str, Symbols, Tensor, Tensor], Tensor | None]
"""(tap's name, symbols, map, reconstruction) -> what replaces the reconstruction; None keeps it."""


class Tap(Edit):
    """A codec behind one module.

    Attributes:
        codec: its settings.
        shape: (C, H, W) of the maps that it was calibrated on.
        fingerprint: of the weights that it was calibrated for.
    """

    kind: Literal["tap"] = "tap"
    codec: CodecConfig
    shape: tuple[int, int, int]
    fingerprint: str = Field(max_length=128)


@dataclass(frozen=True)
class CalibratedTap:
    """A codec without a network.

    Attributes:
        codec, shape, fingerprint: see `Tap`.
        bounds: float32 (2,), smallest and largest value of the maps.
        bases: float32 matrices; see `CodecState`.
    """

    codec: CodecConfig
    shape: tuple[int, int, int]
    fingerprint: str
    bounds: Tensor
    bases: Mapping[str, Tensor] = field(default_factory=dict)


class TapHook:
    """The forward hook that codes a module's output.

    Gradients pass straight through where they are needed; the values are the same either way.

    Attributes:
        codec, shape, fingerprint: see `Tap`.
        active: whether maps are coded; otherwise they pass unchanged.
        sink: is called with every pass; see `recording`.
        rates: list to which passes with gradients append their bits and elements; see `collecting_rates`.
    """

    def __init__(self, codec: CodecConfig, shape: tuple[int, int, int], fingerprint: str) -> None:
        self.codec = codec
        self.shape = shape
        self.fingerprint = fingerprint
        self.active = True
        self.sink: Callable[[Symbols, Tensor, Tensor], Tensor | None] | None = None
        self.rates: list[tuple[Tensor, int]] | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Return the reconstruction of (N, C, H, W) maps, in their type and memory format."""
        if not self.active:
            return None
        if not isinstance(output, Tensor) or output.dim() != 4 or not output.is_floating_point():
            kind = type(output).__name__
            what = f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else f"a {kind}"
            raise TransformError(f"a tap codes maps (N, C, H, W); {type(module).__name__} returned {what}")
        # The network's own calls are followed elsewhere; the codec's arithmetic is not part of them.
        with hidden():
            return self._coded(module, output)

    def _coded(self, module: nn.Module, output: Tensor) -> Tensor:
        state = _state(module, self)
        if self.sink is None and torch.is_grad_enabled() and output.requires_grad:
            return _as(self._simulated(output, state), output)
        symbols = encode(output, state, look=self.sink is not None)
        coded = _as(reconstruct(symbols, state), output)
        if self.sink is None:
            return coded
        other = self.sink(symbols, output, coded)
        return coded if other is None else _as(other, output)

    def _simulated(self, output: Tensor, state: CodecState) -> Tensor:
        if self.rates is None:
            return simulate(output, state)
        coded, bits = simulate_rated(output, state)
        self.rates.append((bits, output.numel()))
        return coded


def _as(coded: Tensor, output: Tensor) -> Tensor:
    # A map with one channel or one pixel is contiguous in both formats.
    last = output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous()
    memory = torch.channels_last if last else torch.contiguous_format
    return coded.to(output.device, output.dtype, memory_format=memory)


def basis_shapes(codec: CodecConfig, shape: tuple[int, int, int]) -> dict[str, int]:
    """Sides of the square bases that a codec needs for maps of (C, H, W), by name."""
    channels, height, width = shape
    found = {"channels": channels} if codec.channel_klt else {}
    if codec.kernel == "klt":
        for axis, size in (("columns", height), ("rows", width)):
            for side in sorted(set(block_sizes(size, codec.block)), reverse=True):
                found[axis if side == codec.block else f"{axis}_rest"] = side
    return found


def taps_of(model: nn.Module) -> dict[str, TapHook]:
    """Hooks by the name of their module, a shared module under its first name."""
    return {
        name: hook
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, TapHook)
    }


def state_of(model: nn.Module, name: str) -> CodecState:
    """The codec behind a module, with its tensors as they are now."""
    return _state(model.get_submodule(name), taps_of(model)[name])


def _state(module: nn.Module, hook: TapHook) -> CodecState:
    tensors = {name: module.get_buffer(f"{_PREFIX}{name}") for name in basis_shapes(hook.codec, hook.shape)}
    return CodecState(hook.codec, module.get_buffer(f"{_PREFIX}{_RANGE}"), tensors)


def tap_buffers(model: nn.Module) -> set[str]:
    """Names in the state dict that belong to taps, shared modules under each of their names."""
    tapped = {id(model.get_submodule(name)): hook for name, hook in taps_of(model).items()}
    found = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        hook = tapped.get(id(module))
        if hook is not None:
            leaves = [f"{_PREFIX}{name}" for name in (_RANGE, *basis_shapes(hook.codec, hook.shape))]
            found |= {qualified(prefix, leaf) for leaf in leaves}
    return found


def set_taps(model: nn.Module, taps: Mapping[str, CalibratedTap]) -> None:
    """Put codecs behind modules, in place of any that are there.

    Raises:
        SpecError: if there is no such module, or it cannot take buffers and hooks.
    """
    for name, tap in taps.items():
        device = device_of(model)
        module = _module(model, name)
        _drop(module)
        tensors = {leaf: tensor.to(device) for leaf, tensor in {_RANGE: tap.bounds, **tap.bases}.items()}
        _register(module, name, TapHook(tap.codec, tap.shape, tap.fingerprint), tensors)


def drop_taps(model: nn.Module) -> dict[str, CalibratedTap]:
    """Remove all codecs, in place, and return what `set_taps` would restore."""
    found = {}
    for name, hook in taps_of(model).items():
        module = model.get_submodule(name)
        state = _state(module, hook)
        found[name] = CalibratedTap(hook.codec, hook.shape, hook.fingerprint, state.bounds, state.bases)
        _drop(module)
    return found


def with_taps(spec: ModelSpec, model: nn.Module) -> ModelSpec:
    """The spec with the tap edits of ``model`` in place of its former ones."""
    others = tuple(edit for edit in spec.edits if edit.get("kind") != "tap")
    edits = tuple(
        Tap(module=name, codec=hook.codec, shape=hook.shape, fingerprint=hook.fingerprint)
        for name, hook in taps_of(model).items()
    )
    return spec.model_copy(update={"edits": others}).with_edits(edits)


def set_quality(model: nn.Module, quality: float | None) -> None:
    """Scale the steps of every tap that has steps, in place; see `steps.quality_scale`."""
    for hook in taps_of(model).values():
        if hook.codec.transforms:
            hook.codec = hook.codec.model_copy(update={"quality": quality})


@contextmanager
def _hooks_with(model: nn.Module, attribute: str, value: Callable[[str], Any]) -> Iterator[None]:
    """Set an attribute of every hook, by the name of its module, and set it back afterwards."""
    hooks = taps_of(model)
    before = {name: getattr(hook, attribute) for name, hook in hooks.items()}
    for name, hook in hooks.items():
        setattr(hook, attribute, value(name))
    try:
        yield
    finally:
        for name, hook in hooks.items():
            setattr(hook, attribute, before[name])


def recording(model: nn.Module, sink: Sink) -> AbstractContextManager[None]:
    """Call ``sink`` with every pass through a tap: its symbols, the map, its reconstruction.

    These passes have no gradient. The tensors must not be modified.
    """
    return _hooks_with(model, "sink", lambda name: partial(sink, name))


def bypassed(model: nn.Module) -> AbstractContextManager[None]:
    """Let maps pass unchanged: the network computes as if it had no taps."""
    return _hooks_with(model, "active", lambda name: False)


class Rates:
    """Bits and elements of the taps' forward passes since the last call of `per_element`."""

    def __init__(self) -> None:
        self.passes: list[tuple[Tensor, int]] = []

    def per_element(self) -> Tensor | None:
        """Estimated bits per value over all taps since the last call; None if there was no pass.

        A scalar float32: the sum of the taps' bits divided by that of their elements, so that each tap is
            weighted by
        its number of values. Its gradient reaches whatever the maps were computed from.
        """
        passes = list(self.passes)
        self.passes.clear()
        if not passes:
            return None
        return torch.stack([bits for bits, _ in passes]).sum() / sum(elements for _, elements in passes)


@contextmanager
def collecting_rates(model: nn.Module) -> Iterator[Rates]:
    """Let taps estimate the bits of passes that have gradients; see `training.soft_bits`."""
    found = Rates()
    with _hooks_with(model, "rates", lambda name: found.passes):
        yield found


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over a network's tensors and their names, without those of taps and quantizers."""
    return fingerprint_of(model, tap_buffers(model))


def stale_taps(model: nn.Module) -> tuple[str, ...]:
    """Names of taps that were calibrated for other weights than the present ones."""
    hooks = taps_of(model)
    if not hooks:
        return ()
    now = fingerprint(model)
    return tuple(name for name, hook in hooks.items() if hook.fingerprint != now)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise SpecError(f"tap: the architecture has no module {name!r}") from None
    if isinstance(module, torch.jit.ScriptModule):
        raise SpecError(f"tap: {name or 'the model'} is scripted, and takes no further buffers")
    return module


def _drop(module: nn.Module) -> None:
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, TapHook):
            for leaf in (_RANGE, *basis_shapes(hook.codec, hook.shape)):
                del module._buffers[f"{_PREFIX}{leaf}"]
            del module._forward_hooks[key]


def _register(module: nn.Module, name: str, hook: TapHook, tensors: Mapping[str, Tensor]) -> None:
    sizes = {leaf: (side, side) for leaf, side in basis_shapes(hook.codec, hook.shape).items()}
    for leaf, size in {_RANGE: (2,), **sizes}.items():
        if hasattr(module, f"{_PREFIX}{leaf}"):
            raise SpecError(f"tap: {name or 'the model'} has a {_PREFIX}{leaf} of its own")
        tensor = tensors[leaf]
        if tuple(tensor.shape) != size:
            raise SpecError(f"tap: {name}: a {leaf} of {list(tensor.shape)} instead of {list(size)}")
        module.register_buffer(f"{_PREFIX}{leaf}", tensor)
    module.register_forward_hook(hook)


def _apply_tap(model: nn.Module, edit: Tap) -> None:
    sides = basis_shapes(edit.codec, edit.shape)
    if min(edit.shape) < 1 or max(sides.values(), default=0) > _LARGEST_BASIS:
        raise SpecError(f"tap: {edit.module}: maps of {list(edit.shape)} have no codec")
    module = _module(model, edit.module)
    _drop(module)
    # The values are read later. On the CPU, as all buffers are while a file is loaded.
    tensors = {name: torch.empty(side, side) for name, side in sides.items()} | {_RANGE: torch.empty(2)}
    _register(module, edit.module, TapHook(edit.codec, edit.shape, edit.fingerprint), tensors)


def _check_tap(model: nn.Module, edit: Tap) -> None:
    state = _state(model.get_submodule(edit.module), TapHook(edit.codec, edit.shape, edit.fingerprint))
    low, high = state.bounds.tolist()
    if not (bool(torch.isfinite(state.bounds).all()) and low <= high):
        raise CorruptCheckpointError(f"{edit.module}.tap_range is {low} to {high}: no range of a map")
    for name, basis in state.bases.items():
        # Decoders invert a basis by its transpose.
        product = basis.double() @ basis.double().T
        if not torch.allclose(product, torch.eye(len(basis), dtype=torch.float64), atol=1e-3):
            raise CorruptCheckpointError(f"{edit.module}.tap_{name} is not orthogonal")


# After all other edits: a tap codes the outputs of what they made of its module.
TAP = EditKind(record=Tap, apply=_apply_tap, order=20, check=_check_tap)
