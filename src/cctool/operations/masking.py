"""What `cctool prune` does with masks: masking weights or channels, planning to cut what masks emptied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.masks import add_masks, drop_masks, mask_name, masks_of, with_masks
from cctool.errors import PruningError
from cctool.graph.execution import blaming_the_size
from cctool.operations.context import Context
from cctool.operations.mask_storage import stored_with_masks
from cctool.options.prune import PruneOptions
from cctool.pruning.criteria import Unscored
from cctool.pruning.emptied import find_emptied
from cctool.pruning.evidence import Evidence
from cctool.pruning.mask_reports import MaskReport, report_masks, zero_percent
from cctool.pruning.masks import choose_masks, unit_masks
from cctool.pruning.rates import read_rates
from cctool.pruning.reports import ThinResult, report_of
from cctool.pruning.saliency import weight_saliency
from cctool.pruning.verify import Check

__all__ = ["emptied_plan", "mask_channels", "mask_weights", "stored_with_masks", "without_full_masks"]


def mask_weights(
    checkpoint: Checkpoint,
    options: PruneOptions,
    context: Context,
    evidence: Evidence | None = None,
    step: int = 1,
) -> tuple[Checkpoint, MaskReport]:
    """Mask parts of weights in place; where there are masks already, both hold.

    Args:
        checkpoint: its model is changed; what it stores in few bits keeps its levels.
        options: method, granularity, rate or table of rates, pattern, block, scope, patterns of names.
        context: the seed, for methods that draw.
        evidence: for methods that look at images.
        step: number of the step, from 1; sets the rate.

    Raises:
        UsageError: a pattern or a table of rates names what is not there.
        PruningError: nothing can be masked, or a saliency is not finite.
        SpecError: a module has something called like its mask.
    """
    generator = torch.Generator().manual_seed(context.runtime.seed)

    def saliency(name: str, weight: Tensor) -> Tensor | Unscored:
        return weight_saliency(options.method, name, weight, evidence, generator)

    rates = read_rates(options.rates) if options.rates is not None else None
    before = zero_percent(checkpoint.model)
    chosen = choose_masks(checkpoint.model, _example(checkpoint), options, saliency, step=step, rates=rates)
    why = {**chosen.skipped, **{name: f"follows the rows of {of}" for name, of in chosen.follow.items()}}
    masked = _with(checkpoint, chosen.masks)
    return masked, report_masks(masked.model, options, before, why)


def mask_channels(
    checkpoint: Checkpoint, found: ThinResult, context: Context
) -> tuple[Checkpoint, MaskReport]:
    """Mask in place the channels that a plan would cut; their number stays.

    Args:
        checkpoint: its model is changed.
        found: the plan, made for this very model.
        context: the seed of the run.

    Raises:
        PruningError: the plan cuts nothing.
    """
    masks = unit_masks(checkpoint.model, found.graph, found.selection)
    if not masks:
        raise PruningError("nothing to mask: the rate is below one unit")
    before = zero_percent(checkpoint.model)
    masked = _with(checkpoint, masks)
    return masked, report_masks(masked.model, PruneOptions(), before, {})


def emptied_plan(
    checkpoint: Checkpoint, inputs: Sequence[Tensor], options: PruneOptions, context: Context
) -> ThinResult:
    """Plan to cut the channels that masks, or zeros of any origin, left empty; the model stays as it is.

    The error of the report is the difference from the network *as it is*, not from a masked one.

    Args:
        checkpoint: its model is looked at.
        inputs: positional arguments of its forward, on its device.
        options: patterns of names that keep their width are respected.
        context: where to speak.

    Raises:
        UsageError: a pattern matches nothing.
        PruningError: the network does not run at the batch sizes of the comparison.
    """
    model = checkpoint.model
    found = find_emptied(model, inputs, exclude=options.exclude, only=options.only)
    outcome = Check(found.error, 0.0, found.precision, "")
    scores = [Unscored("nothing ranks units: what is empty goes") for _ in found.graph.families]
    notes = found.notes if found.plan.tensors else ("no channel is empty: nothing to cut", *found.notes)
    report = report_of(model, found.graph, scores, found.selection, found.plan, outcome, notes)
    return ThinResult(found.plan, report, found.graph, found.selection)


def without_full_masks(checkpoint: Checkpoint) -> Checkpoint:
    """Drop in place the masks that take nothing away, as after the channels that they emptied went."""
    model = checkpoint.model
    full = [name for name, mask in masks_of(model).items() if bool(mask.all())]
    drop_masks(model, full)
    gone = {mask_name(name) for name in full}
    stored = {name: form for name, form in checkpoint.stored.items() if name not in gone}
    return replace(checkpoint, spec=with_masks(checkpoint.spec, model), stored=stored)


def _with(checkpoint: Checkpoint, masks: Mapping[str, Tensor]) -> Checkpoint:
    add_masks(checkpoint.model, masks)
    spec = with_masks(checkpoint.spec, checkpoint.model)
    # Optimizer state belongs to the weights before.
    return stored_with_masks(replace(checkpoint, spec=spec, resume=None))


def _example(checkpoint: Checkpoint) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    device = next((parameter.device for parameter in checkpoint.model.parameters()), torch.device("cpu"))
    with blaming_the_size(checkpoint.spec.input_shape):
        return (torch.randn(2, *checkpoint.spec.input_shape, generator=generator).to(device),)
