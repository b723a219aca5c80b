"""`cctool compare`: accuracy, parameters and MACs of one checkpoint, for a table of several."""

from __future__ import annotations

from dataclasses import dataclass

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics
from cctool.operations.context import Context
from cctool.operations.data import measured, open_source
from cctool.operations.size import measure
from cctool.options.inspect.compare import CompareOptions


@dataclass(frozen=True)
class CompareReport:
    """One checkpoint's row.

    Attributes:
        architecture: its reference.
        verbs: the commands that led to it.
        metrics: measured now; None without data.
        parameters: number of scalar parameters.
        macs: multiply-accumulates of convolutions and linear layers for one input; None if it does not run.
    """

    architecture: str
    verbs: tuple[str, ...]
    metrics: Metrics | None
    parameters: int
    macs: int | None


def run(checkpoint: Checkpoint, options: CompareOptions, context: Context) -> CompareReport:
    """Measure one checkpoint."""
    source = open_source(options.data, checkpoint, context)
    metrics = None
    if source is not None:
        metrics = measured(checkpoint, source, options.data, context, split=options.split.value)
    size = measure(checkpoint)
    return CompareReport(
        architecture=checkpoint.spec.architecture,
        verbs=tuple(step.verb for step in checkpoint.history),
        metrics=metrics,
        parameters=size.parameters,
        macs=size.macs,
    )
