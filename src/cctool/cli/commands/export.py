"""`cctool export`: the signature of the command."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from cctool.cli import common
from cctool.cli.console import Console
from cctool.options.common import DataOptions, RuntimeOptions
from cctool.options.inspect.export import ExportFormat, ExportOptions

_LISTED = 10


def export(
    source: common.Source,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--output",
            "-o",
            help="Where to write; the suffix implies the format. Default: INPUT's stem and .onnx, "
            ".pt2, .state.pt or .state.safetensors.",
        ),
    ] = None,
    kind: Annotated[
        Optional[ExportFormat],  # noqa: UP045
        typer.Option("--format", help="What to write. Default: what the output's suffix says, else onnx."),
    ] = None,
    without_codec: Annotated[
        bool,
        typer.Option("--without-codec", help="Leave the codecs of feature maps out of an ONNX or pt2 file."),
    ] = False,
    int4: Annotated[
        bool,
        typer.Option(
            "--int4",
            help="ONNX: store weights of 4 bits and fewer in half a byte each (opset 21). Layers with such "
            "weights run in floating point then; without it they take a byte, and run on integers.",
        ),
    ] = False,
    data: common.Data = None,
    batch_size: common.BatchSize = ExportOptions().data.batch_size,
    workers: common.Workers = DataOptions.workers,
    limit: Annotated[int, typer.Option(help="Compare on at most so many samples of the data.")] = 256,
    arch: common.Arch = None,
    arg: common.Arg = None,
    input_shape: common.Input = None,
    mean: common.Mean = None,
    std: common.Std = None,
    spec: common.Spec = None,
    trust_pickle: common.TrustPickle = False,
    device: common.Device = RuntimeOptions.device,
    seed: common.Seed = RuntimeOptions.seed,
    allow_nonfinite: common.AllowNonfinite = False,
    force: common.Force = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Write the network for other programs, and verify what was written.

    Example: cctool export student.pt --format onnx
    """
    from cctool.operations.inspect.export import run

    options = ExportOptions(
        format=kind,
        output=output,
        data=common.data_options(data, None, None, batch_size, workers, limit),
        allow_nonfinite=allow_nonfinite,
        without_codec=without_codec,
        int4=int4,
    )
    console = Console(quiet=quiet, as_json=as_json, debug=debug)
    invocation = common.Invocation(
        verb="export",
        console=console,
        source=source,
        force=force,
        model=common.model_options(arch, arg, input_shape, mean, std, spec, trust_pickle),
        runtime=RuntimeOptions(device=device, seed=seed),
        user_code=(data,),
    )
    report = invocation.read(run, options)
    for file in report.files:
        _say(console, file)
        console.path(file.path)
    console.document(report)


def _say(console: Console, file: Any) -> None:
    console.note(f"{file.path}: {file.format}, {file.bytes:,} bytes, verified")
    for agreement in file.agreements:
        console.note(agreement_line(agreement))
    if file.kernels is not None:
        kernels_note(console, file.kernels)


def kernels_note(console: Console, kernels: Any) -> None:
    """Say how onnxruntime runs the layers."""
    console.note(
        f"  onnxruntime runs {kernels.integer} layers on integers, {len(kernels.floating)} in floating point"
    )
    for layer in kernels.floating[:_LISTED]:
        console.note(f"    {layer.name}: {layer.reason}")
    if len(kernels.floating) > _LISTED:
        console.note(f"    and {len(kernels.floating) - _LISTED} more, see --json")


def agreement_line(agreement: Any) -> str:
    """Say in one line how close the written model comes."""
    judged = ", judged in float64" if agreement.judged_in_float64 else ""
    judged += ", judged by the steps of what rounds it" if agreement.judged_by_steps else ""
    sizes = " and ".join(map(str, agreement.batch_sizes))
    return (
        f"  {agreement.inputs} (n={agreement.n:,}, batches of {sizes}): max abs error "
        f"{agreement.max_abs_error:.2g} of a range of {agreement.output_range:.3g}{judged}, "
        f"top-1 agreement {agreement.top1_agreement:.2f} %"
        + (
            f", {agreement.undecided} of the others undecided within 1/32 of a step"
            if agreement.undecided
            else ""
        )
    )
