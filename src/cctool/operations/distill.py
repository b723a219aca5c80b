"""`cctool distill`: train a student on labels and on a teacher's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Preprocessing
from cctool.data.convert import convert, convert_statistics
from cctool.data.records import DataSource
from cctool.errors import CctoolError, TrainingError
from cctool.operations.conduct import Goal, conduct
from cctool.operations.context import Context, Outcome
from cctool.operations.fitting import user_loss
from cctool.operations.measuring import preprocessing_of
from cctool.operations.opening import open_checkpoint
from cctool.options.distill import DistillOptions
from cctool.runtime import autocast
from cctool.training.evaluate import trial_output
from cctool.training.objectives import Distillation, main_output

__all__ = ["Teacher", "goal", "run"]


def run(checkpoint: Checkpoint, options: DistillOptions, context: Context) -> Iterator[Outcome]:
    """Distil a teacher into a checkpoint's network; yields the best epoch by validation.

    Raises:
        TrainingError: if teacher and student tell different numbers of classes apart.
        CctoolError: see `conduct`.
    """
    yield from conduct("distill", goal, checkpoint, options, context)


def goal(checkpoint: Checkpoint, source: DataSource, options: DistillOptions, context: Context) -> Goal:
    """Load the teacher, and minimise the distance to it and to the labels."""
    found = open_checkpoint(
        Path(options.teacher), options.teacher_model, context.tables, context.user_code, context.reporter
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
    )
    _refuse_other_classes(checkpoint, teacher, options)
    objective = Distillation(
        teacher,
        options.temperature,
        options.alpha,
        options.fit.label_smoothing,
        user_loss(options.fit.loss, context),
    )
    origin = found.origin
    return Goal(objective, {"teacher": origin} if origin is not None else {})


class Teacher:
    """A network that is asked and never changed; takes images as the student gets them.

    Args:
        model: the teacher, on the device where it is asked.
        input_shape: (C, H, W) that it takes; images are converted to it.
        own: its preprocessing.
        given: the student's preprocessing, which images arrive in.
        precision: arithmetic of its forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        own: Preprocessing,
        given: Preprocessing,
        precision: str = "32",
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self._shape = input_shape
        self._own = own
        self._given = given
        self._precision = precision

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, classes) in float32 for normalised images (N, C, H, W)."""
        with torch.no_grad(), autocast(images.device, self._precision):
            return main_output(self.model(self._converted(images))).float()

    def _converted(self, images: Tensor) -> Tensor:
        same_values = self._own == self._given
        if same_values and tuple(images.shape[1:]) == self._shape:
            return images
        plain = images * _row(self._given.std, images) + _row(self._given.mean, images)
        plain = convert(plain, self._shape)
        return (plain - _row(self._own.mean, plain)) / _row(self._own.std, plain)


def _of_channels(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    """The data set's own values stand in for unknown ones, and may be of another number of channels."""
    if {len(preprocessing.mean), channels} != {1, 3}:
        return preprocessing
    return Preprocessing(
        mean=convert_statistics(preprocessing.mean, channels),
        std=convert_statistics(preprocessing.std, channels),
    )


def _row(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)


def _refuse_other_classes(checkpoint: Checkpoint, teacher: Teacher, options: DistillOptions) -> None:
    student = trial_output(checkpoint.model, checkpoint.spec.input_shape)
    images = torch.zeros(2, *checkpoint.spec.input_shape, device=student.device)
    try:
        taught = teacher(images)
    except CctoolError:
        raise
    # Whatever the teacher's own code raises on a size that it was not made for.
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"{options.teacher} does not run on its inputs ({text}); --teacher-input CxHxW names their size"
        ) from error
    if student.shape != taught.shape:
        raise TrainingError(
            f"{options.teacher} tells {taught.shape[-1]} classes apart, the student {student.shape[-1]}: "
            "both must know the same classes in the same order"
        )
