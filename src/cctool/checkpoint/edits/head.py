"""The `head` edit: a last layer with another number of outputs than the architecture gives it."""

from __future__ import annotations

from typing import Literal

from torch import nn

from cctool.base.errors import SpecError
from cctool.base.networks import put_everywhere
from cctool.checkpoint.spec import Dimension, Edit
from cctool.checkpoint.tables import EditKind


class Head(Edit):
    """The number of outputs of a linear layer or convolution, which keeps its other settings."""

    kind: Literal["head"] = "head"
    outputs: Dimension


def can_be_head(layer: nn.Module) -> bool:
    """Whether it is a linear layer or an ungrouped 2-d convolution."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def fresh_head(layer: nn.Module, outputs: int) -> nn.Module:
    """A layer as torch initialises it, with the inputs and settings of ``layer`` and other outputs.

    It is on the CPU unless an architecture is being built elsewhere.

    Raises:
        SpecError: if ``layer`` is neither a linear layer nor an ungrouped 2-d convolution.
    """
    made: nn.Module
    bias = getattr(layer, "bias", None) is not None
    if isinstance(layer, nn.Linear):
        made = nn.Linear(layer.weight.shape[1], outputs, bias=bias, dtype=layer.weight.dtype)
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
        made = nn.Conv2d(
            layer.weight.shape[1],
            outputs,
            layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            bias=bias,
            padding_mode=layer.padding_mode,
            dtype=layer.weight.dtype,
        )
    else:
        raise SpecError(f"head: a {type(layer).__name__} cannot be given another number of outputs")
    return made.train(layer.training)


def put_head(model: nn.Module, name: str, layer: nn.Module) -> tuple[str, ...]:
    """Replace a module everywhere in a network, in place; returns all names that it has there.

    Raises:
        SpecError: if there is no such module, or it is the network itself.
    """
    try:
        present = model.get_submodule(name)
    except AttributeError:
        raise SpecError(f"head: the architecture has no module {name!r}") from None
    if present is model:
        raise SpecError("head: a network that is a single layer cannot be given another one")
    put_everywhere(model, present, layer)
    return tuple(found for found, module in model.named_modules(remove_duplicate=False) if module is layer)


def _apply_head(model: nn.Module, edit: Head) -> None:
    try:
        present = model.get_submodule(edit.module)
    except AttributeError:
        raise SpecError(f"head: the architecture has no module {edit.module!r}") from None
    put_head(model, edit.module, fresh_head(present, edit.outputs))


# Before cuts, which may only narrow what the architecture and this edit make.
HEAD = EditKind(record=Head, apply=_apply_head, order=-5)
