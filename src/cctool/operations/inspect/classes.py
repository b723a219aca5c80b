"""What `cctool evaluate` finds out about single classes: a table, and which was taken for which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cctool.analysis.confusion import write_confusion
from cctool.analysis.table import WHOLE, Cell, Column, Report, Table
from cctool.analysis.workbook import write_report
from cctool.base.errors import DataError
from cctool.options.inspect.evaluate import EvaluateOptions
from cctool.tasks.base import Measure, Task
from cctool.tasks.details import Classed, class_name
from cctool.tasks.shares import interval_of, interval_text

Notes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ClassFigures:
    """What was measured of one class.

    Attributes:
        name: of the class.
        n: samples (of segmentation: pixels) whose target it is.
        values: by measure, percent; None where nothing was counted.
        intervals: 95 % intervals of those that are shares of samples.
    """

    name: str
    n: int
    values: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]


class ClassCounts:
    """Gathers the confusion matrix of a split, batch by batch.

    Args:
        task: what the outputs mean.
        split: name of the split, for errors.

    Raises:
        DataError: if the task has no classes.
    """

    def __init__(self, task: Task, split: str, options: EvaluateOptions) -> None:
        if not isinstance(task, Classed):
            asked = "--per-class" if options.per_class else "--confusion"
            raise DataError(f"{asked} needs classes, and the task {task.name} has none")
        self.task: Classed = task
        self._refuse, self._split = task.refuse, split
        self._sum: Tensor | None = None

    def add(self, outputs: Any, targets: Tensor) -> None:
        """Count a batch."""
        self._refuse(outputs, targets, self._split)
        found = self.task.confusion(outputs, targets)
        self._sum = found if self._sum is None else self._sum + found

    @property
    def matrix(self) -> Tensor:
        """Counts (classes, classes), rows by target, on the CPU."""
        if self._sum is None:
            raise DataError(f"the {self._split} split is empty: nothing was counted")
        return self._sum.cpu()

    def figures(self, names: Sequence[str]) -> tuple[ClassFigures, ...]:
        """What was measured of each class, in the order of the outputs."""
        matrix = self.matrix
        measured = {name: values.tolist() for name, values in self.task.per_class(matrix).items()}
        found = []
        for number, n in enumerate(matrix.sum(1).tolist()):
            values = {name: _known(column[number]) for name, column in measured.items()}
            intervals = {
                measure.name: interval_of(value, n)
                for measure in self.task.class_measures
                if measure.share and (value := values[measure.name]) is not None
            }
            found.append(ClassFigures(class_name(number, names), n, values, intervals))
        return tuple(found)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def class_table(
    figures: Sequence[ClassFigures], measures: Sequence[Measure], counted: str
) -> tuple[str, tuple[str, ...], list[tuple[object, ...]]]:
    """Title, columns and rows of the table of classes."""
    columns = ["class"]
    for measure in measures:
        columns += [f"{measure.title} {measure.unit}".rstrip(), *(["95 % interval"] if measure.share else [])]
    rows = []
    for figure in figures:
        cells: list[object] = [figure.name]
        for measure in measures:
            value = figure.values[measure.name]
            cells.append(None if value is None else f"{value:.2f}")
            if measure.share:
                known = figure.intervals.get(measure.name)
                cells.append(None if known is None else interval_text(*known))
        rows.append((*cells, figure.n))
    return "Classes", (*columns, f"n ({counted})"), rows


def write_classes(
    figures: Sequence[ClassFigures],
    measures: Sequence[Measure],
    counted: str,
    paths: Sequence[str],
    notes: Notes,
    *,
    overwrite: bool,
) -> None:
    """Write the table of classes to each path, .csv or .xlsx.

    Raises:
        CheckpointError: if a file exists, or cannot be written.
    """
    columns = [Column("class", "class", "Name of the class.")]
    for measure in measures:
        columns.append(
            Column(measure.name, f"{measure.title} ({measure.unit})", f"The class's {measure.title}.", "0.00")
        )
        if measure.share:
            for end in ("low", "high"):
                meaning = f"The {end} end of its 95 % Wilson score interval, percent."
                columns.append(Column(f"{measure.name}_{end}", f"{measure.title} {end} (%)", meaning, "0.00"))
    columns.append(Column("n", "n", f"How many {counted} have this class as their target.", WHOLE))
    rows = tuple(_row(figure, measures) for figure in figures)
    for path in paths:
        report = Report("Classes", Table("Classes", tuple(columns), rows), (), notes)
        write_report(report, Path(path), overwrite=overwrite)


def _row(figure: ClassFigures, measures: Sequence[Measure]) -> tuple[Cell, ...]:
    cells: list[Cell] = [figure.name]
    for measure in measures:
        cells.append(figure.values[measure.name])
        if measure.share:
            cells += figure.intervals.get(measure.name, (None, None))
    return (*cells, figure.n)


def write_matrix(
    counts: ClassCounts, names: Sequence[str], title: str, path: str, notes: Notes, *, overwrite: bool
) -> None:
    """Write the confusion matrix, as `write_confusion` does."""
    matrix = counts.matrix
    named = [class_name(number, names) for number in range(len(matrix))]
    write_confusion(matrix, named, title, Path(path), notes, overwrite=overwrite)
