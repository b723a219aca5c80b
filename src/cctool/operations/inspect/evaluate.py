"""`cctool evaluate`: measure a checkpoint on a split, and write what single samples and classes show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cctool.base.errors import DataError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics
from cctool.data.records import SPLITS, DataSource
from cctool.data.serving.batches import Batch
from cctool.operations.context import Context, ShownTables, header, refuse_existing
from cctool.operations.data import has_targets, require_source, say_other_splits, serve, warn_of_no_numbers
from cctool.operations.inspect.classes import (
    ClassCounts,
    ClassFigures,
    class_table,
    write_classes,
    write_matrix,
)
from cctool.operations.inspect.predictions import predicted, predicting, write_predictions
from cctool.operations.judge.size import Footprint, footprint
from cctool.operations.judge.task import Judge, judge_of
from cctool.operations.keep.events import warn_of_stale
from cctool.operations.transform.quality_tables import stream_tables, tap_tables
from cctool.operations.transform.watch import refuse_unwatched, watched
from cctool.operations.transform.write_streams import StreamFigures
from cctool.options.inspect.evaluate import EvaluateOptions, SplitName
from cctool.tasks.base import LOSS, Measure, Task, main_measure
from cctool.tasks.details import Classed
from cctool.tasks.shares import interval_of, shown
from cctool.training.evaluate import evaluate, outputs_of
from cctool.training.objectives import CLASSIFICATION
from cctool.transforms.codec.figures import TapFigures


@dataclass(frozen=True)
class EvaluateReport:
    """What was measured.

    Attributes:
        architecture: of the network.
        data: reference of the data set.
        split: that was measured on.
        n: number of images.
        metrics: None for images without labels.
        predictions: path of the CSV file; None if it was not asked for.
        taps: figures of coded feature maps, in the order of the forward pass.
        streams: sizes of their bitstreams, if they were coded to bytes.
        written: other files and folders.
        size: parameters, and bytes of the file and of the tensors.
        intervals: 95 % intervals, in percent, of the metrics that are shares of the images.
        classes: what was measured of each class, if it was asked for.
        confusion: counts (classes, classes), rows by label, if they were asked for.
        judge: the task, which names what was measured.
        main: by which the network is judged: the user's metric, or the task's main one.
    """

    architecture: str
    data: str
    split: str
    n: int
    metrics: Metrics | None
    predictions: str | None = None
    taps: tuple[TapFigures, ...] = ()
    streams: tuple[StreamFigures, ...] = ()
    written: tuple[str, ...] = ()
    size: Footprint = field(default_factory=Footprint)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    classes: tuple[ClassFigures, ...] = ()
    confusion: Tensor | None = field(default=None, compare=False, metadata={"json": False})
    judge: Task = field(default=CLASSIFICATION, metadata={"json": False})
    main: Measure = field(default=main_measure(CLASSIFICATION), metadata={"json": False})

    @property
    def files(self) -> tuple[str, ...]:
        """All paths that were written."""
        return (*([] if self.predictions is None else [self.predictions]), *self.written)

    def summary(self) -> list[tuple[str, object]]:
        """What was measured and its value: the task's measures, the loss, the user's metric, sizes."""
        rows: list[tuple[str, object]] = [
            ("network", self.architecture),
            ("data", f"{self.data}, {self.split}"),
            ("n", self.n),
            *_measured(self.metrics, self.judge, self.main),
            ("parameters", self.size.parameters),
            ("bytes of the file", self.size.file_bytes),
            ("bytes of the tensors, dense", self.size.dense_bytes),
            ("bytes of the tensors, as stored", self.size.stored_bytes),
        ]
        return rows

    def class_tables(self) -> ShownTables:
        """The table of classes, if it was asked for."""
        if not self.classes or not isinstance(self.judge, Classed):
            return []
        return [class_table(self.classes, self.judge.class_measures, self.judge.counted)]

    def tables(self) -> ShownTables:
        """Tables about taps and their streams."""
        return [*tap_tables(self.taps, self.split), *stream_tables(self.streams)]


def _measured(metrics: Metrics | None, task: Task, main: Measure) -> list[tuple[str, object]]:
    if metrics is None:
        return []
    known = {measure.name: measure for measure in (*task.measures, LOSS, main)}
    return [
        (measure.title, shown(measure, metrics.values[name], metrics.n))
        for name, measure in known.items()
        if name in metrics.values
    ]


def run(checkpoint: Checkpoint, options: EvaluateOptions, context: Context) -> EvaluateReport:
    """Measure a checkpoint; write what the options ask about samples, classes and coded feature maps.

    Raises:
        DataError: if the data has no such split, or no labels and nothing is to be written; or if the task
            has no classes or predictions, and the options ask for them.
        CheckpointError: if a file exists and may not be replaced.
        UsageError: if options are about coded feature maps, and the network has none.
    """
    judge = judge_of(checkpoint, context)
    task = judge.task
    files = _files(options)
    refuse_existing(files, context)
    if options.predictions is not None:
        predicting(task)
    refuse_unwatched(checkpoint, options, context)
    source = require_source(options.data, checkpoint, context, "evaluate")
    warn_of_stale(checkpoint, context.reporter)
    split = _split(source, options.split, context)
    say_other_splits(split, context)
    counts = ClassCounts(task, split, options) if options.asks_for_classes else None
    has_labels = not judge.needs_targets or has_targets(source.split(split))
    if options.predictions is None and not options.asks_for_taps:
        judge.require_measure("evaluate")
    if not has_labels:
        _refuse_unlabelled(source.origin(split), options)
    with watched(checkpoint, source.reference, split, options, context) as watch:
        batches = watch.batches(_shown(checkpoint, source, split, options, context))
        metrics = None
        if has_labels and judge.measures:
            also = None if counts is None else counts.add
            metrics = _metrics(checkpoint, batches, split, judge, context, also)
            warn_of_no_numbers(metrics, judge, context)
        elif options.asks_for_taps:
            # Without labels nothing is measured; the images only have to pass the taps.
            for _ in outputs_of(checkpoint.model, batches, context.device, str(context.runtime.precision)):
                pass
        seen = watch.finish(metrics)
    if options.predictions is not None:
        again = _shown(checkpoint, source, split, options, context)
        rows = predicted(task, checkpoint, source, split, again, context)
        write_predictions(rows, Path(options.predictions), overwrite=context.force)
    size = footprint(checkpoint, None if checkpoint.origin is None else context.output)
    report = EvaluateReport(
        checkpoint.spec.architecture,
        source.reference,
        split,
        len(source.split(split)),
        metrics,
        options.predictions,
        seen.taps,
        seen.streams,
        seen.written,
        size,
        _intervals(metrics, task),
        judge=task,
        main=judge.main,
    )
    return report if counts is None else _with_classes(report, counts, checkpoint, source, options, context)


def _files(options: EvaluateOptions) -> tuple[Path, ...]:
    """Files about samples and classes; two of one name are refused."""
    named = (options.predictions, options.csv, options.xlsx, options.confusion)
    files = tuple(Path(name) for name in named if name is not None)
    if len({path.resolve() for path in files}) < len(files):
        raise UsageError(f"two files would have one name: {', '.join(map(str, files))}")
    return files


def _refuse_unlabelled(reference: str, options: EvaluateOptions) -> None:
    if options.asks_for_classes:
        asked = "--per-class" if options.per_class else "--confusion"
        raise DataError(f"{reference} has no labels, which {asked} needs")
    if options.predictions is None and not options.asks_for_taps:
        raise DataError(f"{reference} has no labels: give --predictions FILE.csv, or labelled data")


def _intervals(metrics: Metrics | None, task: Task) -> dict[str, tuple[float, float]]:
    if metrics is None:
        return {}
    return {
        measure.name: interval_of(metrics.values[measure.name], metrics.n)
        for measure in task.measures
        if measure.share and measure.name in metrics.values
    }


def _with_classes(
    report: EvaluateReport,
    counts: ClassCounts,
    checkpoint: Checkpoint,
    source: DataSource,
    options: EvaluateOptions,
    context: Context,
) -> EvaluateReport:
    """Write what the options ask about classes, and say it in the report."""
    names = checkpoint.spec.classes or source.classes
    told = f"{report.data}, {report.split}, {report.n:,} images"
    notes = tuple(header(checkpoint, ("Measured on", told)))
    classes = counts.figures(names) if options.per_class else ()
    tables = tuple(path for path in (options.csv, options.xlsx) if path is not None)
    task = counts.task
    write_classes(classes, task.class_measures, task.counted, tables, notes, overwrite=context.force)
    pictures = () if options.confusion is None else (options.confusion,)
    for path in pictures:
        title = "\n".join(
            [
                f"{report.architecture} on {told}",
                *(f"{a} {b}" for a, b in _measured(report.metrics, report.judge, report.main)[:1]),
            ]
        )
        write_matrix(counts, names, title, path, notes, overwrite=context.force)
    return replace(
        report,
        written=(*report.written, *tables, *pictures),
        classes=classes,
        confusion=counts.matrix if pictures else None,
    )


def _split(source: DataSource, asked: SplitName | None, context: Context) -> str:
    if asked is not None:
        return asked.value
    # Test before validation before training.
    there_are = [name for name in reversed(SPLITS) if name in source.loaders]
    if not there_are:
        raise DataError(f"{source.reference} has no images")
    if there_are[0] != SplitName.TEST.value:
        context.reporter.note(f"{source.reference} has no test split: measuring on {there_are[0]}")
    return there_are[0]


def _metrics(
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    split: str,
    judge: Judge,
    context: Context,
    also: Callable[[Any, Tensor], None] | None,
) -> Metrics:
    return evaluate(
        checkpoint.model,
        batches,
        split=split,
        device=context.device,
        precision=str(context.runtime.precision),
        task=judge.task,
        loss=judge.loss,
        metric=judge.metric,
        also=also,
    )


def _shown(
    checkpoint: Checkpoint, source: DataSource, split: str, options: EvaluateOptions, context: Context
) -> Iterable[Batch]:
    served = serve(checkpoint, source, split, options.data, context)
    return context.reporter.progress(served, f"evaluating on {split}", len(served))
