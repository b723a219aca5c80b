"""Semantic segmentation: a class for each pixel, judged by cross-entropy and mean intersection over union."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cctool.base.errors import DataError, TrainingError
from cctool.tasks.base import Agreeing, Measure, divergence_of_classes
from cctool.tasks.classification import distillation_loss
from cctool.tasks.details import class_name, counts

_AUXILIARY_WEIGHT = 0.5
IGNORED = 255
"""The label of pixels that belong to no class, as in Pascal VOC and Cityscapes."""


def _classes_of_pixels(logits: Tensor) -> Tensor:
    return logits.argmax(1)


_PIXELS = Agreeing("pixels", "pixel", "pixels", _classes_of_pixels)


@dataclass(frozen=True)
class Segmentation:
    """Logits (N, classes, h, w), or a dict with ``out`` and perhaps ``aux``; targets (N, H, W) of classes.

    Outputs of another size than the targets are resized bilinearly, as torchvision's networks do inside.

    Attributes:
        ignored: label of the pixels that count nowhere.
    """

    name: str = "segmentation"
    measures: tuple[Measure, ...] = (
        Measure("miou", "mean IoU", "%"),
        Measure("pixels", "pixel accuracy", "%"),
    )
    agreement: Agreeing = _PIXELS
    class_measures: tuple[Measure, ...] = (
        Measure("iou", "IoU", "%"),
        Measure("accuracy", "pixel accuracy", "%"),
    )
    counted: str = "pixels"
    ignored: int = IGNORED

    def main_output(self, outputs: Any) -> Tensor:
        """The main logits: the tensor itself, ``out`` of a dict, or the first of several.

        Raises:
            TrainingError: if there are no logits (N, classes, h, w).
        """
        found = _first(outputs)
        if not isinstance(found, Tensor) or found.dim() != 4:
            shape = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(outputs).__name__
            raise TrainingError(
                f"the network returned {shape}; segmentation needs logits (N, classes, height, width), alone "
                "or as 'out' of a dict"
            )
        return found

    has_loss = True

    def fits(self, outputs: Any) -> bool:
        """Whether there are logits (N, classes, h, w) of two classes or more."""
        found = _first(outputs)
        return (
            isinstance(found, Tensor)
            and found.dim() == 4
            and found.shape[1] > 1
            and found.is_floating_point()
        )

    def classes_in(self, outputs: Any) -> int | None:
        """Number of logits of a pixel."""
        return int(self.main_output(outputs).shape[1])

    def imitation(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """The distillation loss of each pixel, averaged; a teacher of another size is resized."""
        if teacher.shape[-2:] != student.shape[-2:]:
            teacher = resized(teacher, student)
        return distillation_loss(_by_pixel(student), _by_pixel(teacher), temperature)

    def compared(self, outputs: Any) -> list[Tensor]:
        """The main logits."""
        return [self.main_output(outputs)]

    def divergence(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        """Kullback-Leibler divergence of the predictions, averaged over pixels."""
        return divergence_of_classes(found, wanted)

    def guess(self, classes: int | None) -> float | None:
        """Not known: the mean IoU of a guess depends on how large the classes are."""
        return None

    def loss(self, outputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy over the pixels that count; an output ``aux`` counts half, as in torchvision.

        An ``aux`` of another number of classes is no auxiliary output, and counts nothing. A batch
        without any pixel that counts has loss 0.

        Raises:
            TrainingError: if outputs or targets have other shapes.
        """
        logits = self.main_output(outputs)
        _refuse_other_shapes(logits, targets)
        loss = self._mean(logits, targets, label_smoothing)
        auxiliary = outputs.get("aux") if isinstance(outputs, Mapping) else None
        if isinstance(auxiliary, Tensor) and auxiliary.shape[:2] == logits.shape[:2]:
            loss = loss + _AUXILIARY_WEIGHT * self._mean(auxiliary, targets, label_smoothing)
        return loss

    def weight(self, targets: Tensor) -> Tensor:
        """Number of pixels that count."""
        return (targets != self.ignored).sum()

    def refuse(self, outputs: Any, targets: Tensor, split: str) -> None:
        """Refuse pixels of a class that the network has not; on the CPU, as in `Classification`.

        Raises:
            DataError: naming the split and the label.
            TrainingError: if the targets are no masks.
        """
        logits = self.main_output(outputs)
        _refuse_other_shapes(logits, targets)
        if targets.device.type != "cpu" or targets.is_floating_point() or not targets.numel():
            return
        odd = targets[(targets != self.ignored) & ((targets < 0) | (targets >= logits.shape[1]))]
        if odd.numel():
            raise DataError(
                f"the {split} split has pixels of class {int(odd[0])}, the network {logits.shape[1]} classes "
                f"(0 to {logits.shape[1] - 1}, {self.ignored} is ignored)"
            )

    def sums(self, outputs: Any, targets: Tensor, *, training: bool = False) -> Mapping[str, Tensor] | None:
        """The confusion matrix, rows by target; while training the counts of right and all pixels."""
        if not training:
            return {"confusion": self.confusion(outputs, targets)}
        predicted = resized(self.main_output(outputs), targets).argmax(1)
        belongs = targets != self.ignored
        return {"right": ((predicted == targets) & belongs).sum(), "all": belongs.sum()}

    def values(self, sums: Mapping[str, Tensor], n: float) -> dict[str, float]:
        """Mean IoU over the classes that occur in targets or predictions, and share of right pixels, percent.

        Everingham et al. 2015, "The Pascal Visual Object Classes Challenge", section 4.2.

        Raises:
            DataError: if no pixel counts.
        """
        if "confusion" in sums and not sums["confusion"].any():
            raise DataError(
                f"nothing can be measured: all pixels have the label {self.ignored}, which counts nowhere"
            )
        if "confusion" not in sums:
            return {"pixels": 100 * float(sums["right"]) / max(float(sums["all"]), 1.0)}
        return _judged(sums["confusion"].double())

    def confusion(self, outputs: Any, targets: Tensor) -> Tensor:
        """Pixels that count, by mask (rows) and by the largest logit (columns)."""
        logits = self.main_output(outputs)
        predicted = resized(logits, targets).argmax(1)
        belongs = targets != self.ignored
        return counts(predicted[belongs], targets[belongs], logits.shape[1])

    def per_class(self, confusion: Tensor) -> Mapping[str, Tensor]:
        """Percent of the pixels of either mask or prediction that both have, and of the mask's alone."""
        right, labelled = 100 * confusion.diagonal().double(), confusion.sum(1)
        union = confusion.sum(0) + labelled - confusion.diagonal()
        return {"iou": right / union, "accuracy": right / labelled}

    def predictions(
        self, outputs: Any, targets: Tensor | None, names: Sequence[str]
    ) -> Iterator[Mapping[str, object]]:
        """Pixel accuracy and mean IoU of each image, and how much of it is predicted as each class, percent.

        The shares are of all pixels, ignored ones too, at the mask's size if there is one.
        """
        logits = self.main_output(outputs)
        if targets is not None:
            logits = resized(logits, targets)
        classes = logits.shape[1]
        for index, choice in enumerate(logits.argmax(1)):
            judged = {"miou": "", "pixels": ""}
            if targets is not None and (targets[index] != self.ignored).any():
                one = slice(index, index + 1)
                found = _judged(self.confusion(logits[one], targets[one]).double())
                judged = {name: f"{value:.4f}" for name, value in found.items()}
            taken = 100 * choice.flatten().bincount(minlength=classes).double() / choice.numel()
            yield {
                "pixel_accuracy": judged["pixels"],
                "mean_iou": judged["miou"],
                **{f"share_{class_name(k, names)}": f"{share:.4f}" for k, share in enumerate(taken.tolist())},
            }

    def _mean(self, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        counting, logits = targets != self.ignored, resized(logits, targets)
        if torch.are_deterministic_algorithms_enabled() and logits.is_cuda:
            # CUDA has a deterministic loss of rows, but none of maps.
            logits, targets = _by_pixel(logits), targets.flatten()
        total = F.cross_entropy(
            logits,
            targets,
            ignore_index=self.ignored,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
        return total / counting.sum().clamp(min=1)


def _first(outputs: Any) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get("out")
    return outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs


def _by_pixel(logits: Tensor) -> Tensor:
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def _judged(matrix: Tensor) -> dict[str, float]:
    right, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    occurs = union > 0
    mean = float((right[occurs] / union[occurs]).mean()) if occurs.any() else 0.0
    return {"miou": 100 * mean, "pixels": 100 * float(right.sum() / matrix.sum().clamp(min=1))}


def resized(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (N, classes, h, w) at the height and width of targets (N, H, W)."""
    size = targets.shape[-2:]
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _refuse_other_shapes(logits: Tensor, targets: Tensor) -> None:
    if targets.dim() != 3 or len(targets) != len(logits) or targets.is_floating_point():
        raise TrainingError(
            f"targets of shape {list(targets.shape)} and {targets.dtype} do not fit outputs of shape "
            f"{list(logits.shape)}: segmentation needs whole-number masks (N, height, width)"
        )
