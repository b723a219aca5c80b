"""Measuring a network on a split: exact counts, every sample once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import DataError
from cctool.base.networks import device_of, in_eval_mode
from cctool.base.runtime import autocast
from cctool.checkpoint.spec import Metrics
from cctool.data.serving.batches import Batch
from cctool.graph.execution import blaming_the_size
from cctool.tasks.base import Task
from cctool.training.objectives import CLASSIFICATION
from cctool.training.processes import Group
from cctool.training.user_functions import UserMetric

LossFunction = Callable[[Any, Tensor], Tensor]


def trial_output(model: nn.Module, input_shape: tuple[int, int, int], task: Task = CLASSIFICATION) -> Tensor:
    """Main output of a network, in eval mode, for two images of zeros of ``input_shape`` (C, H, W).

    Raises:
        ArchitectureError: if it does not run on them.
        TrainingError: if its outputs cannot be trained on.
    """
    device = device_of(model)
    with blaming_the_size(input_shape), in_eval_mode(model), torch.no_grad():
        outputs = model(torch.zeros(2, *input_shape, device=device))
    return task.main_output(outputs)


def outputs_of(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, precision: str = "32"
) -> Iterator[tuple[Any, Batch]]:
    """Run a network over batches in eval mode without gradients.

    Args:
        model: on ``device`` already.
        batches: normalised images (N, C, H, W), with labels (N,) if there are any.
        device: the network's device.
        precision: ``32``, ``bf16`` or ``16``.

    Yields:
        What the network returned, in float32 if it is a tensor, and the batch.

    Raises:
        ArchitectureError: if the network does not run on images of this size.
    """
    for batch in batches:
        # Modes are set for each batch, because the caller's code runs between them and expects its own.
        images = batch.images.to(device, non_blocking=True)
        shape = tuple(images.shape[1:])
        with blaming_the_size(shape), in_eval_mode(model), torch.no_grad(), autocast(device, precision):
            outputs = model(images)
        yield outputs.float() if isinstance(outputs, Tensor) else outputs, batch


class _EvaluationSums:
    """Sums over the batches of one split, kept on the device so that no batch waits for them."""

    def __init__(
        self, device: torch.device, task: Task, loss: LossFunction | None, metric: UserMetric | None
    ) -> None:
        self._task = task
        self._loss = loss or task.loss
        self._metric = metric
        # Samples, and the sum of losses.
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._figures: dict[str, Tensor] = {}
        self._fits = True
        self._outputs: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, outputs: Any, labels: Tensor) -> None:
        n = labels.shape[0]
        loss = self._loss(outputs, labels).detach().to(self._sums.dtype)
        self._sums += torch.stack([loss.new_tensor(n), loss * n])
        figures = self._task.sums(outputs, labels) if self._fits else None
        self._fits = figures is not None
        for name, figure in (figures or {}).items():
            known = self._figures.get(name)
            self._figures[name] = figure.to(loss) if known is None else known + figure.to(loss)
        if self._metric is not None:
            self._outputs.append(self._task.main_output(outputs).cpu())
            self._labels.append(labels.cpu())

    def metrics(self, split: str, group: Group) -> Metrics:
        n, loss = group.sum(self._sums).tolist()
        if not n:
            raise DataError(f"the {split} split is empty: nothing can be measured on it")
        values = {"loss": loss / n}
        if self._fits:
            figures = {name: group.sum(figure) for name, figure in self._figures.items()}
            values |= self._task.values(figures, n)
        if self._metric is not None:
            outputs, labels = (group.concatenate(torch.cat(parts)) for parts in (self._outputs, self._labels))
            values[self._metric.name] = self._metric(outputs, labels)
        return Metrics(split=split, n=int(n), values=values)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    split: str,
    device: torch.device,
    precision: str = "32",
    task: Task = CLASSIFICATION,
    loss: LossFunction | None = None,
    metric: UserMetric | None = None,
    group: Group | None = None,
    also: Callable[[Any, Tensor], None] | None = None,
) -> Metrics:
    """Measure a network on one split.

    Args:
        model: on ``device`` already; its modes and weights do not change.
        batches: normalised images (N, C, H, W) and labels (N,); each sample once.
        split: name of the split, for the record.
        device: the network's device.
        precision: ``32``, ``bf16`` or ``16``.
        task: what the outputs mean, and what is measured.
        loss: (outputs, labels) -> mean loss of a batch; None is the task's.
        metric: the user's metric, computed over all samples together.
        group: the processes that share the split, each with its own part of it.
        also: gets the outputs and labels of each batch, on the device, to gather more from the same pass.

    Returns:
        ``loss`` (mean), the task's metrics where they apply, and the user's metric.

    Raises:
        DataError: if there are no samples, no labels, or labels that the network has no class for.
        UserCodeError: if the user's loss or metric fails.
    """
    totals = _EvaluationSums(device, task, loss, metric)
    for outputs, batch in outputs_of(model, batches, device, precision):
        if batch.labels is None:
            raise DataError(f"the {split} split has no labels: only `evaluate --predictions` can use it")
        labels = batch.labels.to(device, non_blocking=True)
        if loss is None:
            task.refuse(outputs, labels, split)
        with torch.no_grad():
            totals.add(outputs, labels)
            if also is not None:
                also(outputs, labels)
    return totals.metrics(split, group or Group())
