"""`cctool transform`, and what it says of its product."""

from __future__ import annotations

from typing import Any

from cctool.cli.console import Console
from cctool.cli.frame import Call, show_metrics


def transform(call: Call) -> None:
    """Put layers or feature maps into a DCT, DST, DFT, wavelet or data-driven domain.

    Example: cctool transform student.pt --layers linear --keep 0.25
    """
    call.write(_say_report)


def _say_report(console: Console, report: Any) -> None:
    """Say what became of layers or feature maps; each report brings its own tables."""
    for title, columns, rows in report.tables():
        console.talk_table(title, columns, rows)
    for note in report.notes:
        console.note(note)
    show_metrics(console, report.metrics_before, report.metrics_after)
