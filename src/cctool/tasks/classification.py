"""Classification: logits (N, classes) and class indices (N,), judged by cross-entropy and accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from cctool.base.errors import DataError, TrainingError
from cctool.tasks.base import Agreeing, Measure, divergence_of_classes, relative_error
from cctool.tasks.details import class_name, counts

_AUXILIARY_WEIGHT = 0.3
_TOP = {"top1": 1, "top5": 5}


def _largest(logits: Tensor) -> Tensor:
    return logits.flatten(1).argmax(1)


_TOP1 = Agreeing("top1", "top-1", "samples", _largest)


@dataclass(frozen=True)
class Classification:
    """One class for each image."""

    name: str = "classification"
    measures: tuple[Measure, ...] = (
        Measure("top1", "top-1", "%", share=True),
        Measure("top5", "top-5", "%", share=True),
    )
    agreement: Agreeing = _TOP1
    class_measures: tuple[Measure, ...] = (Measure("accuracy", "accuracy", "%", share=True),)
    counted: str = "images"

    def main_output(self, outputs: Any) -> Tensor:
        """The logits in what a network returned: a tensor, or a tuple or list that starts with it.

        Raises:
            TrainingError: for anything else.
        """
        first = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
        if not isinstance(first, Tensor):
            raise TrainingError(
                f"the network returned a {type(outputs).__name__}; a tensor of logits (N, classes) is "
                "expected"
            )
        return first

    has_loss = True

    def fits(self, outputs: Any) -> bool:
        """Whether they start with logits (N, classes)."""
        first = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
        return isinstance(first, Tensor) and first.dim() == 2 and first.is_floating_point()

    def classes_in(self, outputs: Any) -> int | None:
        """Number of logits; None if the outputs are not (N, classes)."""
        return int(self.main_output(outputs).shape[1]) if self.fits(outputs) else None

    def imitation(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """See `distillation_loss`."""
        return distillation_loss(student, teacher, temperature)

    def compared(self, outputs: Any) -> list[Tensor]:
        """The main classifier's logits."""
        return [self.main_output(outputs)]

    def divergence(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        """Kullback-Leibler divergence of the predictions; of a single logit the relative squared error."""
        if wanted[0].dim() < 2 or wanted[0].shape[1] < 2:
            return relative_error(found, wanted)
        return divergence_of_classes(found, wanted)

    def guess(self, classes: int | None) -> float | None:
        """Percent of the labels that a guess among the classes hits."""
        return 100 / classes if classes else 0.0

    def loss(self, outputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy; auxiliary classifiers count 0.3 each.

        The weight is that of Szegedy et al. 2015, arXiv 1409.4842, section 5. What has not the shape of the
        logits, such as an embedding, is no classifier and counts nothing.

        Args:
            outputs: logits (N, classes), or a tuple that starts with the main classifier's.
            targets: class indices (N,).
            label_smoothing: share of the target spread evenly over all classes.

        Raises:
            TrainingError: if the outputs are not logits (N, classes).
            DataError: if the labels are no class indices.
        """
        logits = self.main_output(outputs)
        if logits.dim() != 2 or logits.shape[0] != targets.shape[0]:
            raise TrainingError(
                f"the network returned shape {list(logits.shape)} for {targets.shape[0]} images; "
                "cross-entropy needs (N, classes), or give your own --loss"
            )
        if targets.dim() != 1 or targets.is_floating_point():
            raise DataError(
                f"classification needs a whole number as the label of an image, not {targets.dtype} of shape "
                f"{list(targets.shape[1:])}; --task or your own --loss may be for such targets"
            )
        loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        for auxiliary in outputs[1:] if isinstance(outputs, tuple) else ():
            if isinstance(auxiliary, Tensor) and auxiliary.shape == logits.shape:
                extra = F.cross_entropy(auxiliary, targets, label_smoothing=label_smoothing)
                loss = loss + _AUXILIARY_WEIGHT * extra
        return loss

    def refuse(self, outputs: Any, targets: Tensor, split: str) -> None:
        """Refuse labels that the network has no class for.

        Not on a GPU, where reading the labels would wait for every batch, and where the loss itself fails.

        Raises:
            DataError: naming the split and the label.
        """
        logits = self.main_output(outputs)
        if logits.device.type != "cpu" or logits.dim() != 2 or not targets.numel() or targets.dim() != 1:
            return
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= logits.shape[1]:
            odd = low if low < 0 else high
            raise DataError(
                f"the {split} split has a label {odd}, the network {logits.shape[1]} classes "
                f"(0 to {logits.shape[1] - 1}): another data set, or another network, is needed"
            )

    def sums(self, outputs: Any, targets: Tensor, *, training: bool = False) -> Mapping[str, Tensor] | None:
        """How many labels are among the largest logits; None if the outputs are not (N, classes)."""
        logits = self.main_output(outputs)
        if logits.dim() != 2 or targets.dim() != 1:
            return None
        wanted = {"top1": 1} if training else _TOP
        return {name: count_correct(logits, targets, top) for name, top in wanted.items()}

    def values(self, sums: Mapping[str, Tensor], n: float) -> dict[str, float]:
        """Percent of the samples."""
        return {name: 100 * float(sums[name]) / n for name in _TOP if name in sums}

    def hits(self, outputs: Any, targets: Tensor) -> Mapping[str, Tensor]:
        """Which samples have their label among the largest logits; {} if the outputs are not (N, classes)."""
        logits = self.main_output(outputs)
        if logits.dim() != 2 or targets.dim() != 1:
            return {}
        return {name: _correct(logits, targets, top) for name, top in _TOP.items()}

    def confusion(self, outputs: Any, targets: Tensor) -> Tensor:
        """Images by label (rows) and by the largest logit (columns).

        Raises:
            DataError: if the outputs are not (N, classes).
        """
        logits = self._logits(outputs, "a confusion matrix needs")
        return counts(logits.argmax(1), targets, logits.shape[1])

    def per_class(self, confusion: Tensor) -> Mapping[str, Tensor]:
        """Percent of a class's images that were taken for it."""
        return {"accuracy": 100 * confusion.diagonal().double() / confusion.sum(1)}

    def predictions(
        self, outputs: Any, targets: Tensor | None, names: Sequence[str]
    ) -> Iterator[Mapping[str, object]]:
        """The predicted class of each image, its probability, and the label.

        Raises:
            DataError: if the outputs are not (N, classes).
        """
        logits = self._logits(outputs, "predictions need")
        best, predicted = logits.float().softmax(1).max(1)
        labels = targets.tolist() if targets is not None else [None] * len(logits)
        for probability, choice, label in zip(best.tolist(), predicted.tolist(), labels, strict=True):
            yield {
                "predicted": class_name(choice, names),
                "probability": f"{probability:.6f}",
                "label": "" if label is None else class_name(label, names),
            }

    def _logits(self, outputs: Any, need: str) -> Tensor:
        logits = self.main_output(outputs)
        if logits.dim() != 2:
            raise DataError(f"{need} logits (N, classes), the network gives {list(logits.shape)}")
        return logits


def count_correct(logits: Tensor, labels: Tensor, top: int) -> Tensor:
    """Count samples whose label is among the ``top`` largest logits, as a scalar tensor on their device."""
    return _correct(logits, labels, top).sum()


def _correct(logits: Tensor, labels: Tensor, top: int) -> Tensor:
    # Of logits that are NaN the largest is no choice.
    numbers = ~logits.isnan().any(1)
    if top == 1:
        return (logits.argmax(1) == labels) & numbers
    best = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1) & numbers


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch.

    Hinton et al. 2015, arXiv 1503.02531, section 2; the factor T^2 keeps the size of gradients about the same
    for every T > 0. Both logits are (N, classes); the teacher's are constants.
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher.detach() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * divergence
