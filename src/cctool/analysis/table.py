"""A table with totals, to be written as a sheet, a CSV file or JSON.

A total has two forms: a spreadsheet formula over the rows, and its value, for files without formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float | None
Values = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Total:
    """The total of a column.

    Attributes:
        formula: spreadsheet formula; `{key}` is the range of the column with that key.
        value: computes the formula's result from the columns' values by key.
    """

    formula: str
    value: Callable[[Values], float | int | None]


def _numbers(values: Sequence[Any]) -> list[Any]:
    return [value for value in values if value is not None]  # as SUM and MAX pass over blank cells


def total_sum(key: str) -> Total:
    """Sum of a column."""
    return Total(f"=SUM({{{key}}})", lambda values: sum(_numbers(values[key])))


def complement(part: str, whole: str) -> Total:
    """100 * (1 - sum(part) / sum(whole)) of two columns; 0 if the whole is 0."""

    def value(values: Values) -> float:
        total = sum(_numbers(values[whole]))
        return 100 * (1 - sum(_numbers(values[part])) / total) if total else 0.0

    return Total(f"=IF(SUM({{{whole}}})=0,0,100*(1-SUM({{{part}}})/SUM({{{whole}}})))", value)


def mean_by(key: str, weight: str) -> Total:
    """Mean of a column, weighted by another one; 0 if the weights sum to 0."""

    def value(values: Values) -> float:
        total = sum(_numbers(values[weight]))
        pairs = zip(values[key], values[weight], strict=True)
        return sum(v * w for v, w in pairs if None not in (v, w)) / total if total else 0.0

    return Total(f"=IF(SUM({{{weight}}})=0,0,SUMPRODUCT({{{key}}},{{{weight}}})/SUM({{{weight}}}))", value)


def harmonic_mean_by(key: str, weight: str) -> Total:
    """Harmonic mean of a column, weighted by another one; 0 without rows.

    If each value is a ratio weight / cost, this is the ratio of the sums.
    """

    def value(values: Values) -> float:
        pairs = [pair for pair in zip(values[key], values[weight], strict=True) if None not in pair]
        cost = sum(w / v for v, w in pairs)
        return sum(w for _, w in pairs) / cost if cost else 0.0

    return Total(f"=IF(SUM({{{weight}}})=0,0,SUM({{{weight}}})/SUMPRODUCT({{{weight}}}/{{{key}}}))", value)


def extreme(key: str, *, largest: bool) -> Total:
    """Largest or smallest value of a column; None without values."""
    choose = max if largest else min
    name = "MAX" if largest else "MIN"
    return Total(f"={name}({{{key}}})", lambda values: choose(_numbers(values[key]), default=None))


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: short name, for JSON and for formulas of totals.
        title: heading.
        meaning: one sentence, for the notes.
        number_format: spreadsheet format of its numbers; None for text.
        total: its total, if it has one.
    """

    key: str
    title: str
    meaning: str
    number_format: str | None = None
    total: Total | None = None


# A dash for zero: most cells of a column that only some rows have are zero.
WHOLE = '#,##0;-#,##0;"-"'


def counted(key: str, title: str, meaning: str) -> Column:
    """A column of whole numbers that add up."""
    return Column(key, title, meaning, WHOLE, total_sum(key))


@dataclass(frozen=True)
class Chart:
    """A bar chart of the largest rows.

    Attributes:
        title: above it.
        label: key of the column that names the bars.
        value: key of the column that gives their lengths.
        order: key of the column by which rows are chosen and ordered, largest first.
        maximum: end of the axis; None fits it to the bars.
    """

    title: str
    label: str
    value: str
    order: str
    maximum: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows under columns.

    Attributes:
        name: of its sheet, at most 31 characters.
        columns: from left to right.
        rows: one value per column, None where it does not apply.
        chart: drawn from its rows, if any.
        marked: (row from 0, key of a column) of highlighted cells.
    """

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    chart: Chart | None = None
    marked: frozenset[tuple[int, str]] = frozenset()

    def values(self) -> dict[str, list[Cell]]:
        """Columns by key."""
        return {column.key: [row[i] for row in self.rows] for i, column in enumerate(self.columns)}

    @property
    def has_totals(self) -> bool:
        """Whether any column has a total."""
        return any(column.total is not None for column in self.columns)

    def totals(self) -> tuple[Cell, ...]:
        """The values of the total row; the first column says `Total`."""
        values = self.values()
        found = [None if column.total is None else column.total.value(values) for column in self.columns]
        return ("Total", *found[1:])


@dataclass(frozen=True)
class Report:
    """The contents of a file.

    Attributes:
        title: of the document.
        table: the main table, the only one in a CSV file.
        others: further sheets.
        notes: (what, value) pairs on the origin and the limits of the figures.
    """

    title: str
    table: Table
    others: tuple[Table, ...] = ()
    notes: tuple[tuple[str, str], ...] = field(default=())
