"""Passing training images through a network, for pruning methods that need gradients or activations."""

from __future__ import annotations

from itertools import accumulate

from cctool.base.errors import UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.data import feed_of
from cctool.operations.judge.task import judge_of
from cctool.options.prune.options import PruneOptions
from cctool.pruning.scores.evidence import Evidence, gather


def evidence_for(
    checkpoint: Checkpoint, source: DataSource | None, options: PruneOptions, context: Context
) -> Evidence | None:
    """Gather the gradients or activations that the method needs, on un-augmented training images.

    The seed decides the order of images. Gradients are those of the task's loss, or the user's. The network
    is not changed.

    Returns:
        None for a method that needs no images.

    Raises:
        UsageError: the method needs images, and there are none or their preprocessing is unknown.
        DataError: the training split is empty.
        PruningError: the loss is not finite.
    """
    if not options.needs_data:
        return None
    method = options.method
    if source is None:
        raise UsageError(
            f"--method {method.value} looks at training images: name them with --data, as in --data digits "
            "or --data folder:DIR"
        )
    if checkpoint.spec.preprocessing is None:
        raise UsageError(
            f"--method {method.value} would look at wrongly scaled images: the preprocessing of this "
            "model is unknown; say it with --mean and --std"
        )
    # Shuffled, because the first images of a sorted data set are all of one class.
    served = feed_of(checkpoint, source, options.data, context).plain("train", shuffle=True)
    # Number of batches that have enough images, for the progress bar.
    enough = 1 + sum(images < options.samples for images in accumulate(map(len, served.parts)))
    steps = min(enough, len(served.parts))
    shown = context.reporter.progress(served, f"{method.value}: looking at images", steps)
    judge = judge_of(checkpoint, context)
    found = gather(
        checkpoint.model.to(context.device),
        shown,
        options.samples,
        method,
        loss=judge.loss or judge.training_loss,
    )
    if found.images < options.samples:
        context.reporter.note(f"{method.value}: {found.images} training images were there to look at")
    return found
