"""What `cctool prune` does with masks: masking weights or channels, and cutting channels that masks emptied.

Each function changes a checkpoint's model in place, and returns the updated checkpoint and a report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from cctool.base.errors import PruningError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import add_masks, drop_masks, masks_of
from cctool.operations.context import Context
from cctool.operations.data import example
from cctool.operations.keep import events
from cctool.options.prune.choices import Granularity
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.report import ThinResult
from cctool.pruning.masks.choose import Saliency, choose_masks, magnitude, unit_masks
from cctool.pruning.masks.emptied import find_emptied
from cctool.pruning.masks.report import MaskReport, report_masks, zero_percent
from cctool.transforms.layers.base import swapped_layers


@dataclass(frozen=True)
class EmptiedReport:
    """What was cut because masks had emptied it.

    Attributes:
        families: name, units before and units after of each family that was cut.
        parameters_before: number of parameters.
        parameters_after: number after the cut.
        error: largest difference of the outputs from those before the cut, relative to the largest.
        precision: the dtype in which that was measured; "" if nothing was cut.
        dropped: tensors whose masks have become all true and were dropped.
        notes: which channels look empty but stay, and why.
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
    """Mask parts of weights in place, in addition to masks that they have.

    Args:
        checkpoint: weights that are stored in few bits keep their levels.
        options: granularity, rate, pattern, block, scope, patterns of names.
        saliency: how much elements matter.
        step: number of the step, from 1; sets the rate.
        rates: of tensors, modules or patterns, in place of the options' rate.

    Raises:
        UsageError: a pattern matches no parameter or module.
        PruningError: nothing can be masked, or a saliency is not finite.
        SpecError: a module has another attribute with the name of the mask.
    """
    before = zero_percent(checkpoint.model)
    # Single coefficients may be masked; larger parts are judged on the weights that coefficients give.
    single = options.granularity is Granularity.ELEMENT
    seen = checkpoint if single else events.plain_checkpoint(checkpoint)
    apart = _apart(checkpoint.model, options)
    chosen = choose_masks(seen.model, example(seen), options, saliency, step=step, rates=rates, apart=apart)
    earlier = masks_of(checkpoint.model)
    # A mask that is all true would only cost bytes.
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
    """Mask in place the channels that the plan ``found``, made for this very model, would cut."""
    before = zero_percent(checkpoint.model)
    _refuse_coefficients(checkpoint.model, found)
    masks = unit_masks(checkpoint.model, found.graph, found.selection)
    if not masks:
        raise PruningError("nothing to mask: the rate is below one unit")
    masked = _with(checkpoint, masks)
    return masked, report_masks(masked.model, options, before, {}, found.report.notes)


def emptied_cut(
    checkpoint: Checkpoint, context: Context, *, exclude: Sequence[str] = (), only: Sequence[str] = ()
) -> tuple[Checkpoint, EmptiedReport]:
    """Cut in place the channels that masks (or zeros of any origin) emptied; outputs do not change.

    Masks that have become all true are dropped.

    Args:
        checkpoint: to cut.
        context: of the command.
        exclude: glob patterns of parameters, modules or families that keep their width.
        only: glob patterns; if given, families that match none keep their width.

    Raises:
        UsageError: a pattern matches nothing.
        PruningError: the network does not run at the batch sizes of the comparison.
    """
    model = checkpoint.model
    before = sum(parameter.numel() for parameter in model.parameters())
    plain = events.plain_checkpoint(checkpoint)
    found = find_emptied(plain.model, example(plain), exclude=exclude, only=only)
    # The state of a training with masks does not fit a training without.
    cut, remarks = events.cut(replace(checkpoint, resume=None), found.plan, context)
    idle = tuple(name for name, mask in masks_of(model).items() if bool(mask.all()))
    drop_masks(model, idle)
    return events.masked(cut), EmptiedReport(
        families=tuple(
            (family.name, family.units, int(kept.sum()))
            for family, kept in zip(found.graph.families, found.selection.kept, strict=True)
            if not bool(kept.all())
        ),
        parameters_before=before,
        parameters_after=sum(parameter.numel() for parameter in model.parameters()),
        error=found.error,
        precision=found.precision,
        dropped=idle,
        notes=(
            *(() if found.plan.tensors else ("no channel is empty: nothing was cut",)),
            *found.notes,
            *remarks,
        ),
    )


def _apart(model: nn.Module, options: PruneOptions) -> dict[str, str]:
    """Tensors of swapped layers that get no mask, with reasons: stored ones, and the weight they give."""
    apart: dict[str, str] = {}
    for name, layer in swapped_layers(model).items():
        leaves = dict(layer.named_parameters(recurse=False))
        # Rows, kernels and blocks of coefficients are not those of the weight.
        if options.granularity is not Granularity.ELEMENT:
            why = "its layer stores coefficients, which only --granularity element masks"
            apart |= {f"{name}.{leaf}": why for leaf in ("weight", *leaves) if leaf != "bias"}
            continue
        why = "no coefficient, but what basis functions are made of"
        apart |= {f"{name}.{leaf}": why for leaf in leaves if leaf not in ("bias", "coefficients")}
    return apart


def _refuse_coefficients(model: nn.Module, found: ThinResult) -> None:
    """Refuse to mask channels of weights that are computed from coefficients."""
    layers = swapped_layers(model)
    for family, kept in zip(found.graph.families, found.selection.kept, strict=True):
        touched = {place.tensor.rpartition(".")[0] for place in family.places} & layers.keys()
        if touched and not bool(kept.all()):
            raise PruningError(
                f"--mask cannot mask the channels of {family.name}: the weight of {min(touched)} is made of "
                f"coefficients; without --mask they are cut, and --exclude {family.name} leaves them"
            )


def _with(checkpoint: Checkpoint, masks: Mapping[str, Tensor]) -> Checkpoint:
    add_masks(checkpoint.model, masks)
    # The state of the optimizer belongs to the earlier weights.
    return events.masked(replace(checkpoint, resume=None))
