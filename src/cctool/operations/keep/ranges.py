"""Keeping ranges of activations in step with the weights around them.

As with codecs of feature maps: commands that change weights without the quantizers at work calibrate again
where training images are at hand, and say so where none are. A training has them in its loop.
"""

from __future__ import annotations

from dataclasses import replace

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.file.payload import fingerprint_of
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.keep.calibrate import calibration_images
from cctool.operations.keep.quantized_weights import settled
from cctool.options.common import DataOptions
from cctool.quantization.calibration.run import calibrate_activations
from cctool.quantization.network.attach import quantizers_of
from cctool.quantization.network.edit import with_quantizers
from cctool.quantization.network.points import Observing

__all__ = ["in_step", "recalibrated_quantizers", "warn_of_stale_ranges"]


def recalibrated_quantizers(
    checkpoint: Checkpoint, source: DataSource | None, data: DataOptions, context: Context
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Find the ranges of activations again for weights that were changed without them.

    Args:
        checkpoint: its model may be changed in place.
        source: opened for the checkpoint; None where there are no data.
        data: batch size and workers.
        context: device, seed, reporter.

    Returns:
        The checkpoint whose quantizers are in step, and what the history should say. Without training
        images, or where the preprocessing is unknown, ranges stay as they are, with a warning.
    """
    held = quantizers_of(checkpoint.model)
    if held is None or not held.activation_keys or not is_stale(checkpoint):
        return checkpoint, ()
    count = len(held.activation_keys)
    if source is None or "train" not in source.loaders or checkpoint.spec.preprocessing is None:
        why = "the preprocessing is unknown" if source and "train" in source.loaders else "no training images"
        note = f"{count} ranges of activations stay those of the weights before: {why} to find them on again"
        context.reporter.warn(f"{note}; `cctool quantize --data` does")
        return checkpoint, (note,)
    model = checkpoint.model.to(context.device)
    wanted = max(held.state.images, 1)
    images, used = calibration_images(checkpoint, source, wanted, data, context)
    calibrate_activations(model, images, held.state.observing or Observing())
    held.state.images = used
    note = f"the ranges of {count} activations were found again on {used:,} training images"
    context.reporter.note(note)
    return in_step(checkpoint, context), (note,)


def is_stale(checkpoint: Checkpoint) -> bool:
    """Whether ranges belong to other weights than the network has now."""
    held = quantizers_of(checkpoint.model)
    return held is not None and held.state.fingerprint != fingerprint_of(checkpoint.model)


def in_step(checkpoint: Checkpoint, context: Context) -> Checkpoint:
    """Say that the ranges are those of the weights as they are now, which get the values that are stored."""
    held = quantizers_of(checkpoint.model)
    if held is None:
        return checkpoint
    checkpoint = settled(checkpoint, context.tables)
    held.state.fingerprint = fingerprint_of(checkpoint.model)
    return replace(checkpoint, spec=with_quantizers(checkpoint.spec, checkpoint.model))


def warn_of_stale_ranges(checkpoint: Checkpoint, context: Context) -> None:
    """Say that ranges were found for other weights than the network has now."""
    held = quantizers_of(checkpoint.model)
    if held is not None and held.activation_keys and is_stale(checkpoint):
        context.reporter.warn(
            f"the ranges of {len(held.activation_keys)} activations were found for other weights than the "
            "network has now; `cctool quantize` finds them again"
        )
