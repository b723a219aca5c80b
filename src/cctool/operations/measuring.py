"""Serving a data set as a checkpoint wants it, and measuring the checkpoint on a split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics, Preprocessing
from cctool.data.batches import batches
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.options.common import DataOptions
from cctool.training.evaluate import evaluate

__all__ = ["ServedSplit", "measured", "preprocessing_of", "serve"]


class ServedSplit:
    """The batches of one split as (images, labels), normalised on the device; iterating again starts anew."""

    def __init__(self, found: Any, context: Context, description: str | None) -> None:
        self._batches = found
        self._context = context
        self._description = description

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        served = self._batches
        if self._description:
            served = self._context.reporter.progress(served, self._description, total=len(self))
        for batch in served:
            yield batch.images, batch.labels


def preprocessing_of(checkpoint: Checkpoint, source: DataSource, context: Context) -> Preprocessing:
    """The preprocessing that the model was trained with; the data set's own, with a warning, if unknown."""
    if checkpoint.spec.preprocessing is not None:
        return checkpoint.spec.preprocessing
    context.reporter.warn(
        f"the preprocessing of this model is unknown: using {source.name}'s, mean {_short(source.mean)} "
        f"std {_short(source.std)}; --mean and --std say better"
    )
    return Preprocessing(mean=source.mean, std=source.std)


def _short(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


def serve(
    checkpoint: Checkpoint,
    source: DataSource,
    split: str,
    options: DataOptions,
    context: Context,
    *,
    description: str | None = None,
    preprocessing: Preprocessing | None = None,
) -> ServedSplit:
    """Serve a split un-augmented and in order.

    Args:
        checkpoint: says how inputs are normalised.
        source: opened for the checkpoint's input shape.
        split: ``train``, ``validation`` or ``test``.
        options: batch size and workers.
        context: device, and where progress is shown.
        description: of the progress bar; None shows none.
        preprocessing: where the caller has asked for it already.
    """
    normalisation = preprocessing or preprocessing_of(checkpoint, source, context)
    found = batches(
        source.split(split),
        batch_size=options.batch_size,
        device=context.device,
        mean=normalisation.mean,
        std=normalisation.std,
        workers=options.workers,
    )
    return ServedSplit(found, context, description)


def measured(
    checkpoint: Checkpoint,
    source: DataSource,
    options: DataOptions,
    context: Context,
    *,
    split: str = "test",
    preprocessing: Preprocessing | None = None,
) -> Metrics:
    """Measure top-1, top-5 and loss on a split; every metric names its split and n.

    Raises:
        DataError: if the data has no such split, or other classes than the network.
    """
    served = serve(
        checkpoint,
        source,
        split,
        options,
        context,
        description=f"evaluating on {split}",
        preprocessing=preprocessing,
    )
    return evaluate(
        checkpoint.model.to(context.device),
        served,
        split=split,
        device=context.device,
        precision=str(context.runtime.precision),
    )
