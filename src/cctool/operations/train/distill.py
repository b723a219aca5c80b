"""`cctool distill`: train a student on labels and on a teacher's outputs."""

from __future__ import annotations

from collections.abc import Iterator

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.operations.context import Context, Outcome
from cctool.operations.train.course import Goal, conduct
from cctool.operations.train.one_process import user_loss
from cctool.operations.train.teacher import distillation
from cctool.options.teacher import TeacherOptions
from cctool.options.train.distill import DistillOptions

__all__ = ["goal", "run"]


def run(checkpoint: Checkpoint, options: DistillOptions, context: Context) -> Iterator[Outcome]:
    """Distil a teacher into a checkpoint's network; yields the best epoch by validation.

    Raises:
        TrainingError: if teacher and student tell different numbers of classes apart.
        CctoolError: see `conduct`.
    """
    yield from conduct("distill", goal, checkpoint, options, context)


def goal(checkpoint: Checkpoint, source: DataSource, options: DistillOptions, context: Context) -> Goal:
    """Load the teacher, and minimise the distance to it and to the labels."""
    teacher = TeacherOptions(options.teacher, options.teacher_model, options.temperature, options.alpha)
    objective, others = distillation(
        checkpoint,
        source,
        teacher,
        context,
        label_smoothing=options.fit.label_smoothing,
        loss=user_loss(options.fit.loss, context),
    )
    return Goal(objective, others)
