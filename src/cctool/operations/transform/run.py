"""`cctool transform`: put layers or feature maps into a transform domain, or fold fixed transformations."""

from __future__ import annotations

from collections.abc import Iterator

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations.context import Context, Outcome
from cctool.operations.transform import basis as transform_basis
from cctool.operations.transform import features as transform_features
from cctool.operations.transform import fold as transform_fold
from cctool.operations.transform import weights as transform_weights
from cctool.options.transform.choices import Mode, TransformTarget
from cctool.options.transform.options import TransformOptions


def run(checkpoint: Checkpoint, options: TransformOptions, context: Context) -> Iterator[Outcome]:
    """Transform weights or feature maps, as the target says, or fold.

    Raises:
        UsageError: if a kernel is unknown, or a pattern matches nothing.
        TransformError: if nothing can be transformed, or a fold would change the outputs.
    """
    if options.fold:
        yield from transform_fold.run(checkpoint, options, context)
    elif options.target is TransformTarget.FEATURES:
        yield from transform_features.run(checkpoint, options, context)
    elif options.weights.mode is Mode.BASIS:
        yield from transform_basis.run(checkpoint, options, context)
    else:
        yield from transform_weights.run(checkpoint, options, context)
