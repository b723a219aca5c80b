"""`cctool train`: train a fresh network or any checkpoint; `cctool distill`: the same, with a teacher."""

from __future__ import annotations

from collections.abc import Iterator

from cctool.base.errors import TrainingError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.operations.context import Context, Outcome
from cctool.operations.judge.task import judge_of
from cctool.operations.train.course import Goal, conduct
from cctool.operations.train.teacher import distillation
from cctool.operations.transform.basis import with_basis
from cctool.operations.transform.weights import with_coefficients
from cctool.options.teacher import TeacherOptions
from cctool.options.train.distill import DistillOptions
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import TrainOptions
from cctool.options.transform.choices import Mode
from cctool.options.transform.options import TransformOptions, WeightOptions
from cctool.tasks.base import Task
from cctool.tasks.details import Classed
from cctool.training.objectives import Supervised


def run(checkpoint: Checkpoint, options: TrainOptions, context: Context) -> Iterator[Outcome]:
    """Train a checkpoint's network on labels; yields the best epoch by validation.

    Raises:
        UsageError: if layers of a checkpoint, rather than of a fresh network, are to be swapped.
        CctoolError: see `conduct`.
    """
    # A resumed checkpoint has its swapped layers already.
    if options.swap and not options.run.resume:
        checkpoint = _swapped(checkpoint, options, context)
    yield from conduct("train", goal, checkpoint, options, context)


def goal(checkpoint: Checkpoint, source: DataSource, options: TrainOptions, context: Context) -> Goal:
    """Minimise the task's loss, or the user's own."""
    judge = judge_of(checkpoint, context)
    _refuse_smoothing(options.fit, judge.task)
    return Goal(Supervised(options.fit.label_smoothing, judge.loss, judge.task))


def distill(checkpoint: Checkpoint, options: DistillOptions, context: Context) -> Iterator[Outcome]:
    """Distil a teacher into a checkpoint's network; yields the best epoch by validation.

    Raises:
        TrainingError: if teacher and student have different numbers of classes.
        CctoolError: see `conduct`.
    """
    yield from conduct("distill", distill_goal, checkpoint, options, context)


def distill_goal(
    checkpoint: Checkpoint, source: DataSource, options: DistillOptions, context: Context
) -> Goal:
    """Load the teacher; minimise the distance to its outputs, and the loss on the labels."""
    _refuse_smoothing(options.fit, judge_of(checkpoint, context).task)
    teacher = TeacherOptions(options.teacher, options.teacher_model, options.temperature, options.alpha)
    objective, others = distillation(
        checkpoint,
        source,
        teacher,
        context,
        label_smoothing=options.fit.label_smoothing,
    )
    return Goal(objective, others)


def _refuse_smoothing(options: FitOptions, task: Task) -> None:
    if options.label_smoothing and not isinstance(task, Classed):
        raise TrainingError(
            f"--label-smoothing {options.label_smoothing:g} is for classes, and the task {task.name} has none"
        )


def _swapped(checkpoint: Checkpoint, options: TrainOptions, context: Context) -> Checkpoint:
    if checkpoint.origin is not None:
        raise UsageError(
            "--swap is for fresh networks (--arch); `cctool transform` changes a checkpoint's layers"
        )
    for swap in options.swaps:
        if swap.mode is Mode.BASIS:
            checkpoint = with_basis(checkpoint, swap.kernel, (swap.layers,), "--swap")
        else:
            wanted = TransformOptions(kernel=swap.kernel, weights=WeightOptions(layers=(swap.layers,)))
            checkpoint = with_coefficients(checkpoint, wanted, context)
    return checkpoint
