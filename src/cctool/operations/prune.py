"""`cctool prune`: remove channels physically, or mask weights, step by step, and record what is left.

source -> [sparse training]
       -> (step i: evidence -> score -> select by rate, table, target or budget -> verify cut == masked
           -> cut tensors, stored integers and scales, or set masks
           -> [rewind | initialise anew] -> recalibrate batch norm -> fine-tune -> measure)
       -> one checkpoint a step
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits import thinned
from cctool.checkpoint.spec import Metrics, Parent
from cctool.data.records import DataSource
from cctool.errors import CheckpointError
from cctool.graph.execution import blaming_the_size, in_mode
from cctool.operations.context import Context, Outcome
from cctool.operations.costs import Costs, costs_of, cut_stored
from cctool.operations.evidence import evidence_for
from cctool.operations.finetuning import encoded_again, finetune
from cctool.operations.masking import (
    emptied_plan,
    mask_channels,
    mask_weights,
    stored_with_masks,
    without_full_masks,
)
from cctool.operations.measuring import measured_splits, preprocessing_of
from cctool.operations.pipeline import labelled
from cctool.operations.prune_goals import (
    RECALIBRATION,
    BudgetReport,
    TargetReport,
    within_budget,
    within_target,
)
from cctool.operations.recalibrating import recalibrated
from cctool.operations.rewinding import reinitialised, rewound
from cctool.operations.sources import open_source, require_source
from cctool.operations.sparsifying import sparsified
from cctool.operations.width_pictures import picture_path, write_picture
from cctool.options.fit import FitOptions
from cctool.options.prune import Granularity, PruneOptions, StepMode
from cctool.pruning.masks import MaskReport
from cctool.pruning.prune import Planner
from cctool.pruning.reports import PruneReport, ThinResult
from cctool.pruning.surgery import CutPlan, apply_cut

__all__ = ["StepReport", "plan", "run"]

_COLLAPSE = 0.5  # of the points above chance


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: its number, from 1.
        steps: how many there are.
        cut: families, frozen places, and how far the cut is from the masked network; None where weights were
            masked.
        masks: what was masked; None where nothing was.
        target: where the search for a target ended.
        budget: where the search for a budget ended.
        before: what the network costs that the command was given.
        after: what the network costs that came out.
        recalibrated: images from which batch-norm statistics were estimated again.
        finetuned: epochs of training.
        metrics_before: of the source.
        metrics_after: of the product.
        picture: path of the picture of widths.
    """

    step: int
    steps: int
    cut: PruneReport | None
    masks: MaskReport | None
    target: TargetReport | None
    budget: BudgetReport | None
    before: Costs
    after: Costs
    recalibrated: int
    finetuned: int
    metrics_before: tuple[Metrics, ...]
    metrics_after: tuple[Metrics, ...]
    picture: str | None = None


@dataclass(frozen=True)
class _Changed:
    """A network that was cut or masked, and what is known of that."""

    checkpoint: Checkpoint
    plan: CutPlan | None = None
    cut: PruneReport | None = None
    masks: MaskReport | None = None
    target: TargetReport | None = None
    budget: BudgetReport | None = None
    notes: tuple[str, ...] = ()


@dataclass
class _Run:
    """What the steps of one command share."""

    source: DataSource | None
    options: PruneOptions
    context: Context
    metrics: tuple[Metrics, ...]
    target_before: float | None = None
    plans: list[CutPlan] = field(default_factory=list)


def plan(checkpoint: Checkpoint, options: PruneOptions, context: Context) -> tuple[StepReport, ...]:
    """Plan every step without writing a checkpoint or training: what ``--dry-run`` prints."""
    source = _data(checkpoint, options, context)
    metrics = (
        measured_splits(checkpoint, source, options.data, context) if options.max_drop is not None else ()
    )
    work = _Run(source, options, context, metrics)
    before = costs_of(checkpoint)
    reports = []
    start = checkpoint
    for step in range(1, options.steps + 1):
        current = replace(start, model=deepcopy(start.model), resume=None)
        changed = _changed(current, work, step)
        report = StepReport(
            step,
            options.steps,
            changed.cut,
            changed.masks,
            changed.target,
            changed.budget,
            before,
            costs_of(changed.checkpoint),
            0,
            0,
            (),
            (),
        )
        reports.append(_pictured(report, options, context, "" if options.steps == 1 else f"step{step}"))
        start = changed.checkpoint if options.step_mode is StepMode.PROGRESSIVE else checkpoint
    return tuple(reports)


def run(checkpoint: Checkpoint, options: PruneOptions, context: Context) -> Iterator[Outcome]:
    """Prune, in one step or several, a product each.

    Args:
        checkpoint: with a single step its model becomes the product's; several start from copies of it.
        options: what is asked for.
        context: device, reporter, output.

    Raises:
        PruningError: if nothing can be cut, or a target or budget cannot be met.
        UsageError: if something needs data and there is none, or the preprocessing is unknown.
    """
    labels = _labels(options)
    _refuse_existing(labels, options, context)
    source = _data(checkpoint, options, context)
    before = measured_splits(checkpoint, source, options.data, context)
    work = _Run(source, options, context, before)
    costs = costs_of(checkpoint)
    start = current = sparsified(checkpoint, source, options, context)
    for step, label in enumerate(labels, start=1):
        base = current if options.step_mode is StepMode.PROGRESSIVE else start
        model = deepcopy(base.model) if options.steps > 1 else base.model
        changed = _changed(replace(base, model=model, resume=None), work, step)
        current, others = _reset(changed, work)
        images = _recalibrate(current, work)
        current, epochs, taught = _finetune(current, work)
        current = stored_with_masks(current)
        after = measured_splits(current, source, options.data, context)
        _warn_of_collapse(before, after, images, epochs, current, context)
        report = StepReport(
            step,
            options.steps,
            changed.cut,
            changed.masks,
            changed.target,
            changed.budget,
            costs,
            costs_of(current),
            images,
            epochs,
            before,
            after,
        )
        yield Outcome(
            checkpoint=current,
            report=_pictured(report, options, context, label),
            label=label,
            metrics_before=before,
            metrics_after=after,
            notes=(*([f"step {step} of {options.steps}"] if options.steps > 1 else []), *changed.notes),
            others={**others, **taught},
        )
        # The pipeline moves what it writes to the CPU.
        current.model.to(context.device)


def _labels(options: PruneOptions) -> tuple[str, ...]:
    return tuple(f"step{step}" for step in range(1, options.steps + 1)) if options.steps > 1 else ("",)


def _refuse_existing(labels: tuple[str, ...], options: PruneOptions, context: Context) -> None:
    """Refuse before hours of fine-tuning what could not be written after them."""
    products = [labelled(context.output, label) for label in labels]
    pictures = [picture_path(options, context, label) for label in labels]
    for path in (*products, *(picture for picture in pictures if picture is not None)):
        if path.exists() and not context.force:
            raise CheckpointError(f"{path} exists already; --force replaces it, another name is safe")


def _example(checkpoint: Checkpoint) -> tuple[torch.Tensor, ...]:
    """Inputs that show which channels go together; the numbers serve the comparison of cut and masked."""
    generator = torch.Generator().manual_seed(0)
    device = next((parameter.device for parameter in checkpoint.model.parameters()), torch.device("cpu"))
    images = torch.randn(2, *checkpoint.spec.input_shape, generator=generator).to(device)
    with blaming_the_size(checkpoint.spec.input_shape), in_mode(checkpoint.model, training=False):
        checkpoint.model(images)
    return (images,)


def _data(checkpoint: Checkpoint, options: PruneOptions, context: Context) -> DataSource | None:
    needs = (
        ("--finetune-epochs", options.finetune_epochs > 0),
        ("--sparsify", options.sparsify is not None),
        ("--max-drop", options.max_drop is not None),
        (f"--method {options.method}", options.needs_data),
        ("--recalibrate", options.recalibrate > 0),
    )
    for why, needed in needs:
        if needed:
            return require_source(options.data, checkpoint, context, why)
    return open_source(options.data, checkpoint, context)


def _changed(checkpoint: Checkpoint, work: _Run, step: int) -> _Changed:
    """Cut or mask a checkpoint's network in place."""
    options, context = work.options, work.context
    if options.apply_masks:
        return _cut(checkpoint, emptied_plan(checkpoint, _example(checkpoint), options, context), work)
    evidence = evidence_for(checkpoint, work.source, options, context)
    if options.granularity is not Granularity.CHANNEL:
        masked, report = mask_weights(checkpoint, options, context, evidence, step)
        return _Changed(masked, masks=report, notes=report.notes)
    planner = Planner(
        checkpoint.model, _example(checkpoint), options, seed=context.runtime.seed, evidence=evidence
    )
    target = budget = None
    if options.target is not None:
        found, target = within_target(
            planner, options.target, work.target_before, checkpoint, options, context, step
        )
        work.target_before = target.before
    elif options.max_drop is not None and work.source is not None:
        found, budget = within_budget(planner, checkpoint, work.source, work.metrics, options, context)
    else:
        found = planner.verified(planner.by_options(step))
    if options.mask:
        masked, report = mask_channels(checkpoint, found, context)
        return _Changed(
            masked, cut=found.report, masks=report, target=target, budget=budget, notes=found.report.notes
        )
    return replace(_cut(checkpoint, found, work), target=target, budget=budget)


def _cut(checkpoint: Checkpoint, found: ThinResult, work: _Run) -> _Changed:
    """Carry a plan out, write it into the spec, and cut what is stored beside the model's tensors."""
    apply_cut(checkpoint.model, found.plan)
    attributes = [(module, name) for module, values in found.plan.attributes.items() for name in values]
    spec = thinned(checkpoint.spec, checkpoint.model, found.plan.tensors, attributes)
    stored = cut_stored(checkpoint.stored, found.plan, work.context)
    cut = replace(checkpoint, spec=spec, stored=stored)
    if work.options.apply_masks:
        cut = without_full_masks(cut)
    return _Changed(
        cut, plan=found.plan, cut=found.report, notes=(*found.report.notes, *_frozen_notes(found.report))
    )


def _reset(changed: _Changed, work: _Run) -> tuple[Checkpoint, Mapping[str, Parent]]:
    """Give what is left its earlier weights, or fresh ones, where that was asked for."""
    options = work.options
    if options.step_mode is StepMode.INDEPENDENT:
        work.plans.clear()
    if changed.plan is not None:
        work.plans.append(changed.plan)
    if options.rewind is not None:
        return rewound(changed.checkpoint, work.plans, options, work.context)
    if options.from_scratch:
        return reinitialised(changed.checkpoint, work.context), {}
    return changed.checkpoint, {}


def _recalibrate(checkpoint: Checkpoint, work: _Run) -> int:
    options = work.options
    wanted = options.recalibrate or (RECALIBRATION if options.max_drop is not None else 0)
    if not wanted or work.source is None:
        return 0
    used = recalibrated(checkpoint, work.source, wanted, options.data, work.context)
    if used < options.recalibrate:
        work.context.reporter.note(f"--recalibrate {options.recalibrate}: {used} images were there to use")
    return used


def _finetune(checkpoint: Checkpoint, work: _Run) -> tuple[Checkpoint, int, Mapping[str, Parent]]:
    options, context, source = work.options, work.context, work.source
    if not options.finetune_epochs or source is None:
        return checkpoint, 0, {}
    fit_options = FitOptions(epochs=options.finetune_epochs, optimizer=options.optimizer, lr=options.lr)
    trained, others = finetune(
        checkpoint, source, fit_options, options.data, context, teacher=options.teacher
    )
    if options.keep_storage:
        trained = encoded_again(trained, checkpoint, context)
    if trained.spec.preprocessing is None:
        # Trained so, it needs inputs so.
        preprocessing = preprocessing_of(trained, source, context)
        trained = replace(trained, spec=trained.spec.model_copy(update={"preprocessing": preprocessing}))
    return trained, options.finetune_epochs, others


def _warn_of_collapse(
    before: tuple[Metrics, ...],
    after: tuple[Metrics, ...],
    images: int,
    epochs: int,
    checkpoint: Checkpoint,
    context: Context,
) -> None:
    """Say loudly where more than half of what the network knew beyond guessing is gone."""
    classes = len(checkpoint.spec.classes or ())
    for old, new in zip(before, after, strict=True):
        if "top1" not in old.values or "top1" not in new.values:
            continue
        chance = 100 / classes if classes else 0.0
        lost, known = old.values["top1"] - new.values["top1"], old.values["top1"] - chance
        if lost <= 0 or lost < _COLLAPSE * known:
            continue
        ways = ["--finetune-epochs"] if not epochs else ["more --finetune-epochs"]
        ways += ["--recalibrate 1024"] if not images and not epochs else []
        context.reporter.warn(
            f"{new.split} top-1 fell from {old.values['top1']:.2f} to {new.values['top1']:.2f} % "
            f"(n={new.n:,}): {', '.join(ways)}, a smaller --rate or --max-drop would help"
        )
        return


def _pictured(report: StepReport, options: PruneOptions, context: Context, label: str) -> StepReport:
    path = picture_path(options, context, label)
    if path is None or report.cut is None:
        return report
    write_picture(report.cut, path, context)
    return replace(report, picture=str(path))


def _frozen_notes(report: PruneReport) -> tuple[str, ...]:
    inner = [frozen for frozen in report.frozen if frozen.op not in ("input", "output")]
    reasons = sorted({f"{frozen.op}: {frozen.reason}" for frozen in inner})
    return tuple(f"kept their width because of {reason}" for reason in reasons)
