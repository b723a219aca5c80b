"""What training minimises: a loss of the network's outputs, or of a student's and a teacher's.

Penalties on the weights are not part of an objective: `fit` adds them to any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from cctool.base.errors import DataError, TrainingError
from cctool.tasks.base import Task
from cctool.tasks.classification import Classification
from cctool.training.user_functions import UserLoss

CLASSIFICATION = Classification()


@dataclass(frozen=True)
class Terms:
    """The loss of one batch.

    Attributes:
        loss: what is minimised, a scalar.
        output: the network's main output, for classification logits (N, classes).
        components: the summands of ``loss``, with their weights, if there are several.
    """

    loss: Tensor
    output: Tensor
    components: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Computes the loss of one batch.

    Attributes:
        task: what the outputs mean.
        user: names the user's function in it, if there is one.
        needs_targets: whether it cannot do without targets.
    """

    task: Task
    user: str | None
    needs_targets: bool

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Terms:
        """Run the network on normalised images (N, C, H, W), with their targets if there are any."""


def _batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any module is a batch norm."""
    return bool(_batch_norms(model))


def gamma_penalty(model: nn.Module, weight: float) -> Callable[[], Tensor] | None:
    """A function that computes ``weight * sum |gamma|`` over a network's batch norms; None if weight is 0.

    Raises:
        TrainingError: if there is no batch norm with a trainable scale.
    """
    if not weight:
        return None
    scales = [norm.weight for norm in _batch_norms(model) if norm.weight is not None]
    gammas = [scale for scale in scales if scale.requires_grad]
    if not gammas:
        raise TrainingError("--gamma-l1: the network has no batch norm with a trainable scale")
    return absolute_sum(gammas, weight)


def absolute_sum(
    tensors: Sequence[Tensor], weight: float, chosen: Tensor | None = None
) -> Callable[[], Tensor]:
    """A function that computes ``weight * sum |x|``, with the subgradient 0 at 0.

    Args:
        tensors: of one dim each; each call takes their present values.
        weight: factor of the sum.
        chosen: indices into their concatenation that count; None counts all.
    """

    def total() -> Tensor:
        # One concatenation is much cheaper than one sum per layer.
        together = torch.cat(list(tensors))
        return weight * (together if chosen is None else together[chosen]).abs().sum()

    return total


class Supervised:
    """The task's loss, or the user's, of outputs and targets."""

    def __init__(
        self, label_smoothing: float = 0.0, loss: UserLoss | None = None, task: Task = CLASSIFICATION
    ) -> None:
        self.task = task
        self.user = loss.reference if loss is not None else None
        self.needs_targets = loss is None or not loss.takes_inputs
        self._loss = loss
        self._smoothing = label_smoothing

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Terms:
        """Run the network and compare its outputs with the targets."""
        outputs = model(images)
        if self._loss is not None:
            return Terms(self._loss(outputs, labels, images), self.task.main_output(outputs))
        if labels is None:
            raise DataError("the training split has no labels")
        self.task.refuse(outputs, labels, "training")
        return Terms(self.task.loss(outputs, labels, self._smoothing), self.task.main_output(outputs))


class Distillation:
    """``alpha * imitation + (1 - alpha) * hard``: of the teacher, and a `Supervised` loss.

    For classification the imitation is ``T^2 * KL(teacher || student)``.

    Args:
        teacher: the student's images -> the teacher's main output, without gradients.
        temperature: T, above 0.
        alpha: weight of the teacher, in [0, 1].
        label_smoothing: of the hard loss.
        loss: the user's loss in place of the task's.
        task: what the outputs mean.
    """

    def __init__(
        self,
        teacher: Callable[[Tensor], Tensor],
        temperature: float,
        alpha: float,
        label_smoothing: float = 0.0,
        loss: UserLoss | None = None,
        task: Task = CLASSIFICATION,
    ) -> None:
        self._teacher, self._temperature, self._alpha = teacher, temperature, alpha
        self._supervised = Supervised(label_smoothing, loss, task)
        self.user, self.task = self._supervised.user, task
        self.needs_targets = self._supervised.needs_targets

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Terms:
        """Run both networks on the same images."""
        hard = self._supervised(model, images, labels)
        soft = self.task.imitation(hard.output, self._teacher(images), self._temperature)
        components = {"distillation": self._alpha * soft, "hard": (1 - self._alpha) * hard.loss}
        return Terms(components["distillation"] + components["hard"], hard.output, components)
