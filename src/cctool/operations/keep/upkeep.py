"""Keeping what was calibrated in step with the weights around it: codecs of maps, ranges of activations.

Codecs come first, because quantizers see the maps that they give.
"""

from __future__ import annotations

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.keep.codecs import recalibrated_taps, trained_taps, warn_of_stale_taps
from cctool.operations.keep.ranges import in_step, recalibrated_quantizers, warn_of_stale_ranges
from cctool.options.common import DataOptions

__all__ = ["recalibrated_parts", "trained_parts", "warn_of_stale"]


def recalibrated_parts(
    checkpoint: Checkpoint, source: DataSource | None, data: DataOptions, context: Context
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Calibrate again for weights that were changed without codecs and quantizers, where there are images.

    Arguments and result as `recalibrated_taps`.
    """
    checkpoint, of_taps = recalibrated_taps(checkpoint, source, data, context)
    checkpoint, of_ranges = recalibrated_quantizers(checkpoint, source, data, context)
    return checkpoint, (*of_taps, *of_ranges)


def trained_parts(
    checkpoint: Checkpoint, source: DataSource, data: DataOptions, context: Context
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Accept codecs and quantizers that a training had in its loop.

    Quantized weights get the values that are stored. Arguments and result as `trained_taps`.
    """
    checkpoint = in_step(checkpoint, context)
    checkpoint, notes = trained_taps(checkpoint, source, data, context)
    return checkpoint, notes


def warn_of_stale(checkpoint: Checkpoint, context: Context) -> None:
    """Say what was calibrated for other weights than the network has now."""
    warn_of_stale_taps(checkpoint, context)
    warn_of_stale_ranges(checkpoint, context)
