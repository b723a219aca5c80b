"""`cctool evaluate`: the signature of the command, and its table."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from cctool.cli import common, training
from cctool.cli.console import Console
from cctool.options.common import DataOptions, Precision, RuntimeOptions
from cctool.options.evaluate import EvaluateOptions, SplitName


def evaluate(
    source: common.Source,
    split: Annotated[
        Optional[SplitName],  # noqa: UP045
        typer.Option(help="What to measure on. Default: test, or where there is none the next best."),
    ] = None,
    predictions: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE.csv", help="Write one line an image; works without labels, too."),
    ] = None,
    loss: training.Loss = None,
    metric: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE.py:FN", help="Your metric(outputs, labels) of the whole split."),
    ] = None,
    data: common.Data = None,
    val_data: common.ValData = None,
    test_data: common.TestData = None,
    batch_size: common.BatchSize = DataOptions.batch_size,
    workers: common.Workers = DataOptions.workers,
    limit: common.Limit = None,
    arch: common.Arch = None,
    arg: common.Arg = None,
    input_shape: common.Input = None,
    mean: common.Mean = None,
    std: common.Std = None,
    spec: common.Spec = None,
    trust_pickle: common.TrustPickle = False,
    device: common.Device = RuntimeOptions.device,
    precision: common.PrecisionOption = Precision.FULL,
    deterministic: common.Deterministic = False,
    force: common.Force = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Measure a checkpoint on a split of a data set.

    Example: cctool evaluate student.pt --split test
    """
    options = EvaluateOptions(
        split,
        common.data_options(data, val_data, test_data, batch_size, workers, limit),
        predictions,
        loss,
        metric,
    )
    console = Console(quiet=quiet, as_json=as_json, debug=debug)
    invocation = common.Invocation(
        verb="evaluate",
        console=console,
        source=source,
        force=force,
        model=common.model_options(arch, arg, input_shape, mean, std, spec, trust_pickle),
        runtime=RuntimeOptions(device=device, precision=precision, deterministic=deterministic),
        user_code=(data, val_data, test_data, loss, metric),
    )

    from cctool.operations.evaluate import run

    report = invocation.read(run, options)
    if report.metrics is not None:
        values = report.metrics.values
        # With a file as the product, the figures are talk.
        show = console.table if report.predictions is None else console.talk_table
        show(
            "",
            ("network", "data", "split", "n", *values),
            [(report.architecture, report.data, report.split, report.n, *values.values())],
        )
    if report.predictions is not None:
        console.path(report.predictions)
    console.document(report)
