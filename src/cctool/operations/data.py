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
from cctool.data.classes import by_name
from cctool.data.serving.batches import Batch, Batches
from cctool.graph.execution import blaming_the_size
from cctool.operations.context import Context
from cctool.options.common import DataOptions
from cctool.training.evaluate import evaluate
from cctool.training.loop.feed import Feed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from cctool.data.records import DataSource


def open_source(
    options: DataOptions,
    checkpoint: Checkpoint,
    context: Context,
    *,
    renames: bool = False,
    own_labels: bool = False,
) -> DataSource | None:
    """Open the data for a checkpoint; None if no data set is given, or a remembered one cannot be opened.

    Labels are numbered by the names of the network's classes. ``renames`` keeps the data set's own numbers if
    it has as many classes and none of these names, for a training that gives the network other classes;
    ``own_labels`` always keeps them, for a network that gets a last layer for them.

    A remembered data set that cannot be opened gives a warning; one that was given is an error.
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
        known = checkpoint.spec.classes
        others = known is not None and set(source.classes).isdisjoint(known)
        if not own_labels and not (
            renames and others and known is not None and len(source.classes) == len(known)
        ):
            source = by_name(source, known)
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
    """The data set opened before there was a network, if opening it for the checkpoint gives the same."""
    found = context.opened
    if found is None or found.reference != options.data:
        return None
    # Data in memory cannot be opened by name; their limit was applied when they were taken.
    if found.held:
        return found
    if found.limit != options.limit:
        return None
    # Data sets of other splits may have other shapes; a user's function may return other data each time.
    if options.val_data or options.test_data or looks_like_user_code(found.reference):
        return None
    return found if found.shape == checkpoint.spec.input_shape else None


def require_source(
    options: DataOptions,
    checkpoint: Checkpoint,
    context: Context,
    why: str,
    *,
    renames: bool = False,
    own_labels: bool = False,
) -> DataSource:
    """Open the data for a checkpoint, as `open_source`; ``why`` says in the error what needs them.

    Raises:
        UsageError: if no data set is given or remembered.
        DataError: if it cannot be opened.
    """
    reference = options.data or checkpoint.spec.data
    if reference is None:
        raise UsageError(f"{why} needs data: name it with --data, as in --data digits or --data folder:DIR")
    source = open_source(options, checkpoint, context, renames=renames, own_labels=own_labels)
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
    """The preprocessing that the model was trained with; if unknown, the data set's, with a warning."""
    if checkpoint.spec.preprocessing is not None:
        return checkpoint.spec.preprocessing
    context.reporter.warn(
        f"the preprocessing of {whose} is unknown: using {source.name}'s, mean {_short(source.mean)} "
        f"std {_short(source.std)}; {options} say better"
    )
    return Preprocessing(mean=source.mean, std=source.std)


def with_preprocessing(checkpoint: Checkpoint, source: DataSource, context: Context) -> Checkpoint:
    """Record in the spec the preprocessing that the network was just trained with, if none is recorded."""
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
    """Serve a data set, opened for the checkpoint's input shape, normalised as the checkpoint says.

    ``fabric`` belongs to the processes that share the data; None if there is only this one.
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
    """The first ``count`` images of batches, (N, C, H, W) each."""
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
    """Measure top-1 and top-5 in percent and the loss on ``train``, ``validation`` or ``test``.

    Moves the model to the context's device.

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
    """Measure on the validation and test splits that the data has; () without data."""
    if source is None:
        return ()
    splits = [split for split in ("validation", "test") if split in source.loaders]
    return tuple(measured(checkpoint, source, options, context, split=split) for split in splits)


def example(checkpoint: Checkpoint) -> tuple[Tensor, ...]:
    """Two random images on the model's device, the same each time, to trace the network with.

    Raises:
        ArchitectureError: the network does not run on its own input size.
    """
    # Normal noise, not zeros: the cut and the masked network are compared on these very images.
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *checkpoint.spec.input_shape, generator=generator).to(device_of(checkpoint.model))
    with blaming_the_size(checkpoint.spec.input_shape), in_mode(checkpoint.model, training=False):
        checkpoint.model(images)
    return (images,)
