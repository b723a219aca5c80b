"""`cctool compare`, and its tables."""

from __future__ import annotations

import textwrap
from pathlib import Path

from cctool.cli.frame import Invocation, resolved_sources


def compare(call: Invocation) -> None:
    """Put networks side by side: accuracy, loss, parameters, MACs and bytes.

    Example: cctool compare teacher.pt student.pt pruned.pt
    """
    from cctool.operations.inspect.comparison import (
        Compared,
        blamed_on,
        compared,
        entries,
        remarks,
        tables,
    )

    console, force = call.console, call.frame.output.force
    rows = []
    for entry in entries(resolved_sources(call.inputs), call.options, force=force):
        with blamed_on(entry.file):
            report = call.read(entry.opened, entry.operation, entry.arch)
        rows.append(Compared(entry.file, Path(entry.file).stat().st_size, report))
    told, paths = compared(rows, call.options, force=force)
    # If the product is files, the tables go to stderr.
    show, say = (console.talk_table, console.note) if paths else (console.table, console.text)
    for table in tables(told):
        show(*table)
    for line in remarks(told):
        say(textwrap.fill(line, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
    for path in paths:
        console.path(path)
    console.document(told)
