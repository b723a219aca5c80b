"""`cctool transform`: put layers or feature maps into a transform domain."""

from __future__ import annotations

from collections.abc import Iterator

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations import transform_basis, transform_features, transform_weights
from cctool.operations.context import Context, Outcome
from cctool.options.transform import TransformOptions
from cctool.options.transform_choices import Mode, TransformTarget

__all__ = ["run"]


def run(checkpoint: Checkpoint, options: TransformOptions, context: Context) -> Iterator[Outcome]:
    """Transform weights or feature maps, as the target says.

    Raises:
        UsageError: if a kernel is unknown, or a pattern matches nothing.
        TransformError: if nothing can be transformed.
    """
    if options.target is TransformTarget.FEATURES:
        yield from transform_features.run(checkpoint, options, context)
    elif options.weights.mode is Mode.BASIS:
        yield from transform_basis.run(checkpoint, options, context)
    else:
        yield from transform_weights.run(checkpoint, options, context)
