"""`cctool evaluate`: the signature of the command, and its table."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from cctool.cli import common, training
from cctool.cli.console import Console
from cctool.options.common import DataOptions, Precision, RuntimeOptions
from cctool.options.inspect.evaluate import EvaluateOptions, SplitName

_TAPS = "Coded feature maps (after transform --target features)"


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
    bitstream: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="DIR",
            help="Write the coded feature maps of the split, a file a tap; `cctool decode` reads them.",
            rich_help_panel=_TAPS,
        ),
    ] = None,
    through_bitstream: Annotated[
        bool,
        typer.Option(
            "--through-bitstream",
            help="Code each map to bytes and go on with what these decode to.",
            rich_help_panel=_TAPS,
        ),
    ] = False,
    report_file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="FILE.xlsx|.csv|.json",
            help="Figures of each tap as a workbook or table.",
            rich_help_panel=_TAPS,
        ),
    ] = None,
    histograms: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="DIR", help="Folder for PNG histograms per tap and sub-band.", rich_help_panel=_TAPS
        ),
    ] = None,
    zero_bar: Annotated[
        bool, typer.Option("--zero-bar", help="Draw the zeros in them, too.", rich_help_panel=_TAPS)
    ] = False,
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
        bitstream,
        through_bitstream,
        report_file,
        histograms,
        zero_bar,
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

    from cctool.operations.inspect.evaluate import run

    report = invocation.read(run, options)
    # With files as the product, the figures are talk.
    show = console.talk_table if report.files else console.table
    if report.metrics is not None:
        values = report.metrics.values
        show(
            "",
            ("network", "data", "split", "n", *values),
            [(report.architecture, report.data, report.split, report.n, *values.values())],
        )
    for title, columns, rows in report.tables():
        console.talk_table(title, columns, rows)
    for file in report.files:
        console.path(file)
    console.document(report)
