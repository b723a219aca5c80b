"""Training with a teacher, for `distill` and for fine-tuning after a cut or a quantization."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from cctool.base.errors import CctoolError, TrainingError
from cctool.base.networks import nonfinite
from cctool.base.runtime import Reporter, autocast
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.file.checksum import verify_checksum
from cctool.checkpoint.spec import Parent, Preprocessing
from cctool.data.classes import numbers_of
from cctool.data.records import DataSource
from cctool.data.serving.convert import convert, convert_statistics
from cctool.operations.context import Context
from cctool.operations.data import preprocessing_of
from cctool.operations.judge.task import judge_of, recorded_task
from cctool.operations.opening import open_checkpoint
from cctool.options.common import ModelOptions
from cctool.options.teacher import TeacherOptions
from cctool.tasks.base import Task
from cctool.tasks.details import Classed
from cctool.tasks.table import TASKS
from cctool.training.evaluate import trial_outputs
from cctool.training.objectives import CLASSIFICATION, Distillation


def distillation(
    checkpoint: Checkpoint,
    source: DataSource,
    options: TeacherOptions,
    context: Context,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Distillation, Mapping[str, Parent]]:
    """Load a teacher; give the objective of imitating it, and its file by role for the history.

    The objective works for any student of the same preprocessing and classes, so all steps of a pruning
    share it.

    Args:
        checkpoint: the student. If the teacher is the student's own foreign file, the options that describe
            the student describe it, too.
        source: opened for the student.
        options: the teacher's file and architecture, temperature and alpha.
        context: device, precision, user code.
        label_smoothing: of the loss on the labels.

    Raises:
        CheckpointError: if the file cannot be read.
        TrainingError: if the teacher's weights are not finite, teacher and student have other tasks or
            different numbers of classes, or a temperature is given for a task without classes.
    """
    judge = judge_of(checkpoint, context)
    judge.require_loss("learning from a teacher")
    if options.temperature != TeacherOptions("").temperature and not isinstance(judge.task, Classed):
        raise TrainingError(
            f"--temperature {options.temperature:g} softens classes, and the task {judge.task.name} has none"
        )
    with _teachers_options():
        found = open_checkpoint(
            Path(options.path),
            _named(checkpoint, options, context),
            context.tables,
            context.user_code,
            _TeachersReporter(context.reporter),
        )
    bad = nonfinite(found.model)
    if bad is not None:
        raise TrainingError(
            f"the teacher {options.path} holds {bad[1]:,} NaN or infinite values in {bad[0]}: nothing can be "
            "learnt from it"
        )
    taught = recorded_task(found)
    # The user's own functions may take any outputs.
    if taught in TASKS and TASKS[taught].has_loss and judge.task.has_loss and taught != judge.task.name:
        raise TrainingError(
            f"{options.path} was trained for {taught}, the student is for {judge.task.name}: a teacher must "
            "have the student's task"
        )
    own = preprocessing_of(
        found, source, context, whose="the teacher", options="--teacher-mean and --teacher-std"
    )
    shape = found.spec.input_shape
    teacher = Teacher(
        found.model.to(context.device),
        shape,
        _of_channels(own, shape[0]),
        preprocessing_of(checkpoint, source, context),
        str(context.runtime.precision),
        _order(found, checkpoint, source, options.path),
        judge.task,
    )
    _refuse_other_outputs(checkpoint, teacher, options.path)
    objective = Distillation(
        teacher, options.temperature, options.alpha, label_smoothing, judge.loss, judge.task
    )
    return objective, {"teacher": found.origin} if found.origin is not None else {}


@contextmanager
def _teachers_options() -> Iterator[None]:
    """Errors about the options that describe a network name those that describe the teacher."""
    try:
        yield
    except CctoolError as error:
        raise type(error)(_teachers(str(error))) from error


def _teachers(text: str) -> str:
    return re.sub(r"(?<![\w-])--(arch|arg|input|mean|std)\b", r"--teacher-\1", text)


class _TeachersReporter:
    """Passes everything to another reporter; options that describe a network are the teacher's."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.progress = reporter.progress

    def note(self, text: str) -> None:
        """Say something worth knowing."""
        self._reporter.note(_teachers(text))

    def warn(self, text: str) -> None:
        """Say something that may be wrong."""
        self._reporter.warn(_teachers(text))


def _named(checkpoint: Checkpoint, options: TeacherOptions, context: Context) -> ModelOptions:
    if options.model != ModelOptions() or checkpoint.origin is None or not Path(options.path).is_file():
        return options.model
    # Equal checksums: the teacher is the file that the student was opened from.
    same, _ = verify_checksum(Path(options.path))
    return context.model_options if same == checkpoint.origin.file else options.model


class Teacher:
    """A frozen network that takes the student's images and converts them to its own input.

    Args:
        model: the teacher, on the device of the images.
        input_shape: (C, H, W) that it takes.
        own: its preprocessing.
        given: the student's preprocessing, which was applied to the images.
        precision: of its forward pass.
        order: of its logits, which of them stands at each place of the student's; None takes all as they are.
        task: what its outputs mean.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        own: Preprocessing,
        given: Preprocessing,
        precision: str = "32",
        order: Sequence[int] | None = None,
        task: Task = CLASSIFICATION,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self._shape = input_shape
        self._own = own
        self._given = given
        self._precision = precision
        self._order = None if order is None else list(order)
        self.task = task

    def __call__(self, images: Tensor) -> Tensor:
        """The main output in float32 for normalised images (N, C, H, W); classes are along dim 1."""
        with torch.no_grad(), autocast(images.device, self._precision):
            # Auxiliary outputs are not imitated.
            logits = self.task.main_output(self.model(self._converted(images))).float()
            return logits if self._order is None else logits[:, self._order]

    def _converted(self, images: Tensor) -> Tensor:
        if self._own == self._given and tuple(images.shape[1:]) == self._shape:
            return images
        plain = images * _row(self._given.std, images) + _row(self._given.mean, images)
        # Grey to RGB and back mixes channels, which must not be normalised differently then.
        plain = convert(plain, self._shape)
        return (plain - _row(self._own.mean, plain)) / _row(self._own.std, plain)


def _of_channels(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    """Statistics for a number of channels: a data set's, used for unknown ones, may have another number."""
    if {len(preprocessing.mean), channels} != {1, 3}:
        return preprocessing
    return Preprocessing(
        mean=convert_statistics(preprocessing.mean, channels),
        std=convert_statistics(preprocessing.std, channels),
    )


def _row(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)


def _order(teacher: Checkpoint, student: Checkpoint, source: DataSource, path: str) -> list[int] | None:
    """Which of the teacher's logits means each class of the student; None if names do not tell, or agree."""
    taught, learnt = teacher.spec.classes, student.spec.classes
    if taught is None or learnt is None or taught == learnt:
        return None
    whose = source.reference if learnt == source.classes else "the student"
    return numbers_of(learnt, taught, whose, owner=f"the teacher {path}")


def _refuse_other_outputs(checkpoint: Checkpoint, teacher: Teacher, path: str) -> None:
    outputs, task = trial_outputs(checkpoint.model, checkpoint.spec.input_shape), teacher.task
    student = task.main_output(outputs)
    images = torch.zeros(2, *checkpoint.spec.input_shape, device=student.device)
    try:
        taught = teacher(images)
    except CctoolError as error:
        raise type(error)(f"{path}: {error}") from error
    # On an input size that it does not support, the teacher's code may raise anything.
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"{path} does not run on its inputs ({text}); --teacher-input CxHxW names their size"
        ) from error
    classes = task.classes_in(student)
    if classes is not None and taught.dim() == student.dim() and taught.shape[1] != student.shape[1]:
        raise TrainingError(
            f"{path} tells {taught.shape[1]} classes apart, the student {student.shape[1]}: "
            "both must know the same classes in the same order"
        )
    # Logits of pixels are resized; other outputs must have one shape.
    if student.shape[:2] != taught.shape[:2] or (
        taught.dim() != student.dim() or (classes is None and taught.shape != student.shape)
    ):
        raise TrainingError(
            f"{path} puts out shape {list(taught.shape)}, the student {list(student.shape)}: "
            "a teacher's outputs must have the student's shape"
        )
