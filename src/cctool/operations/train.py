"""`cctool train`: train a fresh network, or go on with any checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.operations.conduct import Goal, conduct
from cctool.operations.context import Context, Outcome
from cctool.operations.fitting import user_loss
from cctool.options.train import TrainOptions
from cctool.training.objectives import Supervised

__all__ = ["goal", "run"]


def run(checkpoint: Checkpoint, options: TrainOptions, context: Context) -> Iterator[Outcome]:
    """Train a checkpoint's network on labels; yields the best epoch by validation.

    Raises:
        CctoolError: see `conduct`.
    """
    yield from conduct("train", goal, checkpoint, options, context)


def goal(checkpoint: Checkpoint, source: DataSource, options: TrainOptions, context: Context) -> Goal:
    """Minimise cross-entropy, or the user's own loss."""
    return Goal(Supervised(options.fit.label_smoothing, user_loss(options.fit.loss, context)))
