"""Folded layers, widths of layers, and swapped layers: those of cctool that replace the architecture's.

Channels are coupled, scored and compared on the plain network, which has ordinary layers instead of swapped
ones, and no codecs. The plan is carried out on the network itself: ordinary tensors are cut as always,
swapped layers by their method `taken`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from cctool.base.errors import PruningError
from cctool.base.networks import qualified, some
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.fold import FOLD
from cctool.checkpoint.edits.mask import with_masks
from cctool.checkpoint.edits.thin import THIN, thinned
from cctool.checkpoint.spec import ModelSpec
from cctool.operations.context import Context
from cctool.operations.keep.follower import Cutting, Followed, Follower, own_cuts, within
from cctool.pruning.cut.surgery import CutPlan
from cctool.transforms.layers.base import SwappedLayer, swapped_layers, with_swaps
from cctool.transforms.plain import plain_model
from cctool.transforms.swap import SWAP

if TYPE_CHECKING:
    from cctool.pruning.cut.planner import Planner


class FoldedLayers(Follower):
    """Plain layers that do the work of batch norms, computed weights and parallel branches.

    They are ordinary layers: cuts, masks and quantizers treat them so, and a fresh last layer in the place of
    one keeps its bias.
    """

    kind = "fold"
    edit = FOLD
    in_programs = True


class Widths(Follower):
    """Final shapes of tensors, and integer attributes of modules."""

    kind = "thin"
    edit = THIN
    in_programs = True

    def after_cut(self, checkpoint: Checkpoint, cutting: Cutting) -> Followed:
        """Write the new shapes and attributes into the spec."""
        plan = cutting.plan
        attributes = [(module, name) for module, values in plan.attributes.items() for name in values]
        spec = thinned(checkpoint.spec, checkpoint.model, plan.tensors, attributes)
        return Followed(replace(checkpoint, spec=spec))

    def after_new_head(self, checkpoint: Checkpoint, names: Collection[str], context: Context) -> Followed:
        """Write the shapes of layers that were cut before they were replaced."""
        cut = {str(edit["module"]) for edit in checkpoint.spec.edits if edit.get("kind") == "thin"}
        if cut.isdisjoint(names):
            return Followed(checkpoint)
        return Followed(replace(checkpoint, spec=thinned(checkpoint.spec, checkpoint.model, (), ())))


class SwappedLayers(Follower):
    """Swapped layers: coefficients in a transform domain, basis functions, complex numbers."""

    kind = "swap"
    edit = SWAP
    in_programs = True

    def cut(self, model: nn.Module, plan: CutPlan) -> Collection[str]:
        """Let every swapped layer that the plan touches cut what it stores.

        Raises:
            TransformError: a swapped layer cannot be cut so.
            PruningError: a plan touches a layer that has no ordinary counterpart.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        layers = {name: module for name, module in modules.items() if isinstance(module, SwappedLayer)}
        replaced: dict[int, SwappedLayer] = {}
        for name, layer in layers.items():
            cuts = own_cuts(plan, name)
            unknown = cuts.keys() - {"weight", "bias"}
            if unknown:
                raise PruningError(f"{name}.{min(unknown)} cannot be cut: {name} has no ordinary counterpart")
            # A layer that is used under several names is cut once.
            if cuts and id(layer) not in replaced:
                replaced[id(layer)] = layer.taken(cuts).train(layer.training)
        for module in list(model.modules()):
            for key, child in module._modules.items():
                if id(child) in replaced:
                    module._modules[key] = replaced[id(child)]
        return layers.keys()

    def after_cut(self, checkpoint: Checkpoint, cutting: Cutting) -> Followed:
        """Write the layers' arguments into the spec; notes name those that store as much as before."""
        model = checkpoint.model
        if not swapped_layers(model):
            return Followed(checkpoint)
        spec = with_swaps(checkpoint.spec, model)
        return Followed(replace(checkpoint, spec=spec), _not_smaller(model, cutting))

    def after_new_head(self, checkpoint: Checkpoint, names: Collection[str], context: Context) -> Followed:
        """A fresh layer is an ordinary one."""
        gone = {
            str(edit["module"])
            for edit in checkpoint.spec.edits
            if edit.get("kind") == "swap" and within(str(edit["module"]), names)
        }
        if not gone:
            return Followed(checkpoint)
        edits = tuple(
            edit
            for edit in checkpoint.spec.edits
            if edit.get("kind") != "swap" or edit.get("module") not in gone
        )
        note = f"the fresh {some(sorted(gone))} is an ordinary layer: `cctool transform` transforms it again"
        spec = checkpoint.spec.model_copy(update={"edits": edits})
        return Followed(replace(checkpoint, spec=spec), (note,))

    def plain(self, checkpoint: Checkpoint) -> Checkpoint:
        """The network of ordinary layers without codecs and quantizers; it shares all other tensors."""
        model = plain_model(checkpoint.model)
        if model is checkpoint.model:
            return checkpoint
        gone = swapped_layers(checkpoint.model).keys() - swapped_layers(model).keys()
        edits = tuple(
            edit
            for edit in checkpoint.spec.edits
            if edit.get("kind") not in ("tap", "quantize")
            and not (edit.get("kind") == "swap" and edit.get("module") in gone)
        )
        spec = with_masks(checkpoint.spec.model_copy(update={"edits": edits}), model)
        present = model.state_dict().keys()
        stored = {name: form for name, form in checkpoint.stored.items() if name in present}
        return replace(checkpoint, model=model, spec=spec, stored=stored, resume=None)

    def fixed_widths(self, planner: Planner, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Families of layers that compute with complex numbers, which have no plain form to plan a cut on."""
        owners, layers = _uncut(planner.model, checkpoint.spec), list(swapped_layers(planner.model))
        if layers and not planner.graph.families:
            more = f" and {len(layers) - 1} layers more" if len(layers) > 1 else ""
            raise PruningError(
                f"nothing can be cut: {layers[0]}{more} compute with complex numbers, and have no ordinary "
                "counterpart; prune before the transform"
            )
        found: dict[str, str] = {}
        for family in planner.graph.families:
            names = (place.tensor for place in family.places)
            holder = next((owner for name in names for owner in owners if name.startswith(f"{owner}.")), None)
            if holder is not None:
                found[family.name] = (
                    f"{holder} computes with complex numbers, and has no ordinary counterpart"
                )
        return found


def _not_smaller(model: nn.Module, cutting: Cutting) -> tuple[str, ...]:
    """A note on swapped layers that were cut and store as much as before."""
    whole = [
        name
        for name, layer in swapped_layers(model).items()
        if own_cuts(cutting.plan, name)
        and all(
            parameter.shape == cutting.before[qualified(name, leaf)].shape
            for leaf, parameter in layer.named_parameters(recurse=False)
            if leaf != "bias"
        )
    ]
    if not whole:
        return ()
    return (
        f"{some(whole)} compute fewer channels from as many coefficients: they are transformed along what "
        "was cut; `cctool transform` again fits fewer to them",
    )


def _uncut(plain: nn.Module, spec: ModelSpec) -> list[str]:
    """Modules of swap edits that are still swapped in the plain network, or have modules inside them."""
    edits = (str(edit["module"]) for edit in spec.edits if edit.get("kind") == "swap")
    layers = swapped_layers(plain)
    return [
        name for name in edits if name in layers or any(True for _ in plain.get_submodule(name).children())
    ]
