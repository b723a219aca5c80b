"""The file of `cctool evaluate --predictions`: a row for each sample, as the task says."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cctool.base.errors import DataError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.file.atomic import write_bytes
from cctool.data.records import DataSource
from cctool.data.serving.batches import Batch
from cctool.operations.context import Context
from cctool.tasks.base import Task
from cctool.tasks.details import Predicting
from cctool.training.evaluate import outputs_of

Row = Mapping[str, object]


def predicting(task: Task) -> Predicting:
    """The task, if it says what a prediction is.

    Raises:
        DataError: if it does not.
    """
    if not isinstance(task, Predicting):
        raise DataError(f"--predictions: the task {task.name} does not say what a prediction is")
    return task


def predicted(
    task: Task,
    checkpoint: Checkpoint,
    source: DataSource,
    split: str,
    batches: Iterable[Batch],
    context: Context,
) -> Iterator[Row]:
    """The file (or number) of each sample, and what the task says of its outputs.

    Raises:
        DataError: if the task does not say what a prediction is.
        DataError: if the outputs hold no predictions.
    """
    told = predicting(task)
    names = checkpoint.spec.classes or source.classes
    files = source.split(split).files
    precision = str(context.runtime.precision)
    for outputs, batch in outputs_of(checkpoint.model, batches, context.device, precision):
        targets = None if batch.labels is None else batch.labels.to(context.device)
        indices = batch.indices.tolist()
        for index, row in zip(indices, told.predictions(outputs, targets, names), strict=True):
            yield {"file": files[index] if files is not None else index, **row}


def write_predictions(rows: Iterable[Row], path: Path, *, overwrite: bool) -> None:
    """Write rows of equal keys as CSV, atomically.

    Raises:
        CheckpointError: if the file exists, or cannot be written.
    """
    text = io.StringIO()
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    write_bytes(path, text.getvalue().encode(), overwrite=overwrite)
