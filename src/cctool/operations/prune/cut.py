"""Networks with swapped layers where ordinary ones are needed, and the way of a cut back to them.

Channels are coupled, scored and compared on the plain network, in which ordinary layers stand for swapped
ones and no codec is at work. What was planned there is carried out on the network itself: ordinary tensors
are cut as everywhere, swapped layers by their own `taken`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from cctool.base.errors import PruningError
from cctool.base.networks import copied, qualified, some
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import with_masks
from cctool.checkpoint.edits.thin import Cut, thinned
from cctool.checkpoint.encoding import EncodedTensor
from cctool.operations.context import Context
from cctool.operations.examples import example
from cctool.operations.prune.stored_cut import cut_stored
from cctool.pruning.cut.surgery import CutPlan, apply_cut, named_tensors
from cctool.quantization.network.attach import quantizers_of
from cctool.quantization.network.edit import with_quantizers
from cctool.transforms.codec.sites import find_sites
from cctool.transforms.codec.taps import bypassed, drop_taps, tap_buffers, taps_of, with_taps
from cctool.transforms.layers.base import SwappedLayer, swapped_layers, with_swaps
from cctool.transforms.plain import plain_model

__all__ = [
    "CarriedOut",
    "carried_out",
    "cut_model",
    "forms_after",
    "plain_checkpoint",
    "thin_copy",
    "without_taps",
]


@dataclass(frozen=True)
class CarriedOut:
    """A checkpoint after a cut, and what could not follow it.

    Attributes:
        checkpoint: its model is the one that was cut.
        notes: for the history.
    """

    checkpoint: Checkpoint
    notes: tuple[str, ...] = ()


def plain_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of the plain network; it shares all tensors but the weights of swapped layers.

    Returns:
        The checkpoint itself where nothing is swapped and no codec and no quantizer is at work.
    """
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


def without_taps(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint whose maps are not coded; it shares all other tensors."""
    model = _sharing_copy(checkpoint.model)
    gone = tap_buffers(checkpoint.model)
    drop_taps(model)
    stored = {name: form for name, form in checkpoint.stored.items() if name not in gone}
    return replace(checkpoint, model=model, spec=with_taps(checkpoint.spec, model), stored=stored)


def carried_out(checkpoint: Checkpoint, plan: CutPlan, context: Context) -> CarriedOut:
    """Cut a checkpoint in place as it was planned on its plain network: tensors, spec and stored forms.

    Args:
        checkpoint: its model is changed; the state of its training is left to the caller.
        plan: of the plain network.
        context: knows the encodings.

    Raises:
        TransformError: a swapped layer cannot be cut so.
    """
    before = {name: tensor.detach() for name, tensor in named_tensors(checkpoint.model)}
    cut_model(checkpoint.model, plan)
    model = checkpoint.model
    attributes = [(module, name) for module, values in plan.attributes.items() for name in values]
    spec = thinned(checkpoint.spec, model, plan.tensors, attributes)
    stored, lost = forms_after(checkpoint.stored, before, model, plan, context)
    notes = [f"{name} is stored dense: its stored form cannot be cut so" for name in lost]
    if swapped_layers(model):
        spec = with_swaps(spec, model)
        notes += _not_smaller(before, model, plan)
    spec = with_quantizers(spec, model)
    cut = replace(checkpoint, spec=spec, stored=stored)
    if taps_of(model):
        _set_shapes(cut)
        cut = replace(cut, spec=with_taps(spec, model))
    return CarriedOut(cut, tuple(notes))


def cut_model(model: nn.Module, plan: CutPlan) -> None:
    """Cut a network in place as it was planned on its plain one.

    Raises:
        TransformError: a swapped layer cannot be cut so.
        PruningError: a plan touches a layer that has no ordinary counterpart.
    """
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SwappedLayer)
    }
    replaced: dict[int, SwappedLayer] = {}
    for name, layer in layers.items():
        cuts = _own(plan, name)
        unknown = cuts.keys() - {"weight", "bias"}
        if unknown:
            raise PruningError(f"{name}.{min(unknown)} cannot be cut: {name} has no ordinary counterpart")
        if cuts and id(layer) not in replaced:
            replaced[id(layer)] = layer.taken(cuts).train(layer.training)
    _put_in_place(model, replaced)
    _cut_quantizers(model, plan)
    apply_cut(
        model,
        CutPlan(
            {name: cuts for name, cuts in plan.tensors.items() if name.rpartition(".")[0] not in layers},
            {module: values for module, values in plan.attributes.items() if module not in layers},
        ),
    )


def _cut_quantizers(model: nn.Module, plan: CutPlan) -> None:
    """Keep the scales of the channels that stay."""
    held = quantizers_of(model)
    for name, point in ({} if held is None else dict(held.state.weights)).items():
        for cut in plan.tensors.get(name, ()):
            if held is not None and point.config.axis == cut.dim:
                held.take(name, cut.keep)


def _set_shapes(checkpoint: Checkpoint) -> None:
    """Tell taps the shape of their maps after a cut."""
    hooks = taps_of(checkpoint.model)
    with bypassed(checkpoint.model):
        for site in find_sites(checkpoint.model, example(checkpoint), tuple(hooks)):
            hooks[site.name].shape = site.shape


def thin_copy(model: nn.Module, plan: CutPlan) -> nn.Module:
    """A cut copy of a network, as it was planned on its plain one; it shares the tensors that stay whole."""
    copy = _sharing_copy(model)
    cut_model(copy, plan)
    return copy


def _sharing_copy(model: nn.Module) -> nn.Module:
    return copied(model, {id(tensor): tensor for _, tensor in named_tensors(model)})


def forms_after(
    stored: Mapping[str, EncodedTensor],
    before: Mapping[str, Tensor],
    model: nn.Module,
    plan: CutPlan,
    context: Context,
) -> tuple[dict[str, EncodedTensor], tuple[str, ...]]:
    """Cut stored forms as a network was cut, those of swapped layers as these cut their own tensors.

    Args:
        stored: forms before the cut.
        before: tensors before the cut, by name.
        model: after the cut.
        plan: of the plain network.
        context: knows the encodings.

    Returns:
        The forms after it, and names of tensors whose form cannot be cut so, which are stored dense.
    """
    owned = _owned_by_swapped(model)
    after = dict(named_tensors(model)) if owned else {}
    tensors = {name: cuts for name, cuts in plan.tensors.items() if name not in owned}
    lost = []
    for name in stored:
        if name not in owned:
            continue
        cuts = _explained(before[name].detach(), after[name].detach(), _own(plan, owned[name]))
        if cuts is None:
            lost.append(name)
        else:
            tensors[name] = cuts
    left = {name: form for name, form in stored.items() if name not in lost}
    return cut_stored(left, CutPlan(tensors, {}), context), tuple(lost)


def _own(plan: CutPlan, module: str) -> dict[str, Sequence[Cut]]:
    """Cuts of a module's own tensors, by their names in it."""
    return {
        name.rpartition(".")[2]: cuts
        for name, cuts in plan.tensors.items()
        if name.rpartition(".")[0] == module
    }


def _put_in_place(model: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if id(child) in replaced:
                module._modules[key] = replaced[id(child)]


def _owned_by_swapped(model: nn.Module) -> dict[str, str]:
    """Names of tensors that lie in swapped layers, with the name of the layer."""
    return {
        qualified(name, leaf): name
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, SwappedLayer)
        for leaf in layer.state_dict()
    }


def _explained(before: Tensor, after: Tensor, cuts: Mapping[str, Sequence[Cut]]) -> tuple[Cut, ...] | None:
    """Which cuts of a layer's ordinary tensors make one tensor of another; None where none do."""
    if before.dim() != after.dim():
        return None
    given = [cut for several in cuts.values() for cut in several]
    changed = [
        dim for dim, (old, new) in enumerate(zip(before.shape, after.shape, strict=True)) if old != new
    ]
    fitting = [
        [
            replace(cut, dim=dim)
            for cut in given
            if cut.size == before.shape[dim] and cut.keep.numel() == after.shape[dim]
        ]
        for dim in changed
    ]
    for chosen in product(*fitting):
        small = before
        for cut in chosen:
            small = small.index_select(cut.dim, cut.keep.to(small.device))
        if torch.equal(small, after):
            return tuple(chosen)
    return None


def _not_smaller(before: Mapping[str, Tensor], model: nn.Module, plan: CutPlan) -> list[str]:
    """Swapped layers that were cut and store as much as before."""
    whole = [
        name
        for name, layer in swapped_layers(model).items()
        if _own(plan, name)
        and all(
            parameter.shape == before[qualified(name, leaf)].shape
            for leaf, parameter in layer.named_parameters(recurse=False)
            if leaf != "bias"
        )
    ]
    if not whole:
        return []
    return [
        f"{some(whole)} compute fewer channels from as many coefficients: they are transformed along what "
        "was cut; `cctool transform` again fits fewer to them"
    ]
