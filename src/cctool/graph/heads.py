"""Which layers give a network's outputs: those that a new number of classes replaces."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cctool.base.errors import ArchitectureError
from cctool.base.networks import some
from cctool.checkpoint.edits.head import can_be_head
from cctool.graph.channels import OUTPUT_WIDTH, couple
from cctool.graph.execution import execute, tensors_in


def output_layers(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[str, ...]:
    """Names of the linear layers and ungrouped convolutions whose channels are those of the outputs.

    Found by following channels, not by name: a pooling or a resizing may come after the layer, several layers
    may be added up, and auxiliary outputs, those in training mode only included, have layers of their own.

    Args:
        model: a network of ordinary layers, in any mode; it is not changed.
        inputs: positional arguments of its forward, on its device.

    Raises:
        ArchitectureError: if there is no such layer, one is not as wide as the first output, or something
            behind them has a value for each channel, too.
    """
    modules = dict(model.named_modules())
    fixed = [item for item in couple(model, inputs).frozen if item.reason == OUTPUT_WIDTH]
    found: dict[str, int] = {}
    for item in fixed:
        owner, _, leaf = item.parameter.rpartition(".")
        if can_be_head(modules[owner]) and leaf == "weight" and item.dim == 0 and item.indices == item.of:
            found[owner] = item.of
    owners = dict.fromkeys(item.parameter.rpartition(".")[0] for item in fixed)
    others = [owner or "the network" for owner in owners if owner not in found]
    first = next(tensors_in(execute(model, inputs, [])), None)
    width = first.shape[1] if first is not None and first.dim() > 1 else None
    if not found or others:
        why = f": {some(others)} too has a value for each of them" if others else ""
        raise ArchitectureError(
            f"no linear layer or convolution alone gives this network's outputs{why}; --new-head cannot "
            "replace it"
        )
    if set(found.values()) != {width}:
        widths = ", ".join(f"{name} {outputs}" for name, outputs in found.items())
        raise ArchitectureError(
            f"the layers of the network's outputs ({widths}) are not all as wide as its first output "
            f"({width}), so it is unclear which gives the classes; --new-head cannot replace it"
        )
    return tuple(found)
