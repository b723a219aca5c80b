"""`cctool compare`, and its table."""

from __future__ import annotations

from pathlib import Path

from cctool.cli.frame import Invocation, resolved_source


def compare(call: Invocation) -> None:
    """Put checkpoints side by side: accuracy, parameters, MACs and bytes.

    Example: cctool compare teacher.pt student.pt pruned.pt
    """
    found = [(file, call.read(file)) for file in map(resolved_source, call.inputs)]
    rows = [(file, Path(file).stat().st_size, report) for file, report in found]
    first_bytes = rows[0][1]
    call.console.table(
        "",
        ("file", "steps", "top-1 %", "n", "parameters", "MACs", "bytes", "smaller"),
        [
            (
                file,
                " > ".join(report.verbs),
                f"{report.metrics.values.get('top1', float('nan')):.2f}" if report.metrics else None,
                report.metrics.n if report.metrics else None,
                report.parameters,
                report.macs,
                size,
                f"{first_bytes / size:.2f}x",
            )
            for file, size, report in rows
        ],
    )
    call.console.document([{"file": file, "bytes": size, "report": report} for file, size, report in rows])
