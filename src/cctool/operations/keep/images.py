"""A few images of a data set, as a network is given them, to compare two networks on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.data.serving.batches import batches
from cctool.operations.context import Context
from cctool.operations.data import making_targets
from cctool.operations.judge.task import judge_of
from cctool.options.common import DataOptions


def split_of(source: DataSource) -> str:
    """The split whose images show how a network is used: test, else validation, else training."""
    return next(name for name in ("test", "validation", "train") if name in source.loaders)


def some_images(
    checkpoint: Checkpoint,
    source: DataSource,
    split: str,
    wanted: int,
    options: DataOptions,
    context: Context,
) -> Iterator[Tensor]:
    """Batches (B, C, H, W) of at least ``wanted`` images, or all there are, taken evenly from a split.

    Nothing is drawn at random. A loader of the user is read from its beginning.
    """
    part, known = source.split(split), checkpoint.spec.preprocessing
    if part.loaded is None and len(part) > wanted:
        # Evenly, because the first images of a sorted data set are all of one class.
        part = part.take([number * len(part) // wanted for number in range(wanted)])
    served = batches(
        part,
        batch_size=min(options.batch_size, wanted),
        device=context.device,
        mean=known.mean if known else source.mean,
        std=known.std if known else source.std,
        workers=options.workers,
        **making_targets(judge_of(checkpoint, context).task),
    )
    left = wanted
    for batch in served:
        yield batch.images
        left -= len(batch.images)
        if left <= 0:
            return
