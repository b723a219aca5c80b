"""Tensors of a module that are computed from others before each call, and plain parameters in their place.

Three of torch's tools make such tensors: `torch.nn.utils.parametrize`, the older hooks of `weight_norm` and
`spectral_norm`, and the hooks of `torch.nn.utils.prune`. Nothing of them is called to make a tensor plain, so
that this works on modules whose parameters are on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.weight_norm import WeightNorm

from cctool.base.errors import SpecError
from cctool.base.networks import some

# What an older hook computes a tensor from, by the suffixes of their names.
_PARTS: dict[type, tuple[str, ...]] = {
    WeightNorm: ("_g", "_v"),
    SpectralNorm: ("_orig", "_u", "_v"),
    BasePruningMethod: ("_orig", "_mask"),
}


def computed_tensors(module: nn.Module) -> dict[str, str]:
    """Names of a module's own tensors that are computed before each call, and what computes them, in words.

    >>> computed_tensors(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    {'weight': 'weight_norm'}
    """
    found = {name: _title(type(hook)) for _, name, hook in _hooks(module)}
    if parametrize.is_parametrized(module):
        for name, steps in _parametrizations(module).items():
            found[name] = ", ".join(dict.fromkeys(_title(type(step)) for step in steps))
    return found


def computed_layers(model: nn.Module) -> dict[str, str]:
    """Names of a network's modules with computed tensors, and what computes them, in words."""
    found = {name or "the network": computed_tensors(module) for name, module in model.named_modules()}
    return {name: ", ".join(dict.fromkeys(kinds.values())) for name, kinds in found.items() if kinds}


def why_not_parameters(model: nn.Module) -> str:
    """A sentence on weights that are computed at each call and on the way out; "" if a network has none."""
    layers = computed_layers(model)
    kinds = ", ".join(dict.fromkeys(layers.values()))
    if not layers:
        return ""
    return (
        f"the weights of {some(list(layers))} are computed at each call ({kinds}) and are no parameters: "
        "`cctool transform --fold` makes them plain, and what it writes can be pruned"
    )


def parts_of(module: nn.Module, name: str) -> list[Tensor]:
    """The parameters and buffers that a computed tensor is made of."""
    if parametrize.is_parametrized(module, name):
        steps: Any = _parametrizations(module)[name]
        return [*steps.parameters(), *steps.buffers()]
    suffixes = next((_PARTS[_kind(hook)] for _, known, hook in _hooks(module) if known == name), ())
    parts = (getattr(module, name + suffix, None) for suffix in suffixes)
    return [part for part in parts if isinstance(part, Tensor)]


@torch.no_grad()
def computed_values(module: nn.Module) -> dict[str, Tensor]:
    """The computed tensors of a module in evaluation mode, detached, by name."""
    found: dict[str, Tensor] = {}
    for _, name, hook in _hooks(module):
        if isinstance(hook, SpectralNorm):
            found[name] = hook.compute_weight(module, do_power_iteration=False)
        elif isinstance(hook, WeightNorm):
            found[name] = hook.compute_weight(module)
        else:
            found[name] = hook.apply_mask(module)
    if parametrize.is_parametrized(module):
        found |= {name: getattr(module, name) for name in _parametrizations(module)}
    return {name: value.detach().clone() for name, value in found.items()}


def make_plain(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put parameters of these values in the place of a module's computed tensors, in place.

    Tensors that are plain already stay as they are.

    Raises:
        SpecError: if a name is no tensor of the module, or parametrized ones are not all named.
    """
    unknown = [n for n in values if n not in computed_tensors(module) and n not in module._parameters]
    if unknown:
        raise SpecError(f"fold: a {type(module).__name__} has no tensor {unknown[0]!r}")
    # Hooks before parametrizations, in their order: one may make what the next computes with.
    for key, name, hook in list(_hooks(module)):
        if name in values:
            _drop_hook(module, key, name, hook)
            _put(module, name, values[name])
    if parametrize.is_parametrized(module) and _parametrizations(module).keys() & values.keys():
        _drop_parametrizations(module, values)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    # By setattr, because recurrent layers keep a list of their weights besides `_parameters`.
    setattr(module, name, nn.Parameter(value, requires_grad=value.is_floating_point() or value.is_complex()))


def _parametrizations(module: nn.Module) -> Mapping[str, Any]:
    found: Any = module.parametrizations
    return dict(found.items())


def _drop_parametrizations(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    names = list(_parametrizations(module))
    missing = [name for name in names if name not in values]
    if missing:
        raise SpecError(f"fold: {missing[0]!r} of a {type(module).__name__} is parametrized, too")
    # Not by torch's own function: it calls the parametrizations, and takes properties off a class that copies
    # of the module share.
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name in names:
        _put(module, name, values[name])


def _hooks(module: nn.Module) -> Iterator[tuple[int, str, Any]]:
    """Key, name of the computed tensor and hook of each of torch's older hooks on a module."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, BasePruningMethod):
            yield key, str(hook._tensor_name), hook
        elif isinstance(hook, (WeightNorm, SpectralNorm)):
            yield key, hook.name, hook


def _kind(hook: Any) -> type:
    return next(kind for kind in _PARTS if isinstance(hook, kind))


def _drop_hook(module: nn.Module, key: int, name: str, hook: Any) -> None:
    del module._forward_pre_hooks[key]
    module._forward_pre_hooks_with_kwargs.pop(key, None)
    for table in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for number, other in list(table.items()):
            inner: Any = getattr(other, "hook", other)
            of_spectral = isinstance(inner, (SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook))
            if of_spectral and inner.fn is hook:
                del table[number]
    for suffix in _PARTS[_kind(hook)]:
        module._parameters.pop(name + suffix, None)
        module._buffers.pop(name + suffix, None)
    module.__dict__.pop(name, None)


def _title(kind: type) -> str:
    known = {
        "WeightNorm": "weight_norm",
        "_WeightNorm": "weight_norm",
        "SpectralNorm": "spectral_norm",
        "_SpectralNorm": "spectral_norm",
        "_Orthogonal": "orthogonal",
    }
    if issubclass(kind, BasePruningMethod):
        return "torch.nn.utils.prune"
    return known.get(kind.__name__, kind.__name__)
