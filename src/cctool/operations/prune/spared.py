"""Widths that a network's own transforms keep: complex layers, and codecs that mix channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cctool.base.errors import PruningError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec
from cctool.graph.execution import execute
from cctool.pruning.cut.planner import Planner
from cctool.pruning.cut.surgery import plan_cut, sketch
from cctool.pruning.select.order import Selection
from cctool.transforms.codec.taps import taps_of
from cctool.transforms.layers.base import swapped_layers

__all__ = ["frozen_families", "refuse_all_complex"]


def frozen_families(planner: Planner, checkpoint: Checkpoint) -> dict[str, str]:
    """Families that a network's own transforms keep at their width, by name, with the reason.

    Args:
        planner: of the plain network.
        checkpoint: the network itself.
    """
    found: dict[str, str] = {}
    owners = _uncut(planner.model, checkpoint.spec)
    for family in planner.graph.families:
        names = (place.tensor for place in family.places)
        holder = next((owner for name in names for owner in owners if name.startswith(f"{owner}.")), None)
        if holder is not None:
            found[family.name] = f"{holder} computes with complex numbers, and has no ordinary counterpart"
    hooks = taps_of(checkpoint.model)
    mixed = {name: hook.shape[0] for name, hook in hooks.items() if hook.codec.channel_klt}
    return {**(_passing(planner, mixed) if mixed else {}), **found}


def refuse_all_complex(planner: Planner) -> None:
    """Say why where complex layers leave nothing to cut.

    Raises:
        PruningError: naming the first of them.
    """
    layers = list(swapped_layers(planner.model))
    if layers and not planner.graph.families:
        more = f" and {len(layers) - 1} layers more" if len(layers) > 1 else ""
        raise PruningError(
            f"nothing can be cut: {layers[0]}{more} compute with complex numbers, and have no ordinary "
            "counterpart; prune before the transform"
        )


def _uncut(plain: nn.Module, spec: ModelSpec) -> list[str]:
    """Modules that stay swapped in the plain network, but for those that hold the architecture's tensors."""
    edits = (str(edit["module"]) for edit in spec.edits if edit.get("kind") == "swap")
    layers = swapped_layers(plain)
    return [
        name for name in edits if name in layers or any(True for _ in plain.get_submodule(name).children())
    ]


def _passing(planner: Planner, channels: Mapping[str, int]) -> dict[str, str]:
    """Families whose cut would change how many channels these modules put out."""
    found = {}
    for number, family in enumerate(planner.graph.families):
        kept = [torch.ones(other.units, dtype=torch.bool) for other in planner.graph.families]
        kept[number][0] = family.units == 1
        plan = plan_cut(planner.model, planner.graph, Selection(tuple(kept), {}))
        widths = _widths(sketch(planner.model, plan), planner.inputs, channels)
        changed = [name for name, width in widths.items() if width != channels[name]]
        if changed:
            found[family.name] = f"the codec behind {changed[0]} mixes its channels by a calibrated basis"
    return found


def _widths(model: nn.Module, inputs: Sequence[Tensor], names: Iterable[str]) -> dict[str, int]:
    """Channels that modules put out."""
    widths: dict[str, int] = {}

    def note(name: str, output: Tensor) -> None:
        widths[name] = output.shape[1]

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name in names
    ]
    try:
        execute(model, inputs, [])
    finally:
        for handle in handles:
            handle.remove()
    return widths
