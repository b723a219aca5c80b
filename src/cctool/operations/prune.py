"""`cctool prune`: remove channels physically, step by step, and record the widths that are left.

source -> (step i: score -> select -> verify cut == masked -> cut tensors, stored integers and scales
           -> recalibrate batch norm -> fine-tune -> measure) -> one checkpoint a step
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits import thinned
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.spec import Metrics
from cctool.data.records import DataSource
from cctool.errors import CheckpointError, UsageError
from cctool.graph.execution import blaming_the_size, in_mode
from cctool.operations.context import Context, Outcome
from cctool.operations.finetuning import encoded_again, finetune
from cctool.operations.measuring import feed_of, measured_splits, preprocessing_of
from cctool.operations.pipeline import labelled
from cctool.operations.sizes import measure
from cctool.operations.sources import open_source, require_source
from cctool.options.fit import FitOptions
from cctool.options.prune import PruneOptions, StepMode
from cctool.pruning.prune import PruneReport, ThinResult, plan_thinning, thin
from cctool.pruning.surgery import CutPlan
from cctool.training.recalibrate import recalibrate

__all__ = ["StepReport", "plan", "run"]


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: its number, from 1.
        steps: how many there are.
        cut: families, frozen places, and how far the cut is from the masked network.
        macs_before: multiply-accumulates of the network that this step started from.
        macs_after: of the network that came out.
        recalibrated: images from which batch-norm statistics were estimated again.
        finetuned: epochs of training.
        metrics_before: of the source.
        metrics_after: of the product.
    """

    step: int
    steps: int
    cut: PruneReport
    macs_before: int | None
    macs_after: int | None
    recalibrated: int
    finetuned: int
    metrics_before: tuple[Metrics, ...]
    metrics_after: tuple[Metrics, ...]


def plan(checkpoint: Checkpoint, options: PruneOptions, context: Context) -> tuple[PruneReport, ...]:
    """Plan every step without data and without writing anything: what ``--dry-run`` prints."""
    reports = []
    model = deepcopy(checkpoint.model)
    for step in range(1, options.steps + 1):
        progressive = options.step_mode is StepMode.PROGRESSIVE
        work = thin if progressive else plan_thinning
        found = work(model, _example(checkpoint), options, step=step, seed=context.runtime.seed)
        reports.append(found.report)
    return tuple(reports)


def run(checkpoint: Checkpoint, options: PruneOptions, context: Context) -> Iterator[Outcome]:
    """Prune, in one step or several, a product each.

    Raises:
        PruningError: if nothing can be cut.
        UsageError: if fine-tuning or recalibration has no data, or the preprocessing is unknown.
    """
    labels = _labels(options)
    _refuse_existing(labels, context)
    source = _data(checkpoint, options, context)
    before = measured_splits(checkpoint, source, options.data, context)
    current = checkpoint
    for step in range(1, options.steps + 1):
        start = current if options.step_mode is StepMode.PROGRESSIVE else checkpoint
        # The source stays as it is: later steps start from it again.
        current = replace(start, model=deepcopy(start.model), resume=None)
        found = thin(current.model, _example(current), options, step=step, seed=context.runtime.seed)
        current = _recorded(current, found, context)
        used = _recalibrate(current, source, options, context)
        current, trained = _finetune(current, source, options, context)
        after = measured_splits(current, source, options.data, context)
        yield Outcome(
            checkpoint=current,
            report=StepReport(
                step=step,
                steps=options.steps,
                cut=found.report,
                macs_before=measure(start).macs,
                macs_after=measure(current).macs,
                recalibrated=used,
                finetuned=trained,
                metrics_before=before,
                metrics_after=after,
            ),
            label=labels[step - 1],
            metrics_before=before,
            metrics_after=after,
            notes=(
                *([f"step {step} of {options.steps}"] if options.steps > 1 else []),
                *found.report.notes,
                *_frozen_notes(found.report),
            ),
        )
        # The pipeline moves what it writes to the CPU.
        current.model.to(context.device)


def _labels(options: PruneOptions) -> tuple[str, ...]:
    return tuple(f"step{step}" for step in range(1, options.steps + 1)) if options.steps > 1 else ("",)


def _refuse_existing(labels: tuple[str, ...], context: Context) -> None:
    """Refuse before hours of fine-tuning what could not be written after them."""
    for path in (labelled(context.output, label) for label in labels):
        if path.exists() and not context.force:
            raise CheckpointError(f"{path} exists already; --force replaces it, -o names another file")


def _example(checkpoint: Checkpoint) -> tuple[torch.Tensor, ...]:
    """Inputs that show which channels go together; the numbers serve the comparison of cut and masked."""
    generator = torch.Generator().manual_seed(0)
    device = next((parameter.device for parameter in checkpoint.model.parameters()), torch.device("cpu"))
    images = torch.randn(2, *checkpoint.spec.input_shape, generator=generator).to(device)
    with blaming_the_size(checkpoint.spec.input_shape), in_mode(checkpoint.model, training=False):
        checkpoint.model(images)
    return (images,)


def _data(checkpoint: Checkpoint, options: PruneOptions, context: Context) -> DataSource | None:
    if options.finetune_epochs:
        return require_source(options.data, checkpoint, context, "--finetune-epochs")
    if options.recalibrate:
        return require_source(options.data, checkpoint, context, "--recalibrate")
    return open_source(options.data, checkpoint, context)


def _recorded(checkpoint: Checkpoint, found: ThinResult, context: Context) -> Checkpoint:
    """Write the cut into the spec, and cut what is stored beside the model's tensors."""
    attributes = [(module, name) for module, values in found.plan.attributes.items() for name in values]
    spec = thinned(checkpoint.spec, checkpoint.model, found.plan.tensors, attributes)
    stored = _cut_stored(checkpoint.stored, found.plan, context)
    return replace(checkpoint, spec=spec, stored=stored)


def _cut_stored(
    stored: Mapping[str, EncodedTensor], plan: CutPlan, context: Context
) -> dict[str, EncodedTensor]:
    cut: dict[str, EncodedTensor] = {}
    done: dict[int, EncodedTensor] = {}
    for name, encoded in stored.items():
        if id(encoded) not in done:
            smaller = encoded
            for piece in plan.tensors.get(name, ()):
                take = context.tables.encodings[encoded.encoding].take
                smaller = take(smaller, piece.dim, piece.keep.cpu())
            done[id(encoded)] = smaller
        cut[name] = done[id(encoded)]
    return cut


def _recalibrate(
    checkpoint: Checkpoint, source: DataSource | None, options: PruneOptions, context: Context
) -> int:
    if not options.recalibrate or source is None:
        return 0
    if checkpoint.spec.preprocessing is None:
        raise UsageError(
            "--recalibrate would estimate statistics from wrongly scaled images: the preprocessing of this "
            "model is unknown; say it with --mean and --std"
        )
    # Shuffled, because the first images of a sorted set are all of one class.
    served = feed_of(checkpoint, source, options.data, context).plain("train", shuffle=True)
    used = recalibrate(checkpoint.model, served, options.recalibrate, context.device)
    if used < options.recalibrate:
        context.reporter.note(f"--recalibrate {options.recalibrate}: {used} images were there to use")
    return used


def _finetune(
    checkpoint: Checkpoint, source: DataSource | None, options: PruneOptions, context: Context
) -> tuple[Checkpoint, int]:
    if not options.finetune_epochs or source is None:
        return checkpoint, 0
    fit_options = FitOptions(epochs=options.finetune_epochs, optimizer=options.optimizer, lr=options.lr)
    trained = finetune(checkpoint, source, fit_options, options.data, context)
    if options.keep_storage:
        trained = encoded_again(trained, checkpoint, context)
    if trained.spec.preprocessing is None:
        # Trained so, it needs inputs so.
        preprocessing = preprocessing_of(trained, source, context)
        trained = replace(trained, spec=trained.spec.model_copy(update={"preprocessing": preprocessing}))
    return trained, options.finetune_epochs


def _frozen_notes(report: PruneReport) -> tuple[str, ...]:
    inner = [frozen for frozen in report.frozen if frozen.op not in ("input", "output")]
    reasons = sorted({f"{frozen.op}: {frozen.reason}" for frozen in inner})
    return tuple(f"kept their width because of {reason}" for reason in reasons)
