"""The data that an operation uses: opened, served as its checkpoint wants them, and measured on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cctool.base.errors import DataError, UsageError
from cctool.base.networks import device_of, in_mode
from cctool.base.user_code import looks_like_user_code
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics, Preprocessing
from cctool.data.serving.batches import Batch, Batches
from cctool.graph.execution import blaming_the_size
from cctool.operations.context import Context
from cctool.options.common import DataOptions
from cctool.training.evaluate import evaluate
from cctool.training.loop.feed import Feed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from cctool.data.records import DataSource

__all__ = [
    "example",
    "feed_of",
    "first_images",
    "measured",
    "measured_splits",
    "open_named",
    "open_source",
    "preprocessing_of",
    "require_source",
    "serve",
    "with_preprocessing",
]


def open_source(options: DataOptions, checkpoint: Checkpoint, context: Context) -> DataSource | None:
    """Open the data for a checkpoint; None where none was named and none is remembered or to be found.

    A data set that is only remembered and cannot be opened is a warning; one that was named is an error.
    """
    remembered = options.data is None
    reference = checkpoint.spec.data if remembered else options.data
    if reference is None:
        for option, other in (("--val-data", options.val_data), ("--test-data", options.test_data)):
            if other is not None:
                raise UsageError(f"{option} {other} replaces a split of a data set: name that with --data")
        return None
    if remembered:
        context.reporter.note(f"data: {reference}, the checkpoint's last (--data names another)")
    try:
        source = _opened_first(options, checkpoint, context) or open_named(
            options, reference, context.user_code, checkpoint.spec.input_shape
        )
    except DataError as error:
        if not remembered:
            raise
        context.reporter.warn(
            f"the checkpoint's last data set cannot be opened, so nothing is measured: {error}"
        )
        return None
    for note in source.notes:
        context.reporter.note(f"data: {note}")
    return source


def open_named(
    options: DataOptions, reference: str, named: frozenset[str], input_shape: tuple[int, int, int] | None
) -> DataSource:
    """Open a data set, for a network of that input shape or before there is one."""
    from cctool.data.registry import open_data

    return open_data(
        reference,
        val_data=options.val_data,
        test_data=options.test_data,
        user_code=named,
        input_shape=input_shape,
        limit=options.limit,
    )


def _opened_first(options: DataOptions, checkpoint: Checkpoint, context: Context) -> DataSource | None:
    """What was opened before there was a network, where opening it for the checkpoint would give the same."""
    found = context.opened
    if found is None or (found.reference, found.limit) != (options.data, options.limit):
        return None
    # Other sets beside it are served in a shape of their own; a user's function may give others each time.
    if options.val_data or options.test_data or looks_like_user_code(found.reference):
        return None
    return found if found.shape == checkpoint.spec.input_shape else None


def require_source(options: DataOptions, checkpoint: Checkpoint, context: Context, why: str) -> DataSource:
    """Open the data for a checkpoint, or fail with the way out.

    Raises:
        UsageError: if no data set was named and none is remembered.
        DataError: if it cannot be opened.
    """
    reference = options.data or checkpoint.spec.data
    if reference is None:
        raise UsageError(f"{why} needs data: name it with --data, as in --data digits or --data folder:DIR")
    source = open_source(options, checkpoint, context)
    if source is None:
        raise DataError(f"{why} needs data, and {reference} cannot be opened; --data names another")
    return source


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
    fabric: Fabric | None = None,
) -> Feed:
    """Serve a data set to a checkpoint's network.

    Args:
        checkpoint: says how inputs are normalised.
        source: opened for the checkpoint's input shape.
        options: batch size and workers.
        context: device and seed.
        fabric: of the processes that share the data; None where there is only this one.
    """
    return Feed(
        source,
        preprocessing_of(checkpoint, source, context),
        batch_size=options.batch_size,
        device=context.device if fabric is None else fabric.device,
        seed=context.runtime.seed,
        workers=options.workers,
        rank=0 if fabric is None else fabric.global_rank,
        world_size=1 if fabric is None else fabric.world_size,
    )


def first_images(batches: Iterable[Batch], count: int) -> Iterator[Tensor]:
    """The first ``count`` images of batches."""
    for batch in batches:
        yield batch.images[:count]
        count -= len(batch.images)
        if count <= 0:
            return


def serve(
    checkpoint: Checkpoint, source: DataSource, split: str, options: DataOptions, context: Context
) -> Batches:
    """Serve a split un-augmented and in order, each image once."""
    return feed_of(checkpoint, source, options, context).plain(split)


def measured(
    checkpoint: Checkpoint, source: DataSource, options: DataOptions, context: Context, *, split: str = "test"
) -> Metrics:
    """Measure top-1, top-5 and loss on a split; every metric names its split and n.

    Args:
        checkpoint: its model is moved to the context's device.
        source: opened for the checkpoint.
        options: batch size and workers.
        context: device and precision.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        DataError: if the data has no such split, or other classes than the network.
    """
    served = serve(checkpoint, source, split, options, context)
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


def example(checkpoint: Checkpoint) -> tuple[Tensor, ...]:
    """Inputs that show which channels go together; the numbers serve the comparison of cut and masked.

    Raises:
        ArchitectureError: the network does not run on its own input size.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *checkpoint.spec.input_shape, generator=generator).to(device_of(checkpoint.model))
    with blaming_the_size(checkpoint.spec.input_shape), in_mode(checkpoint.model, training=False):
        checkpoint.model(images)
    return (images,)
