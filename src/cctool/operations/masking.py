"""What `cctool prune` does with masks: masking weights or channels, and cutting what masks left empty.

Each function works on a checkpoint whose model it may change, and hands back the checkpoint that describes
what came of it: spec, stored tensors and report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits import thinned
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.masks import add_masks, drop_masks, mask_buffers, masks_of, with_masks
from cctool.errors import PruningError
from cctool.operations.context import Context
from cctool.operations.examples import example
from cctool.operations.mask_storage import stored_with_masks
from cctool.options.prune import PruneOptions
from cctool.pruning.emptied import Emptied, find_emptied
from cctool.pruning.mask_reports import MaskReport, report_masks, zero_percent
from cctool.pruning.masks import Saliency, choose_masks, magnitude, unit_masks
from cctool.pruning.reports import ThinResult
from cctool.pruning.surgery import CutPlan, apply_cut

__all__ = [
    "EmptiedReport",
    "MaskReport",
    "cut_stored",
    "emptied_cut",
    "mask_channels",
    "mask_weights",
]


@dataclass(frozen=True)
class EmptiedReport:
    """What was cut because masks had left it empty.

    Attributes:
        families: name, units before and units after of each family that lost some.
        parameters_before: number of parameters.
        parameters_after: number after the cut.
        error: largest difference of the outputs from those before the cut, relative to the largest.
        precision: the dtype in which that was measured; "" where nothing was cut.
        dropped: tensors whose masks have nothing left to take away.
        notes: what looks empty and stays, and why.
    """

    families: tuple[tuple[str, int, int], ...]
    parameters_before: int
    parameters_after: int
    error: float
    precision: str
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def mask_weights(
    checkpoint: Checkpoint,
    options: PruneOptions,
    saliency: Saliency = magnitude,
    *,
    step: int = 1,
    rates: Mapping[str, float] | None = None,
) -> tuple[Checkpoint, MaskReport]:
    """Mask parts of weights in place; where there are masks already, both hold.

    Args:
        checkpoint: its model is changed; what it stores in few bits keeps its levels.
        options: granularity, rate, pattern, block, scope, patterns of names.
        saliency: how much elements matter.
        step: number of the step, from 1; sets the rate.
        rates: rate of each tensor, module or pattern, in place of the options' rate.

    Raises:
        UsageError: a pattern matches no parameter or module.
        PruningError: nothing can be masked, or a saliency is not finite.
        SpecError: a module has something called like its mask.
    """
    before = zero_percent(checkpoint.model)
    chosen = choose_masks(checkpoint.model, example(checkpoint), options, saliency, step=step, rates=rates)
    earlier = masks_of(checkpoint.model)
    # A mask that takes nothing costs its bits, and says nothing.
    whole = {name for name, mask in chosen.masks.items() if name not in earlier and bool(mask.all())}
    notes = {
        **chosen.skipped,
        **{name: f"follows the rows of {of}" for name, of in chosen.follow.items()},
        **dict.fromkeys(whole, "nothing is to go: the rate is below one of its parts"),
    }
    masked = _with(checkpoint, {name: mask for name, mask in chosen.masks.items() if name not in whole})
    none = "nothing was masked: the rate is below one part of every weight"
    remarks = (none,) if len(whole) == len(chosen.masks) else ()
    return masked, report_masks(masked.model, options, before, notes, remarks)


def mask_channels(
    checkpoint: Checkpoint, found: ThinResult, options: PruneOptions
) -> tuple[Checkpoint, MaskReport]:
    """Mask in place the channels that a plan would cut; their number stays.

    Args:
        checkpoint: its model is changed.
        found: what `plan_thinning` gave for this very model.
        options: for the report.
    """
    before = zero_percent(checkpoint.model)
    masks = unit_masks(checkpoint.model, found.graph, found.selection)
    if not masks:
        raise PruningError("nothing to mask: the rate is below one unit")
    masked = _with(checkpoint, masks)
    return masked, report_masks(masked.model, options, before, {}, found.report.notes)


def emptied_cut(
    checkpoint: Checkpoint, context: Context, *, exclude: Sequence[str] = (), only: Sequence[str] = ()
) -> tuple[Checkpoint, EmptiedReport]:
    """Cut in place the channels that masks (or zeros of any origin) left empty; outputs stay what they are.

    Masks that have nothing left to take away are dropped.

    Args:
        checkpoint: its model is changed.
        context: tables, for what is stored encoded.
        exclude: glob patterns of parameters, modules or families that keep their width.
        only: glob patterns; where given, families that match none keep their width.

    Raises:
        UsageError: a pattern matches nothing.
        PruningError: the network does not run at the batch sizes of the comparison.
    """
    model = checkpoint.model
    before = sum(parameter.numel() for parameter in model.parameters())
    found = find_emptied(model, example(checkpoint), exclude=exclude, only=only)
    apply_cut(model, found.plan)
    attributes = [(module, name) for module, values in found.plan.attributes.items() for name in values]
    spec = thinned(checkpoint.spec, model, found.plan.tensors, attributes)
    stored = cut_stored(checkpoint.stored, found.plan, context)
    idle = tuple(name for name, mask in masks_of(model).items() if bool(mask.all()))
    masks = mask_buffers(model)
    drop_masks(model, idle)
    gone = masks - mask_buffers(model)
    kept = {name: form for name, form in stored.items() if name not in gone}
    cut = replace(checkpoint, spec=with_masks(spec, model), stored=kept, resume=None)
    return stored_with_masks(cut), EmptiedReport(
        families=_families(found),
        parameters_before=before,
        parameters_after=sum(parameter.numel() for parameter in model.parameters()),
        error=found.error,
        precision=found.precision,
        dropped=idle,
        notes=found.notes if found.plan.tensors else ("no channel is empty: nothing was cut", *found.notes),
    )


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
    """Let what was one part before the cut, as the bits of a mask and its weight, be one part after it."""
    shared = {}
    for name, part in smaller.parts.items():
        before = encoded.parts.get(name)
        known = part if before is None else parts.setdefault(id(before), part)
        shared[name] = known if torch.equal(known, part) else part
    return replace(smaller, parts=shared)


def _with(checkpoint: Checkpoint, masks: Mapping[str, Tensor]) -> Checkpoint:
    add_masks(checkpoint.model, masks)
    spec = with_masks(checkpoint.spec, checkpoint.model)
    # Optimizer state belongs to the weights before.
    return stored_with_masks(replace(checkpoint, spec=spec, resume=None))


def _families(found: Emptied) -> tuple[tuple[str, int, int], ...]:
    return tuple(
        (family.name, family.units, int(kept.sum()))
        for family, kept in zip(found.graph.families, found.selection.kept, strict=True)
        if not bool(kept.all())
    )
