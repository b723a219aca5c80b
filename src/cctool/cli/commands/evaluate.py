"""`cctool evaluate`, and its table."""

from __future__ import annotations

from cctool.cli.frame import Invocation


def evaluate(call: Invocation) -> None:
    """Measure a checkpoint on a split of a data set.

    Example: cctool evaluate student.pt --split test
    """
    console, report = call.console, call.read()
    # If the product is files, the table goes to stderr.
    show = console.talk_table if report.files else console.table
    if report.metrics is not None:
        show("", ("measured", "value"), report.summary())
    for title, columns, rows in report.class_tables():
        show(title, columns, rows)
    for title, columns, rows in report.tables():
        console.talk_table(title, columns, rows)
    for file in report.files:
        console.path(file)
    console.document(report)
