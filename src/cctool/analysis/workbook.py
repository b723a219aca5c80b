"""A report as an .xlsx workbook, or as CSV or JSON, by the file's suffix.

The workbook has a sheet for each table (frozen header, filter, number formats, totals as formulas), a sheet
with a bar chart of the largest rows, whose cells refer to the table, and a sheet of notes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cctool.analysis.table import Cell, Chart, Report, Table
from cctool.base.errors import UsageError
from cctool.checkpoint.file.atomic import write_bytes

_BARS = 25  # most rows that a chart shows
_WIDEST, _NOTE_WIDTH = 60, 100
_FONT, _MARK = "Calibri", "DDEBF7"
# Control characters that XML cannot hold.
_ILLEGAL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def write_report(report: Report, path: Path, *, overwrite: bool = False) -> None:
    """Write a report atomically.

    Args:
        report: what to write.
        path: .xlsx and .json hold everything (.json: totals as values), .csv the main table and its totals.
        overwrite: whether an existing file may be replaced.

    Raises:
        UsageError: the suffix is another one.
        CheckpointError: the file exists, or cannot be written.
    """
    check_suffix(path)
    document = WRITERS[path.suffix.lower()](report)
    write_bytes(path, document, overwrite=overwrite)


def check_suffix(path: Path) -> None:
    """Refuse a file name that no writer takes.

    Raises:
        UsageError: naming the suffixes that are known.
    """
    if path.suffix.lower() not in WRITERS:
        raise UsageError(
            f"{path}: a table is written to {', '.join(WRITERS)}, not {path.suffix or 'nothing'}"
        )


def _as_json(report: Report) -> bytes:
    def plain(cell: Cell) -> Cell:
        return None if isinstance(cell, float) and not math.isfinite(cell) else cell

    def table(found: Table) -> dict[str, Any]:
        keys = [column.key for column in found.columns]
        totals = {"totals": dict(zip(keys, map(plain, found.totals()), strict=True))}
        return {
            "name": found.name,
            "columns": {column.key: f"{column.title}: {column.meaning}" for column in found.columns},
            "rows": [dict(zip(keys, map(plain, row), strict=True)) for row in found.rows],
            **({"marked": [list(cell) for cell in sorted(found.marked)]} if found.marked else {}),
            **(totals if found.has_totals else {}),
        }

    document = {
        "title": report.title,
        "table": table(report.table),
        "others": [table(other) for other in report.others],
        "notes": [list(note) for note in report.notes],
    }
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _as_csv(report: Report) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([column.title for column in report.table.columns])
    for row in (*report.table.rows, *([report.table.totals()] if report.table.has_totals else [])):
        # Python 3.10's csv module refuses NUL, and spreadsheets show none of these characters.
        writer.writerow([_ILLEGAL.sub("?", cell) if isinstance(cell, str) else cell for cell in row])
    return stream.getvalue().encode()


def _as_workbook(report: Report) -> bytes:
    import openpyxl

    book = openpyxl.Workbook()
    book.remove(book.active)
    book.properties.title, book.properties.creator = report.title, "cctool"
    book.calculation.fullCalcOnLoad = True  # openpyxl writes formulas without their values
    for table in (report.table, *report.others):
        sheet = book.create_sheet(table.name)
        _fill(sheet, table)
        if table.chart is not None:
            _draw(book.create_sheet(f"{table.name} chart"), table, table.chart)
    _note(book.create_sheet("Notes"), report)
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


WRITERS: Mapping[str, Callable[[Report], bytes]] = {".xlsx": _as_workbook, ".csv": _as_csv, ".json": _as_json}
"""Bytes of a report's file, by suffix."""


def _put(cell: Any, value: Cell) -> None:
    """Set a value; text that looks like a formula stays text."""
    if isinstance(value, float) and not math.isfinite(value):
        # The format has no NaN; an error value makes totals over it errors, as NaN would.
        cell.value = "#NUM!"
    elif isinstance(value, str):
        cell.value = _ILLEGAL.sub("?", value)
        cell.data_type = "s"
    else:
        cell.value = value


def _fill(sheet: Any, table: Table) -> None:
    from openpyxl.styles import Alignment, Border, Font, PatternFill, Side
    from openpyxl.utils import get_column_letter

    _head(sheet, [column.title for column in table.columns])
    for y, row in enumerate(table.rows, start=2):
        for x, (value, column) in enumerate(zip(row, table.columns, strict=True), start=1):
            cell = sheet.cell(y, x)
            _put(cell, value)
            if column.number_format:
                cell.number_format = column.number_format
            elif x > 1:
                # Indented, as text would touch the right-aligned number in the column before.
                cell.alignment = Alignment(horizontal="left", indent=1)
            if (y - 2, column.key) in table.marked:
                cell.font, cell.fill = Font(name=_FONT, bold=True), PatternFill("solid", fgColor=_MARK)
        _wrap(sheet, y, row)
    last = len(table.rows) + 1
    letters = {column.key: get_column_letter(x) for x, column in enumerate(table.columns, start=1)}
    ranges = {key: f"{letter}2:{letter}{max(last, 2)}" for key, letter in letters.items()}
    for x, column in enumerate(table.columns if table.has_totals else (), start=1):
        cell = sheet.cell(last + 1, x)
        cell.font, cell.border = Font(name=_FONT, bold=True), Border(top=Side(style="thin"))
        if x == 1:
            cell.value = "Total"
        elif column.total is not None:
            cell.value = column.total.formula.format_map(ranges)
            cell.number_format = column.number_format or "General"
    sheet.freeze_panes = "B2"
    sheet.auto_filter.ref = f"A1:{get_column_letter(len(table.columns))}{last}"
    sheet.print_title_rows = "1:1"
    _fit_width(sheet)
    totals = table.totals()
    for x, column in enumerate(table.columns):
        shown = [_shown(row[x], column.number_format) for row in (*table.rows, totals)]
        _widen(sheet, x + 1, column.title, shown)


def _head(sheet: Any, titles: list[str]) -> None:
    from openpyxl.styles import Alignment, Font, PatternFill

    for x, title in enumerate(titles, start=1):
        cell = sheet.cell(1, x, title)
        cell.font = Font(name=_FONT, bold=True, color="FFFFFF")
        cell.fill = PatternFill("solid", fgColor="1F4E78")
        cell.alignment = Alignment(
            wrap_text=True, vertical="center", horizontal="left" if x == 1 else "center"
        )
    # Not every program adapts the row height to a heading of two lines.
    sheet.row_dimensions[1].height = 32 if any(" " in title for title in titles) else 18


def _fit_width(sheet: Any) -> None:
    """Print in landscape, with all columns on one page."""
    sheet.page_setup.orientation, sheet.page_setup.fitToHeight = "landscape", 0
    sheet.sheet_properties.pageSetUpPr.fitToPage = True


def _wrap(sheet: Any, y: int, row: Sequence[Cell], width: int = _WIDEST) -> None:
    """Wrap texts wider than their column, and set the row height, which not every program adapts."""
    from openpyxl.styles import Alignment

    lines = max((-(-len(value) // (width - 6)) for value in row if isinstance(value, str)), default=1)
    if lines > 1:
        sheet.row_dimensions[y].height = 15 * lines
        for x in range(1, len(row) + 1):
            text, cell = isinstance(row[x - 1], str), sheet.cell(y, x)
            cell.alignment = Alignment("left" if text else None, "top", wrap_text=text, indent=text and x > 1)


def _shown(value: Cell, number_format: str | None) -> str:
    if isinstance(value, (int, float)) and number_format and math.isfinite(value):
        digits = len(number_format.partition(";")[0].partition(".")[2])
        return f"{value:,.{digits}f}"
    return "" if value is None else str(value)


def _widen(sheet: Any, x: int, title: str, texts: list[str]) -> None:
    from openpyxl.utils import get_column_letter

    # The filter's button covers three characters of the heading, which may wrap between words.
    heading = max(len(word) for word in title.split()) + 3
    width = max([heading, *(len(text) + 2 for text in texts)])
    sheet.column_dimensions[get_column_letter(x)].width = min(width, _WIDEST)


def _draw(sheet: Any, table: Table, chart: Chart) -> None:
    """Draw the largest rows from cells that refer to the table, so that the chart follows its changes."""
    from openpyxl.chart import BarChart, Reference
    from openpyxl.utils import get_column_letter

    keys = [column.key for column in table.columns]
    order, label, value = (keys.index(key) for key in (chart.order, chart.label, chart.value))
    ranked = sorted(
        (i for i, row in enumerate(table.rows) if row[order]), key=lambda i: -float(table.rows[i][order] or 0)
    )[:_BARS]
    _head(sheet, [table.columns[label].title, table.columns[value].title])
    for y, i in enumerate(ranked, start=2):
        for x, column in ((1, label), (2, value)):
            cell = sheet.cell(y, x, f"='{table.name}'!{get_column_letter(column + 1)}{i + 2}")
            cell.number_format = table.columns[column].number_format or "General"
    _widen(sheet, 1, table.columns[label].title, [str(table.rows[i][label]) for i in ranked])
    _widen(sheet, 2, table.columns[value].title, [_shown(table.rows[i][value], "#,##0") for i in ranked])
    _fit_width(sheet)
    if not ranked:
        return
    bars = BarChart()
    bars.type, bars.style, bars.title, bars.legend = "bar", 10, _heading(table, chart, len(ranked)), None
    last = len(ranked) + 1
    bars.add_data(Reference(sheet, min_col=2, min_row=1, max_row=last), titles_from_data=True)
    bars.set_categories(Reference(sheet, min_col=1, min_row=2, max_row=last))
    bars.x_axis.delete = bars.y_axis.delete = False
    # The largest at the top, as in the cells to the left.
    bars.x_axis.scaling.orientation = "maxMin"
    bars.y_axis.scaling.min, bars.y_axis.scaling.max = 0, chart.maximum
    bars.y_axis.number_format = table.columns[value].number_format or "General"
    bars.gapWidth, bars.width, bars.height = 40, 26, max(7, 0.62 * len(ranked) + 3)
    sheet.add_chart(bars, "D2")


def _heading(table: Table, chart: Chart, shown: int) -> str:
    left_out = sum(1 for value in table.values()[chart.order] if value) - shown
    return f"{chart.title} ({left_out} smaller not shown)" if left_out else chart.title


def _note(sheet: Any, report: Report) -> None:
    _head(sheet, ["What", "Value"])
    meanings = [
        (f"{table.name}: {column.title}", column.meaning)
        for table in (report.table, *report.others)
        for column in table.columns
    ]
    for y, (what, value) in enumerate([*report.notes, *meanings], start=2):
        _put(sheet.cell(y, 1), what)
        _put(sheet.cell(y, 2), value)
        _wrap(sheet, y, ("", value), _NOTE_WIDTH)
    sheet.freeze_panes = "A2"
    sheet.column_dimensions["A"].width, sheet.column_dimensions["B"].width = 34, _NOTE_WIDTH
    _fit_width(sheet)
