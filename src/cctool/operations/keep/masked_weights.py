"""How masks and masked weights lie in files: as bits, and as what the bits leave.

Masks never change while a network trains, so storing them again loses nothing; every product gets this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import JsonValue
from torch import Tensor, nn

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import mask_name, masked_places
from cctool.checkpoint.encoding import EncodedTensor, Encoding
from cctool.checkpoint.file.payload import MemoryPlace, place
from cctool.quantization.encodings.bitmask import BITS
from cctool.quantization.encodings.masked import MASKED, encode_masked, inner_of, narrowed, widened
from cctool.quantization.network.attach import quantizers_of

__all__ = ["encode_under_mask", "lossy_forms", "masks_by_place", "stored_with_masks"]

_SMALLEST = 512
"""Elements below which a line in the index of encoded tensors costs more than bits save."""


def masks_by_place(model: nn.Module) -> dict[MemoryPlace, Tensor]:
    """Masks by where their parameters lie in memory, which finds them under every name of a tied one."""
    return {place(masked.parameter.detach()): masked.mask for masked in masked_places(model)}


def encode_under_mask(
    tensor: Tensor, mask: Tensor | None, encoding: Encoding, parameters: Mapping[str, JsonValue]
) -> EncodedTensor:
    """Store a tensor by an encoding; where it has a mask, what that takes away stays exactly zero.

    Args:
        tensor: on the CPU.
        mask: of its shape, True stays; None where it has none.
        encoding: of the whole tensor, or of the values that the mask leaves.
        parameters: of that encoding, for the whole tensor.

    Raises:
        QuantizationError: if it cannot be stored so.
    """
    if mask is None:
        return encoding.encode(tensor, parameters)
    return encode_masked(tensor, mask, inner_of(encoding.name, parameters))


def lossy_forms(checkpoint: Checkpoint) -> dict[str, EncodedTensor]:
    """Of stored tensors those whose form rounds: all but masks, and weights whose zeros are left out.

    What quantizers of the network round is not among them either: every product stores that so.
    """
    held = quantizers_of(checkpoint.model)
    own = set() if held is None else held.state.weights.keys()
    return {
        name: form
        for name, form in checkpoint.stored.items()
        if name not in own
        and form.encoding != BITS.name
        and not (form.encoding == MASKED.name and inner_of(form.encoding, form.parameters).encoding is None)
    }


def stored_with_masks(checkpoint: Checkpoint) -> Checkpoint:
    """Store masks as bits and masked weights without their zeros; nothing is rounded, now or again.

    A weight that is stored in few bits keeps its levels, and one whose mask is gone its inner form. The bits
    of a mask are one tensor that the mask and its weight share. Small tensors lie as they are.
    """
    stored = _without_idle_bits(checkpoint)
    names = _names_by_place(checkpoint.model)
    for masked in masked_places(checkpoint.model):
        mask, tensor = masked.mask, masked.parameter.detach()
        earlier = stored.get(masked.name)
        if earlier is None and (mask.numel() < _SMALLEST or not tensor.is_floating_point()):
            continue
        bits = BITS.encode(mask, {})
        stored |= dict.fromkeys(names.get(place(mask), [mask_name(masked.name)]), bits)
        packed = bits.parts["bits"]
        form = (
            encode_masked(tensor, mask, bits=packed) if earlier is None else narrowed(earlier, mask, packed)
        )
        stored |= dict.fromkeys(names.get(place(tensor), [masked.name]), form)
    return replace(checkpoint, stored=stored)


def _without_idle_bits(checkpoint: Checkpoint) -> dict[str, EncodedTensor]:
    masks = {masked.name for masked in masked_places(checkpoint.model, remove_duplicate=False)}
    stored = {}
    for name, form in checkpoint.stored.items():
        idle = form.encoding == MASKED.name and name not in masks
        left = widened(form) if idle else form
        if left is not None:
            stored[name] = left
    return stored


def _names_by_place(model: nn.Module) -> dict[MemoryPlace, list[str]]:
    names: dict[MemoryPlace, list[str]] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            names.setdefault(place(value), []).append(name)
    return names
