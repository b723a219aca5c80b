"""`cctool transform`, and its messages about the product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cctool.cli.frame import Invocation


def transform(call: Invocation) -> None:
    """Put layers or feature maps into a DCT, DST, DFT, wavelet or data-driven domain, or fold layers.

    Example: cctool transform student.pt --layers linear --keep 0.25
    """
    call.write(_told)


def _told(report: Any) -> Iterator[Any]:
    """Tables of layers or feature maps, notes and metrics; each kind of report has its own tables."""
    from cctool.operations.context import metric_lines

    yield from report.tables()
    yield from report.notes
    yield from metric_lines(report.metrics_before, report.metrics_after)
