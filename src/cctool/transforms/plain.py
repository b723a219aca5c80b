"""Networks without swapped layers and taps, for whatever must see ordinary ones."""

from __future__ import annotations

from torch import nn

from cctool.copying import copied
from cctool.transforms.swapped import SwappedLayer, swapped_layers

__all__ = ["plain_model", "type_of"]


def plain_model(model: nn.Module) -> nn.Module:
    """The network with ordinary layers in place of swapped ones, which computes the same.

    Args:
        model: any network; it stays as it is.

    Returns:
        ``model`` itself where nothing is swapped; else a copy that shares all tensors of the other modules.
        Layers that have no ordinary counterpart stay swapped.
    """
    layers = {name: layer.plain() for name, layer in swapped_layers(model).items()}
    found = {id(model.get_submodule(name)): layer for name, layer in layers.items() if layer is not None}
    if not found:
        return model
    for layer in found.values():
        layer.train(model.training)
    memo: dict[int, object] = dict(found)
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    return copied(model, memo)


def type_of(module: nn.Module) -> str:
    """Class name of a module; of a swapped layer that of the ordinary one, with what it is made of.

    As in ``Linear (coefficient)``.
    """
    if not isinstance(module, SwappedLayer):
        return type(module).__name__
    ordinary = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn"))
    return f"{ordinary.__name__} ({module.swap('').layer})"
