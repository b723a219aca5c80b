"""Masks, stored as bits, and masked weights, stored as the values that the bits leave.

Training never changes a mask, so storing it again loses nothing. Every product gets this form.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import MASK, mask_name, masked_places, with_masks
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.payload import place
from cctool.checkpoint.tables import Tables
from cctool.operations.context import Context
from cctool.operations.keep.encode import names_by_place
from cctool.operations.keep.follower import Change, Followed, Follower
from cctool.quantization.encodings.bitmask import BITS
from cctool.quantization.encodings.masked import MASKED, encode_masked, inner_of, narrowed, widened
from cctool.training.constraints.base import Constraint
from cctool.training.constraints.masked_weights import keeping_masks

_SMALLEST = 512
"""Number of elements below which the entry in the file's index costs more bytes than the bits save."""


class Masks(Follower):
    """Masks, and masked weights without their zeros. A cut treats a mask like its parameter."""

    kind = "mask"
    edit = MASK
    in_programs = True

    def after_masking(self, checkpoint: Checkpoint) -> Checkpoint:
        """Record in the spec which parameters have masks, and store these as bits."""
        present = checkpoint.model.state_dict().keys()
        stored = {name: form for name, form in checkpoint.stored.items() if name in present}
        spec = with_masks(checkpoint.spec, checkpoint.model)
        return stored_with_masks(replace(checkpoint, spec=spec, stored=stored))

    def after_new_head(self, checkpoint: Checkpoint, names: Collection[str], context: Context) -> Followed:
        """Fresh layers have no masks."""
        if not any(edit.get("kind") == "mask" and edit["module"] in names for edit in checkpoint.spec.edits):
            return Followed(checkpoint)
        return Followed(self.after_masking(checkpoint), ("the fresh last layer has no mask",))

    def constraints(self, checkpoint: Checkpoint, forms: Mapping[str, EncodedTensor]) -> Sequence[Constraint]:
        """Masked weights stay zero."""
        return keeping_masks(checkpoint.model)

    def after_change(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Store what masks leave."""
        return Followed(stored_with_masks(checkpoint))

    def after_training(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Store what masks leave."""
        return Followed(stored_with_masks(checkpoint))

    def as_stored(self, checkpoint: Checkpoint, tables: Tables, *, settle: bool) -> Checkpoint:
        """Store what masks leave."""
        return stored_with_masks(checkpoint)

    def own_forms(self, checkpoint: Checkpoint) -> Collection[str]:
        """Masks, and masked weights whose remaining values are stored dense."""
        return {
            name
            for name, form in checkpoint.stored.items()
            if form.encoding == BITS.name
            or (form.encoding == MASKED.name and inner_of(form.encoding, form.parameters).encoding is None)
        }


def stored_with_masks(checkpoint: Checkpoint) -> Checkpoint:
    """Store masks as bits and masked weights without their zeros, without rounding anything.

    A weight that is stored in few bits keeps its levels; one whose mask was dropped gets its inner form. A
    mask and its weight share one tensor of bits. Small tensors stay dense.
    """
    masks = {masked.name: masked for masked in masked_places(checkpoint.model, remove_duplicate=False)}
    stored = {}
    for name, form in checkpoint.stored.items():
        idle = form.encoding == MASKED.name and name not in masks
        left = widened(form) if idle else form
        if left is not None:
            stored[name] = left
    names = names_by_place(checkpoint.model) if masks else {}
    for masked in masked_places(checkpoint.model) if masks else ():
        mask, tensor = masked.mask, masked.parameter.detach()
        earlier = stored.get(masked.name)
        if earlier is None and (mask.numel() < _SMALLEST or not tensor.is_floating_point()):
            continue
        bits = BITS.encode(mask, {})
        stored |= dict.fromkeys(names.get(place(mask), [mask_name(masked.name)]), bits)
        part = bits.parts["bits"]
        form = encode_masked(tensor, mask, bits=part) if earlier is None else narrowed(earlier, mask, part)
        stored |= dict.fromkeys(names.get(place(tensor), [masked.name]), form)
    return replace(checkpoint, stored=stored)
