"""What is at work in a network without being part of it, such as quantizers: modules and hooks with a mark.

Whoever must see the network alone (coupling channels, counting, fingerprints of weights) sets them aside
without knowing what they are.
"""

from __future__ import annotations

from torch import nn

__all__ = ["MARK", "companion_parameters", "companion_tensors", "drop_companions", "has_companions"]

MARK = "is_companion"
"""Attribute that is true of a companion's module or hook."""


def has_companions(model: nn.Module) -> bool:
    """Whether modules with the mark stand in a network."""
    return any(getattr(child, MARK, False) for child in model._modules.values() if child is not None)


def drop_companions(model: nn.Module) -> None:
    """Take a network's companions away, in place."""
    for key, child in list(model._modules.items()):
        if getattr(child, MARK, False):
            del model._modules[key]
    for number in [n for n, hook in model._forward_pre_hooks.items() if getattr(hook, MARK, False)]:
        del model._forward_pre_hooks[number]
    for number in [n for n, hook in model._forward_hooks.items() if getattr(hook, MARK, False)]:
        del model._forward_hooks[number]
        model._forward_hooks_always_called.pop(number, None)


def companion_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of companions, as learnt steps of quantizers."""
    return [
        parameter
        for child in model._modules.values()
        if child is not None and getattr(child, MARK, False)
        for parameter in child.parameters()
    ]


def companion_tensors(model: nn.Module) -> set[str]:
    """Names in the state dict of tensors that belong to companions."""
    return {
        f"{key}.{name}"
        for key, child in model._modules.items()
        if child is not None and getattr(child, MARK, False)
        for name in child.state_dict()
    }
