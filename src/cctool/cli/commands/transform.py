"""`cctool transform`: the signature of the command, and from it the options."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from cctool.cli import common
from cctool.cli.console import Console
from cctool.cli.reports.transform import say_report
from cctool.options.common import DataOptions, Precision, RuntimeOptions
from cctool.options.prune.choices import Scope
from cctool.options.transform.choices import Axes, Mode, Norm, Prequantizer, Select, TransformPreset
from cctool.options.transform.options import (
    FeatureOptions,
    WeightOptions,
    parse_order,
    parse_sweep,
    parse_targets,
    preset_options,
)

_BOTH = "What is transformed"
_WEIGHTS = "Weights (--target weights)"
_FEATURES = "Feature maps (--target features)"
_REPORT = "Report of the feature maps"


def _option(panel: str, text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel)


def transform(
    context: typer.Context,
    source: common.Source,
    output: common.Output = None,
    target: Annotated[
        Optional[list[str]],  # noqa: UP045
        _option(
            _BOTH,
            "weights (the default) or features; with features also ratio=N, the compression against 8 bit "
            "that is searched for.",
            metavar="weights|features|ratio=N",
        ),
    ] = None,
    kernel: Annotated[
        str,
        _option(
            _BOTH,
            "dct, dst, dft, dwt (haar), klt (from the data), identity, or a wavelet such as db2 or bior2.2.",
        ),
    ] = "dct",
    preset: Annotated[
        Optional[TransformPreset],  # noqa: UP045
        _option(_BOTH, "Set the options as a published method did; options that you give stand."),
    ] = None,
    levels: Annotated[
        Optional[int],  # noqa: UP045
        _option(_BOTH, "Levels of a wavelet. Default: as many as fit for weights, 3 for features."),
    ] = None,
    block: Annotated[
        Optional[int],  # noqa: UP045
        _option(_BOTH, "Transform in blocks of so many. Default: whole axes for weights, 8 for features."),
    ] = None,
    mode: Annotated[
        Mode,
        _option(_WEIGHTS, "Transform the weights, or train basis functions in their place."),
    ] = WeightOptions.mode,
    layers: Annotated[
        Optional[list[str]],  # noqa: UP045
        _option(
            _WEIGHTS,
            "linear (fc, dense), conv, all, or a pattern of module names; may be repeated.",
            metavar="KIND|GLOB",
        ),
    ] = None,
    axes: Annotated[
        Optional[Axes],  # noqa: UP045
        _option(
            _WEIGHTS,
            "Axes of convolutions. Default: spatial, and channel where the kernel is 1x1.",
        ),
    ] = None,
    keep: Annotated[
        Optional[float],  # noqa: UP045
        _option(_WEIGHTS, "Fraction of the coefficients that stay. Default: 1, which loses nothing."),
    ] = None,
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        _option(_WEIGHTS, "Smallest coefficient that stays, in place of --keep."),
    ] = None,
    select: Annotated[
        Select, _option(_WEIGHTS, "Which stay: those of most energy, or a corner of low frequencies.")
    ] = WeightOptions.select,
    scope: Annotated[
        Scope, _option(_WEIGHTS, "Coefficients compete within their layer, or across the network.")
    ] = WeightOptions.scope,
    normalize_gradients: Annotated[
        bool,
        _option(
            _WEIGHTS,
            "Basis mode: gradients of frequencies have norm 1, as in the thesis.",
            "--normalize-gradients",
        ),
    ] = False,
    taps: Annotated[
        Optional[list[str]],  # noqa: UP045
        _option(
            _FEATURES,
            "Modules whose output is coded: blocks (every residual block, the default), or a pattern of "
            "module names; may be repeated.",
            metavar="blocks|GLOB",
        ),
    ] = None,
    bits: Annotated[
        int, _option(_FEATURES, "Bits of the quantizer before the transform.")
    ] = FeatureOptions.bits,
    symbol_bits: Annotated[
        Optional[int],  # noqa: UP045
        _option(_FEATURES, "Bits that coefficients are clamped to. Default: so many that none is."),
    ] = None,
    q_table: Annotated[
        Optional[str],  # noqa: UP045
        _option(_FEATURES, "Steps of the coefficients' quantizer.", metavar="FILE.json|.csv"),
    ] = None,
    norm: Annotated[
        Norm, _option(_FEATURES, "Scale of the transform that the steps refer to.")
    ] = FeatureOptions.norm,
    mean_shift: Annotated[
        Optional[bool],  # noqa: UP045
        _option(
            _FEATURES,
            "Send each sample's mean apart. Default: for wavelets.",
            "--mean-shift/--no-mean-shift",
        ),
    ] = None,
    k: Annotated[
        str,
        _option(
            _FEATURES, "Order of the exponential-Golomb code, 0 to 5, or auto per tap.", metavar="0-5|auto"
        ),
    ] = "auto",
    prequantizer: Annotated[
        Prequantizer, _option(_FEATURES, "How values become integers before the transform.")
    ] = FeatureOptions.prequantizer,
    quality: Annotated[
        Optional[float],  # noqa: UP045
        _option(_FEATURES, "1 to 100: scales the steps as JPEG does; 50 leaves them."),
    ] = None,
    dead_zone: Annotated[
        float, _option(_FEATURES, "Round up from 0.5 + so much on; more zeros, fewer bits.")
    ] = FeatureOptions.dead_zone,
    channel_klt: Annotated[
        bool, _option(_FEATURES, "Decorrelate channels first, by a calibrated basis.", "--channel-klt")
    ] = False,
    allocate: Annotated[
        bool,
        _option(
            _FEATURES, "Choose the steps by how much the outputs change with each coefficient.", "--allocate"
        ),
    ] = False,
    calibration: Annotated[
        int, _option(_FEATURES, "Training images to calibrate on.")
    ] = FeatureOptions.calibration,
    sweep: Annotated[
        Optional[str],  # noqa: UP045
        _option(
            _REPORT, "Measure a range of qualities: a table and a plot beside the product.", metavar="quality"
        ),
    ] = None,
    report_file: Annotated[
        Optional[str],  # noqa: UP045
        _option(_REPORT, "Figures of each tap as a workbook or table.", metavar="FILE.xlsx|.csv|.json"),
    ] = None,
    histograms: Annotated[
        Optional[str],  # noqa: UP045
        _option(_REPORT, "Folder for PNG histograms per tap and sub-band.", metavar="DIR"),
    ] = None,
    zero_bar: Annotated[bool, _option(_REPORT, "Draw the zeros in them, too.", "--zero-bar")] = False,
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
    """Put layers or feature maps into a DCT, DST, DFT, wavelet or data-driven domain.

    Example: cctool transform student.pt --layers linear --keep 0.25
    """
    wanted, ratio = parse_targets(tuple(target or ()))
    given = {
        name: value
        for name, value in dict(locals()).items()
        if name in _GIVEN and common.is_given(context, name)
    }
    given |= {name: tuple(given[name]) for name in ("layers", "taps") if name in given}
    given |= {name: value for name, value in (("target", wanted), ("ratio", ratio)) if value is not None}
    if "k" in given:
        given["k"] = parse_order(given["k"])
    if "sweep" in given:
        given["sweep"] = parse_sweep(given["sweep"])
    options = preset_options(
        preset, data=common.data_options(data, val_data, test_data, batch_size, workers, limit), **given
    )
    invocation = common.Invocation(
        verb="transform",
        console=Console(quiet=quiet, as_json=as_json, debug=debug),
        source=source,
        output=output,
        force=force,
        allow_nonfinite=allow_nonfinite,
        model=common.model_options(arch, arg, input_shape, mean, std, spec, trust_pickle),
        runtime=RuntimeOptions(device, precision, seed, deterministic),
        user_code=(data, val_data, test_data),
    )
    from cctool.operations.transform.run import run

    invocation.write(run, options, say_report)


_GIVEN = {"kernel"} | (
    (set(WeightOptions.__dataclass_fields__) | set(FeatureOptions.__dataclass_fields__)) - {"ratio"}
)
