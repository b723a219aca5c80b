"""Measuring a network on a split: exact counts, every sample once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import DataError, UserCodeError
from cctool.base.networks import device_of, in_eval_mode
from cctool.base.runtime import autocast
from cctool.checkpoint.spec import Metrics
from cctool.data.serving.batches import Batch
from cctool.graph.execution import run_at_once
from cctool.tasks.base import Task
from cctool.tasks.details import Weighing
from cctool.training.objectives import CLASSIFICATION
from cctool.training.processes import Group
from cctool.training.user_functions import UserLoss, UserMetric


def trial_outputs(model: nn.Module, input_shape: tuple[int, int, int]) -> Any:
    """What a network returns, in eval mode, for two images of zeros of ``input_shape`` (C, H, W).

    Raises:
        ArchitectureError: if it does not run on them.
    """
    device = device_of(model)
    with in_eval_mode(model), torch.no_grad():
        return run_at_once(model, torch.zeros(2, *input_shape, device=device))


def outputs_of(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, precision: str = "32"
) -> Iterator[tuple[Any, Batch]]:
    """Run a network over batches in eval mode without gradients.

    Args:
        model: on ``device`` already.
        batches: normalised images (N, C, H, W), with targets if there are any.
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
        with in_eval_mode(model), torch.no_grad(), autocast(device, precision):
            outputs = run_at_once(model, images)
        yield _each(outputs, _in_full_precision), batch


class _EvaluationSums:
    """Sums over the batches of one split, kept on the device so that no batch waits for them."""

    def __init__(
        self, device: torch.device, task: Task, loss: UserLoss | None, metric: UserMetric | None
    ) -> None:
        self._task = task
        self._loss = loss
        self._metric = metric
        # Samples, what the losses are means over, and the sum of losses.
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._figures: dict[str, Tensor] = {}
        self._fits = True
        self._has_loss = False
        self._kept: list[tuple[Any, Tensor | None, Tensor | None]] = []

    def add(self, outputs: Any, labels: Tensor | None, images: Tensor) -> None:
        loss = self._loss_of(outputs, labels, images)
        n = weight = loss.new_tensor(len(images))
        if self._loss is None and labels is not None and isinstance(self._task, Weighing):
            weight = self._task.weight(labels).to(loss)
        self._sums += torch.stack([n, weight, loss * weight])
        figures = self._task.sums(outputs, labels) if self._fits and labels is not None else None
        self._fits = figures is not None
        for name, figure in (figures or {}).items():
            known = self._figures.get(name)
            self._figures[name] = figure.to(loss) if known is None else known + figure.to(loss)
        if self._metric is not None:
            kept = self._task.main_output(outputs) if self._task.has_loss else outputs
            inputs = images.cpu() if self._metric.takes_inputs else None
            self._kept.append((_each(kept, Tensor.cpu), None if labels is None else labels.cpu(), inputs))

    def _loss_of(self, outputs: Any, labels: Tensor | None, images: Tensor) -> Tensor:
        if self._loss is None and (labels is None or not self._task.has_loss):
            return self._sums.new_zeros(())
        self._has_loss = True
        if self._loss is not None:
            return self._loss(outputs, labels, images).detach().to(self._sums.dtype)
        assert labels is not None
        return self._task.loss(outputs, labels).detach().to(self._sums.dtype)

    def metrics(self, split: str, group: Group) -> Metrics:
        n, weight, loss = group.sum(self._sums).tolist()
        if not n:
            raise DataError(f"the {split} split is empty: nothing can be measured on it")
        if self._loss is not None and not math.isfinite(loss):
            raise UserCodeError(f"{self._loss.reference} returned {loss}; a loss is a finite number")
        values = {"loss": loss / max(weight, 1.0)} if self._has_loss else {}
        if self._fits:
            figures = {name: group.sum(figure) for name, figure in self._figures.items()}
            values |= self._task.values(figures, n)
        if self._metric is not None:
            outputs, labels, inputs = (_joined(list(parts), group) for parts in zip(*self._kept, strict=True))
            values[self._metric.name] = self._metric(outputs, labels, inputs)
        return Metrics(split=split, n=int(n), values=values)


def _each(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a network returned, with every tensor in it changed."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, Mapping):
        return {name: _each(item, change) for name, item in outputs.items()}
    if isinstance(outputs, (tuple, list)):
        kind = tuple if isinstance(outputs, tuple) else list
        return kind(_each(item, change) for item in outputs)
    return outputs


def _in_full_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _joined(parts: list[Any], group: Group) -> Any:
    """The outputs of all batches as one, tensors concatenated; lists with an item for each image grow."""
    first = parts[0]
    if isinstance(first, Tensor):
        return group.concatenate(torch.cat(parts))
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts], group) for name in first}
    if isinstance(first, (tuple, list)) and all(isinstance(item, Tensor) for item in first):
        return type(first)(_joined([part[place] for part in parts], group) for place in range(len(first)))
    return [item for part in parts for item in part] if isinstance(first, (tuple, list)) else first


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    split: str,
    device: torch.device,
    precision: str = "32",
    task: Task = CLASSIFICATION,
    loss: UserLoss | None = None,
    metric: UserMetric | None = None,
    group: Group | None = None,
    also: Callable[[Any, Tensor], None] | None = None,
) -> Metrics:
    """Measure a network on one split.

    Args:
        model: on ``device`` already; its modes and weights do not change.
        batches: normalised images (N, C, H, W) and their targets; each sample once.
        split: name of the split, for the record.
        device: the network's device.
        precision: ``32``, ``bf16`` or ``16``.
        task: what the outputs mean, and what is measured.
        loss: the user's, in place of the task's.
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
    named = [function for function in (loss, metric) if function is not None]
    reads_inputs = any(function.takes_inputs for function in named)
    # An autoencoder's images are their own targets.
    blind = bool(named) and all(function.takes_inputs for function in named)
    for outputs, batch in outputs_of(model, batches, device, precision):
        if batch.labels is None and not blind:
            raise DataError(f"the {split} split has no labels: only `evaluate --predictions` can use it")
        labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
        if loss is None and labels is not None:
            task.refuse(outputs, labels, split)
        with torch.no_grad():
            totals.add(outputs, labels, batch.images.to(device) if reads_inputs else batch.images)
            if also is not None and labels is not None:
                also(outputs, labels)
    return totals.metrics(split, group or Group())
