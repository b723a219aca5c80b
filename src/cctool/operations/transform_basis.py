"""`cctool transform`: basis."""

from __future__ import annotations

from collections.abc import Iterator

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations.context import Context, Outcome
from cctool.options.transform import TransformOptions

__all__ = ["run"]


def run(checkpoint: Checkpoint, options: TransformOptions, context: Context) -> Iterator[Outcome]:
    """To be written."""
    raise NotImplementedError
    yield
