"""Networks without swapped layers and taps, for whatever must see ordinary ones."""

from __future__ import annotations

from torch import nn

from cctool.copying import copied
from cctool.transforms.swapped import swapped_layers

__all__ = ["plain_model"]


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
