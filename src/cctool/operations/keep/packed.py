"""Tensors that files store in few bits: cut without decoding, and encoded again after training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn

from cctool.base.networks import qualified
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.thin import Cut
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.payload import MemoryPlace, place
from cctool.operations.context import Context
from cctool.operations.keep.codebooks import codebooks_after, keeping_codebooks
from cctool.operations.keep.encode import encode_under_mask, masks_by_place
from cctool.operations.keep.follower import Change, Cutting, Followed, Follower, own_cuts, within
from cctool.pruning.cut.surgery import CutPlan
from cctool.training.constraints.base import Constraint
from cctool.transforms.layers.base import SwappedLayer


class PackedTensors(Follower):
    """Encoded tensors: integers with scales, codebooks, float16."""

    in_programs = True

    def after_cut(self, checkpoint: Checkpoint, cutting: Cutting) -> Followed:
        """Cut stored forms like their tensors; those of swapped layers as the layers cut themselves."""
        found = _cuts_of_owned(checkpoint.model, checkpoint.stored, cutting)
        lost = [name for name, cuts in found.items() if cuts is None]
        tensors = {**cutting.plan.tensors, **{name: cuts for name, cuts in found.items() if cuts is not None}}
        left = {name: form for name, form in checkpoint.stored.items() if name not in lost}
        stored = cut_stored(left, CutPlan(tensors, {}), cutting.context)
        notes = tuple(f"{name} is stored dense: its stored form cannot be cut so" for name in lost)
        return Followed(replace(checkpoint, stored=stored), notes)

    def after_new_head(self, checkpoint: Checkpoint, names: Collection[str], context: Context) -> Followed:
        """Fresh layers are stored dense."""
        stored = {name: form for name, form in checkpoint.stored.items() if not within(name, names)}
        return Followed(replace(checkpoint, stored=stored))

    def constraints(self, checkpoint: Checkpoint, forms: Mapping[str, EncodedTensor]) -> Sequence[Constraint]:
        """Weights that share an entry of a codebook must stay equal."""
        return keeping_codebooks(replace(checkpoint, stored=forms))

    def after_change(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Encode again what was decoded."""
        return self.after_training(checkpoint, change)

    def after_training(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Encode again what was decoded for training."""
        if not change.forms:
            return Followed(checkpoint)
        return Followed(encoded_again(checkpoint, replace(checkpoint, stored=change.forms), change.context))


def encoded_again(checkpoint: Checkpoint, earlier: Checkpoint, context: Context) -> Checkpoint:
    """Encode a dense checkpoint's tensors as ``earlier`` stored them; the model gets the decoded values.

    Weights that trained with `keeping_codebooks` keep their assignment and are not rounded. Of ``earlier``
    only encodings and their parameters are used.
    """
    state = checkpoint.model.state_dict()
    masks = masks_by_place(checkpoint.model)
    encodings = context.tables.encodings
    stored: dict[str, EncodedTensor] = {}
    # Tied tensors are encoded once, and stored once.
    made: dict[MemoryPlace, EncodedTensor] = {}
    shared = codebooks_after(checkpoint, earlier)
    for name, form in earlier.stored.items():
        if name in shared:
            stored[name] = shared[name]
            continue
        tensor: Tensor = state[name]
        if place(tensor) not in made:
            encoded = encode_under_mask(
                tensor.detach().cpu(), masks.get(place(tensor)), encodings[form.encoding], form.parameters
            )
            made[place(tensor)] = encoded
            tensor.copy_(encodings[encoded.encoding].decode(encoded))
        stored[name] = made[place(tensor)]
    return replace(checkpoint, stored=stored)


def cut_stored(
    stored: Mapping[str, EncodedTensor], plan: CutPlan, context: Context
) -> dict[str, EncodedTensor]:
    """Cut stored integers, scales and bits as a plan cuts the model's tensors; nothing is rounded again."""
    cut: dict[str, EncodedTensor] = {}
    done: dict[int, EncodedTensor] = {}
    parts: dict[int, Tensor] = {}
    for name, encoded in stored.items():
        if id(encoded) not in done:
            smaller = encoded
            for piece in plan.tensors.get(name, ()):
                take = context.tables.encodings[encoded.encoding].take
                smaller = take(smaller, piece.dim, piece.keep.cpu())
            done[id(encoded)] = _sharing(smaller, encoded, parts)
        cut[name] = done[id(encoded)]
    return cut


def _sharing(smaller: EncodedTensor, encoded: EncodedTensor, parts: dict[int, Tensor]) -> EncodedTensor:
    """Share again the parts that forms shared before the cut, as a mask and its weight share bits."""
    shared = {}
    for name, part in smaller.parts.items():
        before = encoded.parts.get(name)
        known = part if before is None else parts.setdefault(id(before), part)
        shared[name] = known if torch.equal(known, part) else part
    return replace(smaller, parts=shared)


def _cuts_of_owned(
    model: nn.Module, names: Collection[str], cutting: Cutting
) -> dict[str, tuple[Cut, ...] | None]:
    """The cuts of tensors in swapped layers, which a plan does not name, read off the model after the cut.

    Returns:
        Cuts by name, for those of ``names`` in swapped layers; None for a tensor that no cut explains.
    """
    owners = {
        qualified(name, leaf): name
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, SwappedLayer)
        for leaf in layer.state_dict()
    }
    after = model.state_dict() if owners else {}
    return {
        name: _explained(cutting.before[name], after[name].detach(), own_cuts(cutting.plan, owners[name]))
        for name in names
        if name in owners
    }


def _explained(before: Tensor, after: Tensor, cuts: Mapping[str, Sequence[Cut]]) -> tuple[Cut, ...] | None:
    """The cuts of the ordinary layer's tensors that turn ``before`` into ``after``; None if none do."""
    if before.dim() != after.dim():
        return None
    given = [cut for several in cuts.values() for cut in several]
    fitting = [
        [replace(cut, dim=dim) for cut in given if (cut.size, cut.keep.numel()) == (old, new)]
        for dim, (old, new) in enumerate(zip(before.shape, after.shape, strict=True))
        if old != new
    ]
    # Several cuts may have the right sizes; only the one whose result is equal is the layer's own.
    for chosen in product(*fitting):
        small = before
        for cut in chosen:
            small = small.index_select(cut.dim, cut.keep.to(small.device))
        if torch.equal(small, after):
            return tuple(chosen)
    return None
