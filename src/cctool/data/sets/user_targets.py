"""What the images of the user's data set are to be told as: class indices, or tensors of any shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cctool.base.errors import UserCodeError
from cctool.data.classes import IGNORED
from cctool.data.records import Target

_MASK_MODES = ("1", "L", "P")


@dataclass(frozen=True)
class Targets:
    """The kind of a data set's targets; checks each of them.

    Attributes:
        task: ``classification``, ``segmentation``, ``regression`` or another; None for a kind that has none.
        classes: number of class names; 0 if there are none.
        labelled: whether there are targets at all.
    """

    task: str | None
    classes: int
    labelled: bool = True

    @property
    def are_classes(self) -> bool:
        """Whether they are one class index for each image."""
        return self.task == "classification"

    def read(self, found: Any, where: str) -> Target | None:
        """The target of one image: a class index, or a tensor as `as_tensor` makes it.

        Raises:
            UserCodeError: it is of another kind, not finite, or no class; ``where`` is the message's start.
        """
        if self.are_classes:
            return self.index(found, where)
        if not self.labelled:
            if found is not None:
                raise UserCodeError(f"{where} has a target, though the first item has none")
            return None
        target = as_tensor(found, where)
        self.check(target, where)
        return target

    def index(self, label: Any, where: str) -> int:
        """A class index. Raises UserCodeError for anything else."""
        try:
            value = int(label)
            if isinstance(label, (float, np.floating)) and value != label:
                raise ValueError
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserCodeError(f"{where} has the label {label!r}; it must be a whole number") from error
        if not 0 <= value < self.classes:
            raise UserCodeError(
                f"{where} has the label {value}; with {self.classes} classes it must lie in "
                f"0..{self.classes - 1}"
            )
        return value

    def check(self, targets: Tensor, where: str) -> None:
        """Refuse targets that are not finite, and masks with an index that no class has."""
        if targets.is_floating_point() and not bool(targets.isfinite().all()):
            raise UserCodeError(f"{where} has targets that are NaN or infinite")
        if self.task == "segmentation" and self.classes and not targets.is_floating_point():
            odd = targets[(targets != IGNORED) & ((targets < 0) | (targets >= self.classes))]
            if odd.numel():
                raise UserCodeError(
                    f"{where} has a mask with the class index {int(odd[0])}; with {self.classes} classes it "
                    f"must lie in 0..{self.classes - 1}, or be {IGNORED} for pixels of no class"
                )


def as_tensor(found: Any, where: str) -> Tensor:
    """A target as a tensor: floating point becomes float32, whole numbers int64, truth values stay.

    A picture in colour becomes float32 [3, H, W] in 0..1, one with a palette or gray levels a mask [H, W].

    Raises:
        UserCodeError: it is no array of numbers.
    """
    if isinstance(found, Image.Image):
        return _picture(found)
    try:
        tensor = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserCodeError(
            f"{where} has a {type(found).__name__} as target; a number, an array, a tensor or a picture is "
            "expected"
        ) from error
    if tensor.is_complex():
        raise UserCodeError(f"{where} has a complex target; real numbers are expected")
    # As losses need them: a float64 target would make the loss, but not the network, float64.
    if tensor.is_floating_point():
        return tensor.to(torch.float32)
    return tensor if tensor.dtype == torch.bool else tensor.to(torch.int64)


def _picture(image: Image.Image) -> Tensor:
    if image.mode in _MASK_MODES:
        return torch.from_numpy(np.asarray(image).astype(np.int64))
    pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1).astype(np.float32)
    return torch.from_numpy(pixels / 255)


def kind_of(example: Any, classes: Sequence[str], told: Any, where: str) -> Targets:
    """The kind of targets that a data set has.

    Args:
        example: the first image's target.
        classes: names, if the data set gives any.
        told: the task that the data set gives; None if it gives none.
        where: start of error messages.

    Raises:
        UserCodeError: the task is not a name, or classes and targets contradict each other.
    """
    if told is not None and (not isinstance(told, str) or not told):
        raise UserCodeError(f"{where} returned task={told!r}; it must be the name of a task")
    if example is None and not classes:
        return Targets(told, 0, labelled=False)
    # Words and the like: reading the image reports them.
    single = not isinstance(example, (Image.Image, np.ndarray, np.generic, Tensor, list, tuple, float))
    task = told or ("classification" if single else _task_of(as_tensor(example, where)))
    if told is None and task == "regression" and classes:
        raise UserCodeError(
            f"{where}: the first target is floating point, though there are class names; give whole numbers, "
            "leave 'classes' out, or say 'task'"
        )
    return Targets(task, len(classes))


def _task_of(target: Tensor) -> str | None:
    if target.is_floating_point():
        return "regression"
    if target.dtype == torch.bool:
        return None
    return {0: "classification", 2: "segmentation"}.get(target.dim())
