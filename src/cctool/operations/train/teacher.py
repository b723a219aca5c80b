"""A teacher beside a network that is trained: `distill` and the fine-tuning after a cut share it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cctool.base.errors import CctoolError, TrainingError
from cctool.base.runtime import autocast
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.file.checksum import verify_checksum
from cctool.checkpoint.spec import Parent, Preprocessing
from cctool.data.records import DataSource
from cctool.data.serving.convert import convert, convert_statistics
from cctool.operations.context import Context
from cctool.operations.data import preprocessing_of
from cctool.operations.opening import open_checkpoint
from cctool.options.common import ModelOptions
from cctool.options.teacher import TeacherOptions
from cctool.training.evaluate import trial_output
from cctool.training.objectives import Distillation, main_output
from cctool.training.user_functions import UserLoss

__all__ = ["Teacher", "distillation"]


def distillation(
    checkpoint: Checkpoint,
    source: DataSource,
    options: TeacherOptions,
    context: Context,
    *,
    label_smoothing: float = 0.0,
    loss: UserLoss | None = None,
) -> tuple[Distillation, Mapping[str, Parent]]:
    """Load a teacher, and give the distance to it and to the labels as what training minimises.

    It serves any network of the checkpoint's preprocessing and classes, so that one loading does for all
    steps of a pruning.

    Args:
        checkpoint: the student, of which only outputs' width and preprocessing matter. A foreign file that
            is the student's own needs no name of its own: it is what the command line says of the student.
        source: opened for the student.
        options: the teacher's file and name, temperature and alpha.
        context: device, precision, user code.
        label_smoothing: of the loss against the labels.
        loss: the user's loss in place of cross-entropy.

    Returns:
        The objective, and the teacher's file by its role, for the history.

    Raises:
        CheckpointError: if the file cannot be read.
        TrainingError: if teacher and student tell different numbers of classes apart.
    """
    found = open_checkpoint(
        Path(options.path),
        _named(checkpoint, options, context),
        context.tables,
        context.user_code,
        context.reporter,
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
    _refuse_other_outputs(checkpoint, teacher, options.path)
    objective = Distillation(teacher, options.temperature, options.alpha, label_smoothing, loss)
    return objective, {"teacher": found.origin} if found.origin is not None else {}


def _named(checkpoint: Checkpoint, options: TeacherOptions, context: Context) -> ModelOptions:
    if options.model != ModelOptions() or checkpoint.origin is None or not Path(options.path).is_file():
        return options.model
    same, _ = verify_checksum(Path(options.path))
    return context.model_options if same == checkpoint.origin.file else options.model


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
        if self._own == self._given and tuple(images.shape[1:]) == self._shape:
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


def _refuse_other_outputs(checkpoint: Checkpoint, teacher: Teacher, path: str) -> None:
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
            f"{path} does not run on its inputs ({text}); --teacher-input CxHxW names their size"
        ) from error
    if student.shape != taught.shape:
        raise TrainingError(
            f"{path} tells {taught.shape[-1]} classes apart, the student {student.shape[-1]}: "
            "both must know the same classes in the same order"
        )
