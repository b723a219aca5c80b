"""`cctool compare`: accuracy, size and time of one network, for a table of several."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cctool.analysis.latency import measure_latency
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics
from cctool.data.records import DataSource
from cctool.formats.onnx.network import OnnxNetwork
from cctool.operations.context import Context
from cctool.operations.data import can_measure, measured, open_source, say_other_splits
from cctool.operations.judge.size import Footprint, footprint, measure
from cctool.operations.judge.task import judge_of
from cctool.options.inspect.compare import CompareOptions
from cctool.tasks.base import Measure, Task, main_measure
from cctool.tasks.details import Hitting, class_name
from cctool.tasks.shares import interval_of
from cctool.training.objectives import CLASSIFICATION


@dataclass(frozen=True)
class Difference:
    """How a share of one network differs from that of the first.

    Attributes:
        measure: its key.
        points: this network's percentage minus the first's.
        within: whether chance alone explains it, at 95 %.
        test: ``mcnemar`` on the same samples, else ``newcombe``.
        p: of McNemar's exact test.
        only_first: samples that only the first gets right, if they are the same.
        only_this: samples that only this one gets right.
    """

    measure: str
    points: float
    within: bool
    test: str
    p: float | None = None
    only_first: int | None = None
    only_this: int | None = None


@dataclass(frozen=True)
class PairedSamples:
    """What single samples gave.

    Attributes:
        key: data set, split and labels: samples of equal keys are the same.
        hits: which count, booleans (N,), for each share.
    """

    key: tuple[str, ...]
    hits: Mapping[str, Tensor]


@dataclass(frozen=True)
class CompareReport:
    """One network's row.

    Attributes:
        architecture: its reference.
        verbs: the commands that led to it.
        metrics: measured now; None without data.
        parameters: number of scalar parameters; None if unknown.
        macs: multiply-accumulates of convolutions and linear layers for one input; None if unknown.
        data: reference of the data set that was measured on.
        size: parameters, and bytes of the file and of the tensors.
        intervals: 95 % intervals, in percent, of the metrics that are shares of the samples.
        milliseconds: median time of a batch of one, if it was asked for.
        differences: from the first network, for each share.
        judge: the task, which names what was measured.
        main: by which the network is judged: the user's metric, or the task's main one.
        samples: what single samples gave.
    """

    architecture: str
    verbs: tuple[str, ...]
    metrics: Metrics | None
    parameters: int | None
    macs: int | None
    data: str | None = None
    size: Footprint = field(default_factory=Footprint)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    milliseconds: float | None = None
    differences: tuple[Difference, ...] = ()
    judge: Task = field(default=CLASSIFICATION, metadata={"json": False})
    main: Measure = field(default=main_measure(CLASSIFICATION), metadata={"json": False})
    samples: PairedSamples | None = field(default=None, compare=False, repr=False, metadata={"json": False})


def run(checkpoint: Checkpoint, options: CompareOptions, context: Context) -> CompareReport:
    """Measure one checkpoint."""
    cost = measure(checkpoint)
    size = footprint(checkpoint, None if checkpoint.origin is None else context.output)
    verbs = tuple(step.verb for step in checkpoint.history)
    report = CompareReport(checkpoint.spec.architecture, verbs, None, cost.parameters, cost.macs, size=size)
    return _measured(report, checkpoint, options, context)


def run_onnx(path: Path, checkpoint: Checkpoint, options: CompareOptions, context: Context) -> CompareReport:
    """Measure an ONNX file as the given checkpoint is measured: its data, preprocessing, classes and task.

    Raises:
        CheckpointError: if onnxruntime cannot load it.
        ArchitectureError: if it takes other inputs than the checkpoint.
    """
    context.reporter.note(f"{path}: run on the data and with the preprocessing of {context.output}")
    network = OnnxNetwork(path, checkpoint.spec.input_shape)
    size = Footprint(file_bytes=path.stat().st_size)
    report = CompareReport("onnx", (), None, None, None, size=size)
    return _measured(report, replace(checkpoint, model=network), options, context)


def _measured(
    report: CompareReport, checkpoint: Checkpoint, options: CompareOptions, context: Context
) -> CompareReport:
    judge = judge_of(checkpoint, context)
    task = judge.task
    source = open_source(options.data, checkpoint, context)
    split = options.split.value
    say_other_splits(split, context)
    if source is not None and can_measure(checkpoint, source, (split,), context):
        gathered = _Gathered(task)
        metrics = measured(checkpoint, source, options.data, context, split=split, also=gathered.add)
        shares = [
            measure.name for measure in task.measures if measure.share and measure.name in metrics.values
        ]
        report = replace(
            report,
            metrics=metrics,
            data=source.reference,
            intervals={name: interval_of(metrics.values[name], metrics.n) for name in shares},
            samples=gathered.samples(source, split, checkpoint.spec.classes or source.classes),
        )
    if options.latency:
        time = measure_latency(checkpoint.model, checkpoint.spec.input_shape)
        report = replace(report, milliseconds=time.milliseconds)
    return replace(report, judge=task, main=judge.main)


class _Gathered:
    """Which samples count, batch by batch, for the tasks that say it."""

    def __init__(self, task: Task) -> None:
        self._task = task if isinstance(task, Hitting) else None
        self._hits: dict[str, list[Tensor]] = {}
        self._labels: list[Tensor] = []

    def add(self, outputs: Any, targets: Tensor) -> None:
        if self._task is None:
            return
        self._labels.append(targets.cpu())
        for name, hits in self._task.hits(outputs, targets).items():
            self._hits.setdefault(name, []).append(hits.cpu())

    def samples(self, source: DataSource, split: str, names: tuple[str, ...]) -> PairedSamples | None:
        if not self._hits:
            return None
        # By name, because networks may number their classes differently.
        labels = [class_name(label, names) for label in torch.cat(self._labels).tolist()]
        digest = hashlib.sha256("\n".join(labels).encode()).hexdigest()
        hits = {name: torch.cat(parts) for name, parts in self._hits.items()}
        return PairedSamples((source.reference, split, digest), hits)
