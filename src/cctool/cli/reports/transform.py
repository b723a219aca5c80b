"""What `cctool transform` says of its product."""

from __future__ import annotations

from typing import Any

from cctool.cli.console import Console

__all__ = ["say_report"]


def say_report(console: Console, report: Any) -> None:
    """Say what became of layers or feature maps; each report brings its own tables."""
    for title, columns, rows in report.tables():
        console.talk_table(title, columns, rows)
    for note in report.notes:
        console.note(note)
    from cctool.cli.common import show_metrics

    show_metrics(console, report.metrics_before, report.metrics_after)
