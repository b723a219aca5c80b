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
from cctool.training.objectives import cross_entropy, main_output
from cctool.training.processes import Group
from cctool.training.user_functions import UserMetric

LossFunction = Callable[[Any, Tensor], Tensor]

_TOP = 5


def trial_output(model: nn.Module, input_shape: tuple[int, int, int]) -> Tensor:
    """Main output of a network, in eval mode, for two images of zeros of ``input_shape`` (C, H, W).

    Raises:
        ArchitectureError: if it does not run on them.
        TrainingError: if its outputs cannot be trained on.
    """
    device = device_of(model)
    with blaming_the_size(input_shape), in_eval_mode(model), torch.no_grad():
        outputs = model(torch.zeros(2, *input_shape, device=device))
    return main_output(outputs)


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


def count_correct(logits: Tensor, labels: Tensor, top: int) -> Tensor:
    """Count samples whose label is among the ``top`` largest logits, as a scalar tensor on their device."""
    if top == 1:
        return (logits.argmax(1) == labels).sum()
    best = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1).sum()


class _EvaluationSums:
    """Sums over the batches of one split, kept on the device so that no batch waits for them."""

    def __init__(self, device: torch.device, loss: LossFunction, metric: UserMetric | None) -> None:
        self._loss = loss
        self._metric = metric
        # Samples, sum of losses, labels that have the largest logit, labels among the largest five.
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._classifies = True
        self._outputs: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, outputs: Any, labels: Tensor) -> None:
        logits = main_output(outputs)
        n = labels.shape[0]
        loss = self._loss(outputs, labels).detach().to(self._sums.dtype)
        self._classifies &= logits.dim() == 2 and labels.dim() == 1
        hits = (
            [count_correct(logits, labels, top) for top in (1, _TOP)] if self._classifies else [loss * 0] * 2
        )
        self._sums += torch.stack([loss.new_tensor(n), loss * n, *(hit.to(loss) for hit in hits)])
        if self._metric is not None:
            self._outputs.append(logits.cpu())
            self._labels.append(labels.cpu())

    def metrics(self, split: str, group: Group) -> Metrics:
        n, loss, top1, top5 = group.sum(self._sums).tolist()
        if not n:
            raise DataError(f"the {split} split is empty: nothing can be measured on it")
        values = {"loss": loss / n}
        if self._classifies:
            values |= {"top1": 100 * top1 / n, "top5": 100 * top5 / n}
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
    loss: LossFunction | None = None,
    metric: UserMetric | None = None,
    group: Group | None = None,
) -> Metrics:
    """Measure a network on one split.

    Args:
        model: on ``device`` already; its modes and weights do not change.
        batches: normalised images (N, C, H, W) and labels (N,); each sample once.
        split: name of the split, for the record.
        device: the network's device.
        precision: ``32``, ``bf16`` or ``16``.
        loss: (outputs, labels) -> mean loss of a batch; None is cross-entropy.
        metric: the user's metric, computed over all samples together.
        group: the processes that share the split, each with its own part of it.

    Returns:
        ``loss`` (mean), ``top1`` and ``top5`` (percent) where outputs are logits, and the user's metric.

    Raises:
        DataError: if there are no samples, no labels, or labels that the network has no class for.
        UserCodeError: if the user's loss or metric fails.
    """
    totals = _EvaluationSums(device, loss or cross_entropy, metric)
    for outputs, batch in outputs_of(model, batches, device, precision):
        if batch.labels is None:
            raise DataError(f"the {split} split has no labels: only `evaluate --predictions` can use it")
        labels = batch.labels.to(device, non_blocking=True)
        if loss is None:
            _refuse_unknown_classes(main_output(outputs), labels, split)
        with torch.no_grad():
            totals.add(outputs, labels)
    return totals.metrics(split, group or Group())


def _refuse_unknown_classes(logits: Tensor, labels: Tensor, split: str) -> None:
    # Not on a GPU, where reading the labels would wait for every batch, and where cross-entropy itself fails.
    if logits.device.type != "cpu" or logits.dim() != 2 or not labels.numel():
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        odd = low if low < 0 else high
        raise DataError(
            f"the {split} split has a label {odd}, the network {logits.shape[1]} classes "
            f"(0 to {logits.shape[1] - 1}): another data set, or another network, is needed"
        )
