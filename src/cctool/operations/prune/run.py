"""`cctool prune`: remove channels physically, or mask weights, step by step.

source -> [sparse training]
       -> (step i: evidence -> score -> select by rate, table, target or budget -> verify cut == masked
           -> cut tensors, stored integers and scales, or set masks
           -> [rewind | draw anew] -> recalibrate batch norm -> fine-tune -> measure)
       -> one checkpoint for each step
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cctool.base.errors import CheckpointError
from cctool.base.networks import copied
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics, Parent
from cctool.data.records import DataSource
from cctool.operations.context import Context, Outcome
from cctool.operations.data import (
    measured_splits,
    open_source,
    refuse_unlabelled,
    require_source,
    with_preprocessing,
)
from cctool.operations.judge.task import judge_of
from cctool.operations.keep import events
from cctool.operations.keep.follower import Followed
from cctool.operations.pipeline import labelled
from cctool.operations.prune.costs import Scales
from cctool.operations.prune.from_scratch import reinitialised
from cctool.operations.prune.goals import RECALIBRATION
from cctool.operations.prune.report import StepReport, picture_path, pictured, step_report
from cctool.operations.prune.rewind import open_earlier, rewound
from cctool.operations.prune.sparse_training import sparsified
from cctool.operations.prune.step import Changed, Changer
from cctool.operations.train.batch_norm import recalibrated, refuse_unknown_preprocessing
from cctool.operations.train.finetune import finetune
from cctool.operations.train.resume import never_trained
from cctool.operations.train.teacher import distillation
from cctool.options.paths import PRODUCT, NamedFile, refuse_same_files
from cctool.options.prune.choices import Images, StepMode
from cctool.options.prune.options import PruneOptions
from cctool.options.train.fit import FitOptions
from cctool.pruning.cut.surgery import CutPlan
from cctool.pruning.scores.evidence import GRADIENTS
from cctool.tasks.base import Measure
from cctool.training.batch_norm import norms_with_statistics
from cctool.training.objectives import Objective
from cctool.transforms.codec.taps import bypassed

_COLLAPSE = 0.5  # of the points above chance


@dataclass
class _Run:
    """What the steps of one command share.

    Attributes:
        source: the data set; None without.
        options: of the command.
        context: of the command.
        metrics: of the input network.
        scales: compare costs with the input network's.
        earlier: the checkpoint to rewind to.
        objective: what fine-tuning minimises; None is cross-entropy.
        others: files that were read, by role.
        plans: cuts between the input network and the present one.
    """

    source: DataSource | None
    options: PruneOptions
    context: Context
    metrics: tuple[Metrics, ...]
    scales: Scales
    earlier: Checkpoint | None = None
    objective: Objective | None = None
    others: dict[str, Parent] = field(default_factory=dict)
    plans: list[CutPlan] = field(default_factory=list)


def plan(checkpoint: Checkpoint, options: PruneOptions, context: Context) -> tuple[StepReport, ...]:
    """Plan every step without writing a checkpoint or training, for ``--dry-run``."""
    source = _data(checkpoint, options, context)
    _opened(checkpoint, source, options, context)
    searched = options.max_drop is not None
    metrics = measured_splits(checkpoint, source, options.data, context) if searched else ()
    changer = Changer(source, options, context, metrics)
    scales, reports, start = Scales(checkpoint), [], checkpoint
    if options.sparsify is not None:
        context.reporter.note("the plan ranks the network as it is; --sparsify would train it first")
    for step, label in enumerate(_labels(options), start=1):
        changed = changer.changed(replace(start, model=copied(start.model), resume=None), step)
        report = step_report(changed, step, options, *scales.weigh(changed.checkpoint))
        reports.append(pictured(report, options, context, label))
        start = changed.checkpoint if options.step_mode is StepMode.PROGRESSIVE else checkpoint
    return tuple(reports)


def run(checkpoint: Checkpoint, options: PruneOptions, context: Context) -> Iterator[Outcome]:
    """Prune in one or several steps, with a product for each.

    A single step changes the checkpoint's model in place; several work on copies.

    Raises:
        PruningError: if nothing can be cut, or a target or budget cannot be met.
        UsageError: if something needs data and there is none, or the preprocessing is unknown.
    """
    labels = _labels(options)
    _refuse_existing(labels, options, context)
    # All that is read is opened first, so that no hours of training end in a refusal.
    source = _data(checkpoint, options, context)
    work = _opened(checkpoint, source, options, context)
    work.metrics = measured_splits(checkpoint, source, options.data, context)
    changer = Changer(source, options, context, work.metrics)
    start = checkpoint
    if options.sparsify is not None and source is not None:
        # Training drives units towards zero down to the widths of the last step.
        start = sparsified(checkpoint, source, options, context, changer.last_step(checkpoint))
    current = start
    for step, label in enumerate(labels, start=1):
        base = current if options.step_mode is StepMode.PROGRESSIVE else start
        # A single step changes its input: two copies of a large network might not fit into memory. A copy of
        # the step before is on the CPU, where the pipeline has moved that product.
        model = copied(base.model).to(context.device) if options.steps > 1 else base.model
        resume = base.resume if _only_cuts(options) else None
        changed = changer.changed(replace(base, model=model, resume=resume), step)
        current = _reset(changed, work)
        with bypassed(current.model):
            images = _recalibrate(current, changed, work)
        current, of_change = events.changed(current, source, options.data, context)
        current, of_training = _finetuned(current, work)
        after = measured_splits(current, source, options.data, context)
        _warn_of_collapse(current, after, images, work)
        report = replace(
            step_report(changed, step, options, *work.scales.weigh(current)),
            recalibrated=images,
            finetuned=options.finetune_epochs,
            metrics_before=work.metrics,
            metrics_after=after,
        )
        yield Outcome(
            checkpoint=current,
            report=pictured(report, options, context, label),
            label=label,
            metrics_before=work.metrics,
            metrics_after=after,
            notes=(
                *([f"step {step} of {options.steps}"] if options.steps > 1 else []),
                *changed.notes,
                *of_change,
                *of_training,
            ),
            others=work.others,
        )


def _opened(
    checkpoint: Checkpoint, source: DataSource | None, options: PruneOptions, context: Context
) -> _Run:
    """Open the other networks that options name, and refuse now what would fail after training."""
    if options.recalibrate:
        refuse_unknown_preprocessing(checkpoint, "--recalibrate")
    judge = judge_of(checkpoint, context)
    if options.max_drop is not None:
        judge.require_measure("--max-drop")
    learns = {
        "--finetune-epochs": options.finetune_epochs > 0,
        "--sparsify": options.sparsify is not None,
        f"--method {options.method.value}": options.method in GRADIENTS,
    }
    for option in (name for name, given in learns.items() if given):
        judge.require_loss(option)
        if source is not None:
            refuse_unlabelled(source, judge, option)
    work = _Run(source, options, context, (), Scales(checkpoint))
    if options.rewind is not None:
        work.earlier = open_earlier(checkpoint, options.rewind, context)
        if work.earlier.origin is not None:
            work.others["rewind"] = work.earlier.origin
    if options.teacher is not None and source is not None:
        work.objective, others = distillation(checkpoint, source, options.teacher, context)
        work.others |= others
    return work


def _only_cuts(options: PruneOptions) -> bool:
    """Whether remaining weights keep their values, so that a training of the input can be resumed."""
    changes = options.finetune_epochs or options.rewind or options.from_scratch or options.sparsify
    return options.steps == 1 and not changes


def _labels(options: PruneOptions) -> tuple[str, ...]:
    return tuple(f"step{step}" for step in range(1, options.steps + 1)) if options.steps > 1 else ("",)


def _refuse_existing(labels: tuple[str, ...], options: PruneOptions, context: Context) -> None:
    """Refuse, before hours of fine-tuning, products that could not be written after it."""
    products = [labelled(context.output, label) for label in labels]
    pictures = [picture_path(options, context, label) for label in labels]
    written = (*products, *(picture for picture in pictures if picture is not None))
    refuse_same_files(context.read, (NamedFile(PRODUCT, path) for path in written))
    for path in written:
        if path.exists() and not context.force:
            raise CheckpointError(f"{path} exists already; --force replaces it, another name is safe")


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


def _reset(changed: Changed, work: _Run) -> Checkpoint:
    """Give the remaining channels earlier weights, or fresh ones, if the options ask for it."""
    # Independent steps all start from the input: earlier steps' cuts are not between it and this network.
    if work.options.step_mode is StepMode.INDEPENDENT:
        work.plans.clear()
    if changed.plan is not None:
        work.plans.append(changed.plan)
    if work.earlier is not None:
        return rewound(changed.checkpoint, work.earlier, work.plans)
    if work.options.from_scratch:
        return reinitialised(changed.checkpoint, work.context)
    return changed.checkpoint


def _recalibrate(checkpoint: Checkpoint, changed: Changed, work: _Run) -> int:
    options = work.options
    wanted = options.recalibrate or (RECALIBRATION if options.max_drop is not None else 0)
    if not wanted or work.source is None:
        return 0
    augmented = options.recalibrate_images is Images.AUGMENTED
    # The product gets statistics of the kind that its accuracy was measured with.
    if changed.budget is not None:
        augmented = changed.budget.augmented
    used = recalibrated(checkpoint, work.source, wanted, options.data, work.context, augmented=augmented)
    if not used and options.recalibrate:
        work.context.reporter.note(
            f"--recalibrate {options.recalibrate}: the network has no batch norm with running statistics, so "
            "that nothing was estimated"
        )
    elif used < options.recalibrate:
        work.context.reporter.note(f"--recalibrate {options.recalibrate}: {used} images were there to use")
    return used


def _finetuned(checkpoint: Checkpoint, work: _Run) -> Followed:
    options, context, source = work.options, work.context, work.source
    if not options.finetune_epochs or source is None:
        return Followed(checkpoint)
    forms = events.forms_of(checkpoint) if options.keep_storage else {}
    # Weights that were rewound to their initialisation need the learning rate of a fresh network.
    untrained = work.earlier is not None and never_trained(work.earlier.history)
    trained = finetune(
        checkpoint,
        source,
        FitOptions(epochs=options.finetune_epochs, optimizer=options.optimizer, lr=options.lr),
        options.data,
        context,
        objective=work.objective,
        fresh=options.from_scratch or untrained,
        forms=forms,
    )
    trained = with_preprocessing(trained, source, context)
    return events.trained(trained, source, options.data, context, forms)


def _warn_of_collapse(checkpoint: Checkpoint, after: tuple[Metrics, ...], images: int, work: _Run) -> None:
    """Warn if more than half of what the network knew is lost."""
    if not after:
        return
    judge = judge_of(checkpoint, work.context)
    measure, epochs = judge.main, work.options.finetune_epochs
    classes = len(checkpoint.spec.classes or ()) or None
    chance = judge.task.guess(classes) if judge.metric is None else None
    for old, new in zip(work.metrics, after, strict=True):
        before, now = old.values.get(measure.name), new.values.get(measure.name)
        if before is None or now is None or not _collapsed(before, now, measure, chance, new.n):
            continue
        could_recalibrate = not images and not epochs and norms_with_statistics(checkpoint.model)
        ways = ["more --finetune-epochs" if epochs else "--finetune-epochs"]
        ways += ["--recalibrate 1024"] if could_recalibrate else []
        verb, digits = ("fell", ".2f") if measure.rising else ("rose", ".4g")
        unit = f" {measure.unit}" if measure.unit else ""
        work.context.reporter.warn(
            f"{new.split} {measure.title} {verb} from {before:{digits}} to {now:{digits}}{unit} "
            f"(n={new.n:,}): {', '.join(ways)}, a smaller --rate or --max-drop would help"
        )
        return


def _collapsed(before: float, now: float, measure: Measure, chance: float | None, n: int) -> bool:
    if chance is not None:
        # Two standard deviations of the accuracy of guessing may be mere chance.
        scatter = 2 * math.sqrt(chance * (100 - chance) / n)
        return before - now >= max(_COLLAPSE * (before - chance), scatter, 1e-9)
    if measure.rising:
        return before > 0 and now <= (1 - _COLLAPSE) * before
    return before > 0 and now >= before / _COLLAPSE
