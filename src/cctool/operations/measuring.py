"""Serving a data set as a checkpoint wants it, and measuring the checkpoint on a split."""

from __future__ import annotations

from dataclasses import replace

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics, Preprocessing
from cctool.data.records import DataSource
from cctool.data.serving.batches import Batches
from cctool.operations.context import Context
from cctool.options.common import DataOptions
from cctool.training.evaluate import evaluate
from cctool.training.loop.feed import Feed

__all__ = ["feed_of", "measured", "measured_splits", "preprocessing_of", "serve", "with_preprocessing"]


def preprocessing_of(
    checkpoint: Checkpoint,
    source: DataSource,
    context: Context,
    *,
    whose: str = "this model",
    options: str = "--mean and --std",
) -> Preprocessing:
    """The preprocessing that the model was trained with; the data set's own, with a warning, if unknown."""
    if checkpoint.spec.preprocessing is not None:
        return checkpoint.spec.preprocessing
    context.reporter.warn(
        f"the preprocessing of {whose} is unknown: using {source.name}'s, mean {_short(source.mean)} "
        f"std {_short(source.std)}; {options} say better"
    )
    return Preprocessing(mean=source.mean, std=source.std)


def with_preprocessing(checkpoint: Checkpoint, source: DataSource, context: Context) -> Checkpoint:
    """The checkpoint whose spec says how its inputs are normalised: trained so, it needs inputs so."""
    if checkpoint.spec.preprocessing is not None:
        return checkpoint
    update = {"preprocessing": preprocessing_of(checkpoint, source, context)}
    return replace(checkpoint, spec=checkpoint.spec.model_copy(update=update))


def _short(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


def feed_of(
    checkpoint: Checkpoint,
    source: DataSource,
    options: DataOptions,
    context: Context,
    *,
    preprocessing: Preprocessing | None = None,
) -> Feed:
    """Serve a data set to a checkpoint's network.

    Args:
        checkpoint: says how inputs are normalised.
        source: opened for the checkpoint's input shape.
        options: batch size and workers.
        context: device and seed.
        preprocessing: where the caller has asked for it already.
    """
    return Feed(
        source,
        preprocessing or preprocessing_of(checkpoint, source, context),
        batch_size=options.batch_size,
        device=context.device,
        seed=context.runtime.seed,
        workers=options.workers,
    )


def serve(
    checkpoint: Checkpoint, source: DataSource, split: str, options: DataOptions, context: Context
) -> Batches:
    """Serve a split un-augmented and in order, each image once."""
    return feed_of(checkpoint, source, options, context).plain(split)


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

    Args:
        checkpoint: its model is moved to the context's device.
        source: opened for the checkpoint.
        options: batch size and workers.
        context: device and precision.
        split: ``train``, ``validation`` or ``test``.
        preprocessing: where the caller has asked for it already.

    Raises:
        DataError: if the data has no such split, or other classes than the network.
    """
    served = feed_of(checkpoint, source, options, context, preprocessing=preprocessing).plain(split)
    return evaluate(
        checkpoint.model.to(context.device),
        context.reporter.progress(served, f"evaluating on {split}", len(served)),
        split=split,
        device=context.device,
        precision=str(context.runtime.precision),
    )


def measured_splits(
    checkpoint: Checkpoint, source: DataSource | None, options: DataOptions, context: Context
) -> tuple[Metrics, ...]:
    """Measure on the validation and test splits, as far as the data has them; on nothing without data."""
    if source is None:
        return ()
    splits = [split for split in ("validation", "test") if split in source.loaders]
    return tuple(measured(checkpoint, source, options, context, split=split) for split in splits)
