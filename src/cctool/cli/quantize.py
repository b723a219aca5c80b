"""`cctool quantize`: the signature of the command and its report."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from cctool.cli import common
from cctool.cli.console import Console
from cctool.options.common import DataOptions, Precision, RuntimeOptions
from cctool.options.quantize import QuantizeMethod, QuantizeOptions, QuantizePreset, preset_options


def quantize(
    context: typer.Context,
    source: common.Source,
    output: common.Output = None,
    method: Annotated[QuantizeMethod, typer.Option(help="How weights are stored.")] = QuantizeOptions.method,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="A range for each output channel (uint8).")
    ] = QuantizeOptions.per_channel,
    include_1d: Annotated[
        bool, typer.Option("--include-1d", help="Take biases and batch norm's tensors too.")
    ] = QuantizeOptions.include_1d,
    include: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="GLOB", help="Take no other tensors; a full name forces; may be repeated."),
    ] = None,
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="GLOB", help="Leave these tensors as they are; may be repeated."),
    ] = None,
    preset: Annotated[
        Optional[QuantizePreset],  # noqa: UP045
        typer.Option(help="Set the options as a published method did; options that you give stand."),
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
    seed: common.Seed = RuntimeOptions.seed,
    deterministic: common.Deterministic = False,
    allow_nonfinite: common.AllowNonfinite = False,
    force: common.Force = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Store weights in fewer bits; the file shrinks, and still trains, prunes and exports.

    Example: cctool quantize student.pt --method uint8
    """
    given: dict[str, Any] = {
        "method": method,
        "per_channel": per_channel,
        "include_1d": include_1d,
        "include": tuple(include or ()),
        "exclude": tuple(exclude or ()),
    }
    if preset is not None:
        given = {name: value for name, value in given.items() if common.is_given(context, name)}
    options = preset_options(
        preset,
        **given,
        data=common.data_options(data, val_data, test_data, batch_size, workers, limit),
    )
    invocation = common.Invocation(
        verb="quantize",
        console=Console(quiet=quiet, as_json=as_json, debug=debug),
        source=source,
        output=output,
        force=force,
        allow_nonfinite=allow_nonfinite,
        model=common.model_options(arch, arg, input_shape, mean, std, spec, trust_pickle),
        runtime=RuntimeOptions(device, precision, seed, deterministic),
        user_code=(data, val_data, test_data),
    )
    from cctool.operations.quantize import run

    invocation.write(run, options, _report)


def _report(console: Console, report: Any) -> None:
    console.talk_table(
        "",
        ("tensor", "shape", "stored as", "bytes before", "bytes after", "max error", "SQNR dB"),
        [
            (
                t.name,
                "x".join(map(str, t.shape)),
                t.encoding,
                t.bytes_before,
                t.bytes_after,
                t.max_error,
                t.sqnr_db,
            )
            for t in report.tensors
        ],
    )
    console.note(
        f"tensors {report.bytes_before:,} -> {report.bytes_after:,} bytes "
        f"({report.bytes_before / max(report.bytes_after, 1):.2f}x smaller)"
    )
    for note in report.notes:
        console.note(note)
    common.show_metrics(console, report.metrics_before, report.metrics_after)
