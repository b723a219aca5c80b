"""Networks without swapped layers, taps and quantizers, for code that needs ordinary layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pydantic import JsonValue
from torch import nn

from cctool.base.networks import copied, drop_companions, has_companions
from cctool.transforms.codec.export import put_exported
from cctool.transforms.codec.taps import drop_taps, taps_of
from cctool.transforms.layers.base import SwappedLayer, WeightCache, swapped_layers


def plain_model(model: nn.Module) -> nn.Module:
    """The network with ordinary layers in place of swapped ones, without codecs and quantizers.

    Args:
        model: any network; not changed.

    Returns:
        ``model`` itself if nothing is swapped, tapped or quantized; else a copy that shares all tensors of
        the other modules. Layers without an ordinary counterpart stay swapped, and compute their weight in
        every pass.
    """
    layers = {name: layer.plain() for name, layer in swapped_layers(model).items()}
    found = {name: layer for name, layer in layers.items() if layer is not None}
    if not layers and not taps_of(model) and not has_companions(model):
        return model
    copy = _copy_with(model, found)
    drop_companions(copy)
    drop_taps(copy)
    for layer in swapped_layers(copy).values():
        if isinstance(getattr(layer, "cache", None), WeightCache):
            # A cached weight would hide from a trace which tensors it was computed from.
            vars(layer)["cache"] = WeightCache(keeps=False)
    return copy


def exportable(model: nn.Module, *, codec: bool, whole: Collection[str] = ()) -> nn.Module:
    """The network for other programs: ordinary layers, and codecs as exportable arithmetic.

    Args:
        model: any network; not changed.
        codec: whether maps are coded where the network has taps.
        whole: names of swapped layers that become one layer with the whole weight.

    Returns:
        ``model`` itself if nothing is swapped or tapped; quantizers stay. Small factors replace a weight
        where they take fewer bytes and multiply-accumulates.
    """
    layers = {
        name: (None if name in whole else layer.factored()) or layer.plain()
        for name, layer in swapped_layers(model).items()
    }
    found = {name: layer for name, layer in layers.items() if layer is not None}
    if not found and not taps_of(model):
        return model
    taps = set(taps_of(model))
    copy = _copy_with(model, found)
    drop_taps(copy)
    if codec:
        put_exported(copy, model, taps)
    return copy


def _copy_with(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    # What deepcopy finds in its memo is shared instead of copied.
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for name, layer in layers.items():
        layer.train(model.training)
        memo[id(model.get_submodule(name))] = layer
    return copied(model, memo)


def type_of(module: nn.Module) -> str:
    """Class name of a module; for a swapped layer that of the ordinary one and what it is made of.

    As in ``Linear (dct coefficient)``.
    """
    if not isinstance(module, SwappedLayer):
        return type(module).__name__
    ordinary = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn"))
    swap = module.swap("")
    kinds = list(dict.fromkeys([*_kernels(swap.arguments), swap.layer]))
    return f"{ordinary.__name__} ({' '.join(kinds)})"


def _kernels(arguments: JsonValue) -> Iterator[str]:
    """Kernels that a swap's arguments name."""
    if isinstance(arguments, dict):
        for key, value in arguments.items():
            if key == "kernel" and isinstance(value, str):
                yield value
            else:
                yield from _kernels(value)
    elif isinstance(arguments, list):
        for item in arguments:
            yield from _kernels(item)
