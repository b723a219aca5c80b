"""Semantic segmentation: a class for each pixel, judged by cross-entropy and mean intersection over union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cctool.base.errors import DataError, TrainingError
from cctool.tasks.base import Agreeing, Measure, divergence_of_classes
from cctool.tasks.classification import distillation_loss

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

        A batch without any pixel that counts has loss 0.

        Raises:
            TrainingError: if outputs or targets have other shapes.
        """
        logits = self.main_output(outputs)
        _refuse_other_shapes(logits, targets)
        loss = self._mean(logits, targets, label_smoothing)
        auxiliary = outputs.get("aux") if isinstance(outputs, Mapping) else None
        if isinstance(auxiliary, Tensor):
            loss = loss + _AUXILIARY_WEIGHT * self._mean(auxiliary, targets, label_smoothing)
        return loss

    def refuse(self, outputs: Any, targets: Tensor, split: str) -> None:
        """Refuse pixels of a class that the network has not; on the CPU, as in `Classification`.

        Raises:
            DataError: naming the split and the label.
        """
        logits = self.main_output(outputs)
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
        logits = self.main_output(outputs)
        classes = logits.shape[1]
        predicted = resized(logits, targets).argmax(1)
        counts = targets != self.ignored
        if training:
            return {"right": ((predicted == targets) & counts).sum(), "all": counts.sum()}
        places = targets[counts] * classes + predicted[counts]
        return {"confusion": torch.bincount(places, minlength=classes**2).reshape(classes, classes)}

    def values(self, sums: Mapping[str, Tensor], n: float) -> dict[str, float]:
        """Mean IoU over the classes that occur in targets or predictions, and share of right pixels, percent.

        Everingham et al. 2015, "The Pascal Visual Object Classes Challenge", section 4.2.
        """
        if "confusion" not in sums:
            return {"pixels": 100 * float(sums["right"]) / max(float(sums["all"]), 1.0)}
        matrix = sums["confusion"].double()
        right, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
        occurs = union > 0
        mean = float((right[occurs] / union[occurs]).mean()) if occurs.any() else 0.0
        return {"miou": 100 * mean, "pixels": 100 * float(right.sum() / matrix.sum().clamp(min=1))}

    def _mean(self, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        total = F.cross_entropy(
            resized(logits, targets),
            targets,
            ignore_index=self.ignored,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
        return total / (targets != self.ignored).sum().clamp(min=1)


def _first(outputs: Any) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get("out")
    return outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs


def _by_pixel(logits: Tensor) -> Tensor:
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


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
