"""`cctool compare`: the signature of the command, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cctool.cli import common
from cctool.cli.console import Console
from cctool.options.common import DataOptions, Precision, RuntimeOptions
from cctool.options.inspect.compare import CompareOptions
from cctool.options.inspect.evaluate import SplitName


def compare(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Checkpoints to put side by side.")],
    split: Annotated[SplitName, typer.Option(help="Samples to measure accuracy on.")] = CompareOptions.split,
    data: common.Data = None,
    test_data: common.TestData = None,
    batch_size: common.BatchSize = DataOptions.batch_size,
    workers: common.Workers = DataOptions.workers,
    limit: common.Limit = None,
    arch: common.Arch = None,
    device: common.Device = RuntimeOptions.device,
    precision: common.PrecisionOption = Precision.FULL,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Put checkpoints side by side: accuracy, parameters, MACs and bytes.

    Example: cctool compare teacher.pt student.pt pruned.pt
    """
    from cctool.operations.inspect.compare import run

    console = Console(quiet=quiet, as_json=as_json, debug=debug)
    options = CompareOptions(split, common.data_options(data, None, test_data, batch_size, workers, limit))
    rows = []
    for file in map(common.resolved_source, files):
        invocation = common.Invocation(
            verb="compare",
            console=console,
            source=file,
            model=common.model_options(arch=arch),
            runtime=RuntimeOptions(device=device, precision=precision),
            user_code=(data, test_data),
        )
        report = invocation.read(run, options)
        rows.append((file, Path(file).stat().st_size, report))
    first_bytes = rows[0][1]
    console.table(
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
    console.document([{"file": file, "bytes": size, "report": report} for file, size, report in rows])
