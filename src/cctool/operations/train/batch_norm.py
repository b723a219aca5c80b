"""Estimating batch-norm statistics again, on training images of a checkpoint's data set."""

from __future__ import annotations

from cctool.base.errors import UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.data import feed_of
from cctool.options.common import DataOptions
from cctool.training.batch_norm import recalibrate


def recalibrated(
    checkpoint: Checkpoint,
    source: DataSource,
    images: int,
    data: DataOptions,
    context: Context,
    *,
    augmented: bool = False,
) -> int:
    """Estimate a network's batch-norm statistics in place from at most ``images`` training images.

    With ``augmented`` images are augmented as in training. Returns the number that was used.

    Raises:
        UsageError: the preprocessing of the network is unknown.
        DataError: there are no training images.
    """
    refuse_unknown_preprocessing(checkpoint, "--recalibrate")
    feed = feed_of(checkpoint, source, data, context)
    # Shuffled, because the first images of a sorted data set are all of one class.
    served = feed.training()(0) if augmented else feed.plain("train", shuffle=True)
    return recalibrate(checkpoint.model.to(context.device), served, images, context.device)


def refuse_unknown_preprocessing(checkpoint: Checkpoint, option: str) -> None:
    """Refuse to estimate statistics from images that may be scaled wrongly.

    Raises:
        UsageError: the preprocessing of the network is unknown.
    """
    if checkpoint.spec.preprocessing is None:
        raise UsageError(
            f"{option} would estimate statistics from wrongly scaled images: the preprocessing of this "
            "model is unknown; say it with --mean and --std"
        )
