"""`cctool evaluate`: measure a checkpoint on a split, and write its predictions."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cctool.base.errors import DataError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.file.atomic import write_bytes
from cctool.checkpoint.spec import Metrics
from cctool.data.records import SPLITS, DataSource
from cctool.data.serving.batches import Batch
from cctool.operations.context import Context, ShownTables, refuse_existing
from cctool.operations.data import has_targets, require_source, serve
from cctool.operations.keep.events import warn_of_stale
from cctool.operations.task import Judge, judge_of
from cctool.operations.transform.quality_tables import stream_tables, tap_tables
from cctool.operations.transform.watch import refuse_unwatched, watched
from cctool.operations.transform.write_streams import StreamFigures
from cctool.options.inspect.evaluate import EvaluateOptions, SplitName
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
        written: folders and files about the maps.
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

    @property
    def files(self) -> tuple[str, ...]:
        """All paths that were written."""
        return (*([] if self.predictions is None else [self.predictions]), *self.written)

    def tables(self) -> ShownTables:
        """Tables about taps and their streams."""
        return [*tap_tables(self.taps, self.split), *stream_tables(self.streams)]


def run(checkpoint: Checkpoint, options: EvaluateOptions, context: Context) -> EvaluateReport:
    """Measure a checkpoint; write predictions, bitstreams and reports on its taps as the options say.

    Raises:
        DataError: if the data has no such split, or no labels and nothing is to be written.
        CheckpointError: if a file exists and may not be replaced.
        UsageError: if options are about coded feature maps, and the network has none.
    """
    if options.predictions is not None:
        refuse_existing((Path(options.predictions),), context)
    refuse_unwatched(checkpoint, options, context)
    source = require_source(options.data, checkpoint, context, "evaluate")
    warn_of_stale(checkpoint, context.reporter)
    split = _split(source, options.split, context)
    judge = judge_of(checkpoint, context)
    has_labels = not judge.needs_targets or has_targets(source.split(split))
    if not has_labels and options.predictions is None and not options.asks_for_taps:
        raise DataError(f"{source.reference} has no labels: give --predictions FILE.csv, or labelled data")
    if has_labels and options.predictions is None and not options.asks_for_taps:
        judge.require_measure("evaluate")
    with watched(checkpoint, source.reference, split, options, context) as watch:
        shown = watch.batches(_shown(checkpoint, source, split, options, context))
        metrics = (
            _metrics(checkpoint, shown, split, judge, context) if has_labels and judge.measures else None
        )
        if metrics is None and options.asks_for_taps:
            # Without labels nothing is measured; the images only have to pass the taps.
            for _ in outputs_of(checkpoint.model, shown, context.device, str(context.runtime.precision)):
                pass
        seen = watch.finish(metrics)
    if options.predictions is not None:
        _write(_predicted(checkpoint, source, split, options, context), Path(options.predictions), context)
    return EvaluateReport(
        checkpoint.spec.architecture,
        source.reference,
        split,
        len(source.split(split)),
        metrics,
        options.predictions,
        seen.taps,
        seen.streams,
        seen.written,
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
    checkpoint: Checkpoint, batches: Iterable[Batch], split: str, judge: Judge, context: Context
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
    )


def _shown(
    checkpoint: Checkpoint, source: DataSource, split: str, options: EvaluateOptions, context: Context
) -> Iterable[Batch]:
    served = serve(checkpoint, source, split, options.data, context)
    return context.reporter.progress(served, f"evaluating on {split}", len(served))


def _predicted(
    checkpoint: Checkpoint, source: DataSource, split: str, options: EvaluateOptions, context: Context
) -> Iterator[dict[str, object]]:
    names = checkpoint.spec.classes or source.classes
    files = source.split(split).files
    batches = _shown(checkpoint, source, split, options, context)
    for outputs, batch in outputs_of(
        checkpoint.model, batches, context.device, str(context.runtime.precision)
    ):
        logits = CLASSIFICATION.main_output(outputs)
        if logits.dim() != 2:
            raise DataError(f"predictions need logits (N, classes), the network gives {list(logits.shape)}")
        best, predicted = torch.softmax(logits.float(), dim=1).max(1)
        labels = batch.labels.tolist() if batch.labels is not None else [None] * len(batch.indices)
        for index, probability, choice, label in zip(
            batch.indices.tolist(), best.tolist(), predicted.tolist(), labels, strict=True
        ):
            yield {
                "file": files[index] if files is not None else index,
                "predicted": _name(choice, names),
                "probability": f"{probability:.6f}",
                "label": "" if label is None else _name(label, names),
            }


def _name(number: int, names: tuple[str, ...]) -> str:
    return names[number] if number < len(names) else str(number)


def _write(rows: Iterator[dict[str, object]], path: Path, context: Context) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["file", "predicted", "probability", "label"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode(), overwrite=context.force)
