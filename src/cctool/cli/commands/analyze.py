"""`cctool analyze`, and its tables."""

from __future__ import annotations

from typing import Any

from cctool.cli.commands.export import agreement_notes
from cctool.cli.console import Console
from cctool.cli.frame import Invocation
from cctool.options.inspect.analyze import View


def analyze(call: Invocation) -> None:
    """Show what a checkpoint holds and computes, layer by layer, and how it came about.

    Example: cctool analyze model.pt --macs --onnx
    """
    console, report, view = call.console, call.read(), call.options.view
    for file in report.written:
        console.path(file.path)
    if view is View.SPEC:
        console.document(report.spec, always=True)
        return
    if view is View.HISTORY:
        from cctool.operations.inspect.history import full_history

        console.text(full_history(report.history) or "no history: the file was not written by a command")
    elif not console.as_json:
        _show(console, report, talk=bool(report.written))
    console.document(report)


def _show(console: Console, report: Any, talk: bool) -> None:
    """Show the tables: on stdout, or on stderr if the command's product is files."""
    from cctool.operations.inspect.history import SHORT_HEADERS, short_rows
    from cctool.operations.inspect.layer_table import layers, remarks

    table, say = (console.talk_table, console.note) if talk else (console.table, console.text)
    analysis = report.analysis
    headers, rows = layers(analysis.layers)
    shape = "x".join(map(str, report.spec.input_shape))
    table(f"{report.spec.architecture}, one input of {shape}", headers, rows)
    for line in remarks(report):
        say(line)
    if report.history:
        table("History (--history: in full)", SHORT_HEADERS, short_rows(report.history))
    for file in report.written:
        agreement_notes(console, file)
