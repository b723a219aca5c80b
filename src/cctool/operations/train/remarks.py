"""What a training says before it begins: options that change nothing, and outputs that no image is for."""

from __future__ import annotations

from collections.abc import Iterator

from cctool.base.errors import UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.judge.task import judge_of
from cctool.options.common import DataOptions
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import RunOptions
from cctool.training.evaluate import trial_outputs
from cctool.training.objectives import has_batch_norm


def say_remarks(
    checkpoint: Checkpoint, source: DataSource, fit: FitOptions, data: DataOptions, context: Context
) -> None:
    """Give the notes of a training on a data set, each once in a command."""
    for text in (
        *_of_classes(checkpoint, source, context),
        *_of_batches(source, data),
        *_of_options(checkpoint, fit),
    ):
        context.say_once(text)


def say_idle_ends(fit: FitOptions, run: RunOptions, done: int, context: Context) -> None:
    """Say which options of a run folder change nothing in a call that begins after ``done`` epochs."""
    left = fit.epochs - done
    if run.stop_after is not None and run.stop_after >= left:
        context.say_once(
            f"--stop-after {run.stop_after} changes nothing: the training ends at epoch {fit.epochs}"
        )
    if run.save_every is not None and fit.epochs // run.save_every == done // run.save_every:
        context.say_once(
            f"--save-every {run.save_every} changes nothing: the training ends at epoch {fit.epochs}"
        )


def refuse_rising_rate(fit: FitOptions, rate: float) -> None:
    """Refuse a ``--min-lr`` above the learning rate that the schedule falls from, ``rate``.

    Raises:
        UsageError: naming both.
    """
    if fit.min_lr > rate:
        raise UsageError(
            f"--min-lr {fit.min_lr:g} is above the learning rate, {rate:g}, which falls to it: give a larger "
            "--lr or a smaller --min-lr"
        )


def _of_classes(checkpoint: Checkpoint, source: DataSource, context: Context) -> Iterator[str]:
    judge = judge_of(checkpoint, context)
    outputs = trial_outputs(checkpoint.model, checkpoint.spec.input_shape)
    width = judge.task.classes_in(outputs) if judge.task.fits(outputs) else None
    # The user's own loss may use outputs and labels in another way.
    judged = judge.loss is None and source.task in (None, judge.task.name)
    if judged and width is not None and source.classes and width > len(source.classes):
        yield (
            f"the network tells {width:,} classes apart, {source.reference} has {len(source.classes):,}: the "
            f"other {width - len(source.classes):,} outputs only learn never to be chosen (--new-head "
            "replaces the last layer)"
        )


def _of_batches(source: DataSource, data: DataOptions) -> Iterator[str]:
    split = source.split("train") if "train" in source.loaders else None
    if split is not None and split.loaded is None and len(split) < data.batch_size:
        yield (
            f"--batch-size {data.batch_size} is more than the {len(split):,} training images: an epoch is "
            "one step"
        )


def _of_options(checkpoint: Checkpoint, fit: FitOptions) -> Iterator[str]:
    late = [epoch for epoch in fit.milestones if epoch + fit.warmup_length >= fit.epochs]
    if late:
        yield (
            f"--milestones {','.join(map(str, late))} changes nothing: the training ends at epoch "
            f"{fit.epochs}"
        )
    if fit.lr_gamma == 1:
        yield "--lr-gamma 1 changes nothing: the learning rate stays as it is at every milestone"
    if fit.eval_from > max(fit.epochs, 1):
        yield f"--eval-from {fit.eval_from} is after the last epoch, {fit.epochs}, which alone is evaluated"
    if fit.freeze_norm and not has_batch_norm(checkpoint.model):
        yield "--freeze-norm changes nothing: the network has no batch norm"
