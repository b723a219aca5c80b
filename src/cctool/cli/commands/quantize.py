"""`cctool quantize`: the signature of the command."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from cctool.base.errors import UsageError
from cctool.cli import common
from cctool.cli.console import Console
from cctool.cli.reports.quantize import say_report
from cctool.options.common import DataOptions, Precision, RuntimeOptions
from cctool.options.prune.parts import TeacherOptions, parse_target
from cctool.options.quantize.choices import (
    CLIPPING,
    INTEGERS,
    CodebookInit,
    Edges,
    Observer,
    QuantizeMethod,
    QuantizePreset,
    Rounding,
)
from cctool.options.quantize.options import QuantizeOptions, preset_options
from cctool.options.quantize.parts import CalibrationOptions, TuningOptions, parse_layer_bits

_WEIGHTS = "Weights"
_ACTIVATIONS = "Activations"
_LAYERS = "Which layers"
_TRAINING = "Training"


def _option(panel: str, text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel)


def quantize(
    context: typer.Context,
    source: common.Source,
    output: common.Output = None,
    method: Annotated[
        QuantizeMethod,
        typer.Option(
            help="Stored weights: fp16, bf16, uint8, int2-int7, codebook, apot. Weights and activations of "
            "an integer runtime: int8. Trained so: qat, lsq, pact, dorefa, wrpn."
        ),
    ] = QuantizeOptions.method,
    weight_bits: Annotated[
        Optional[int],  # noqa: UP045
        _option(_WEIGHTS, "Bits of a weight. Default: the method's; codebook 5, lsq, pact, ... 4."),
    ] = None,
    per_channel: Annotated[
        Optional[bool],  # noqa: UP045
        _option(
            _WEIGHTS,
            "A scale for each output channel. Default: yes, but for uint8 and lsq.",
            "--per-channel/--per-tensor",
        ),
    ] = None,
    group_size: Annotated[
        Optional[int],  # noqa: UP045
        _option(_WEIGHTS, "A scale for so many neighbouring weights of a channel (stored integers)."),
    ] = None,
    asymmetric: Annotated[
        bool, _option(_WEIGHTS, "Weights with a zero point (intN, qat).", "--asymmetric/--symmetric")
    ] = QuantizeOptions.asymmetric,
    rounding: Annotated[
        Rounding, _option(_WEIGHTS, "To the nearest level, or learnt for each layer's output (intN).")
    ] = QuantizeOptions.rounding,
    rounding_steps: Annotated[
        int, _option(_WEIGHTS, "Steps of AdaRound for each layer.")
    ] = QuantizeOptions.rounding_steps,
    init: Annotated[
        CodebookInit, _option(_WEIGHTS, "Where the k-means of codebook begins.")
    ] = QuantizeOptions.init,
    terms: Annotated[
        Optional[int],  # noqa: UP045
        _option(_WEIGHTS, "Powers of two that apot adds up. Default: 2."),
    ] = None,
    equalize: Annotated[
        bool, _option(_WEIGHTS, "Equalize channels' ranges across layers before (intN).", "--equalize")
    ] = False,
    bias_correction: Annotated[
        bool,
        _option(
            _WEIGHTS, "Take the mean error of layers' outputs out of biases (intN).", "--bias-correction"
        ),
    ] = False,
    reduce_range: Annotated[
        Optional[bool],  # noqa: UP045
        _option(
            _WEIGHTS,
            "7 of 8 bits: CPUs without VNNI saturate otherwise. Default: beside quantized activations.",
            "--reduce-range/--full-range",
        ),
    ] = None,
    activation_bits: Annotated[
        Optional[int],  # noqa: UP045
        _option(_ACTIVATIONS, "Bits of an activation. Default: 8; of lsq, pact, dorefa and wrpn 4."),
    ] = None,
    weight_only: Annotated[
        bool, _option(_ACTIVATIONS, "Leave activations in floating point.", "--weight-only")
    ] = False,
    calibration: Annotated[
        int, _option(_ACTIVATIONS, "Training images to find ranges on.", metavar="N")
    ] = CalibrationOptions.images,
    observer: Annotated[
        Observer, _option(_ACTIVATIONS, "How ranges are found.")
    ] = CalibrationOptions.observer,
    percentile: Annotated[
        float, _option(_ACTIVATIONS, "Of --observer percentile.")
    ] = CalibrationOptions.percentile,
    deviations: Annotated[
        float, _option(_ACTIVATIONS, "Standard deviations of --observer n-std.")
    ] = CalibrationOptions.deviations,
    symmetric_activations: Annotated[
        bool,
        _option(_ACTIVATIONS, "Activations without a zero point, too.", "--symmetric-activations"),
    ] = False,
    edges: Annotated[
        Optional[Edges],  # noqa: UP045
        _option(_LAYERS, "First and last layer of what is quantized with activations. Default: 8 bits."),
    ] = None,
    layer: Annotated[
        Optional[list[str]],  # noqa: UP045
        _option(
            _LAYERS,
            "Bits of some layers, as fc=8, layer1.*=w4a8 or conv1=float; may be repeated.",
            metavar="GLOB=BITS",
        ),
    ] = None,
    include: Annotated[
        Optional[list[str]],  # noqa: UP045
        _option(
            _LAYERS, "Take no other tensors or layers; a full name forces; may be repeated.", metavar="GLOB"
        ),
    ] = None,
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        _option(_LAYERS, "Leave these tensors or layers as they are; may be repeated.", metavar="GLOB"),
    ] = None,
    include_1d: Annotated[
        bool, _option(_LAYERS, "Store biases and batch norm's tensors so, too.", "--include-1d")
    ] = QuantizeOptions.include_1d,
    target: Annotated[
        Optional[str],  # noqa: UP045
        _option(
            _LAYERS,
            "Bytes that the weights may take, absolute or of what comes in; bits are chosen layer by layer.",
            metavar="bytes=VALUE",
        ),
    ] = None,
    max_drop: Annotated[
        Optional[float],  # noqa: UP045
        _option(
            _LAYERS,
            "Points of validation accuracy that may be lost; bits are chosen layer by layer.",
            metavar="POINTS",
        ),
    ] = None,
    choices: Annotated[
        str, _option(_LAYERS, "Bits to choose from, with --target and --max-drop.", metavar="B,B,...")
    ] = "2,4,8",
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        _option(_TRAINING, "Of training with quantizers in the loop. Default: 10 of the trained methods."),
    ] = None,
    optimizer: Annotated[
        str, _option(_TRAINING, "sgd, adam, adamw or my.py:factory.")
    ] = TuningOptions.optimizer,
    lr: Annotated[Optional[float], _option(_TRAINING, "Learning rate.")] = None,  # noqa: UP045
    freeze_norm: Annotated[
        bool,
        _option(_TRAINING, "Leave batch norm's statistics, and normalise by them.", "--freeze-norm"),
    ] = False,
    alpha_decay: Annotated[
        float, _option(_TRAINING, "Weight of pact's penalty on its clipping levels.")
    ] = TuningOptions.alpha_decay,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        _option(_TRAINING, "Follow this network; the input itself is a good one.", metavar="CHECKPOINT"),
    ] = None,
    teacher_arch: Annotated[
        Optional[str],  # noqa: UP045
        _option(_TRAINING, "Architecture of a foreign teacher."),
    ] = None,
    teacher_arg: Annotated[
        Optional[list[str]],  # noqa: UP045
        _option(_TRAINING, "Argument of its architecture; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    teacher_input: Annotated[
        Optional[str],  # noqa: UP045
        _option(_TRAINING, "Size of its input; images are resized to it.", metavar="CxHxW"),
    ] = None,
    teacher_mean: Annotated[
        Optional[str],  # noqa: UP045
        _option(_TRAINING, "Mean that its inputs are centred by.", metavar="M,M,M"),
    ] = None,
    teacher_std: Annotated[
        Optional[str],  # noqa: UP045
        _option(_TRAINING, "Deviation that its inputs are divided by.", metavar="S,S,S"),
    ] = None,
    temperature: Annotated[
        float, _option(_TRAINING, "T of the softened outputs.")
    ] = TeacherOptions.temperature,
    alpha: Annotated[
        float, _option(_TRAINING, "Weight of the teacher; the labels weigh 1 - alpha.")
    ] = TeacherOptions.alpha,
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
    """Compute and store in fewer bits: weights alone, or activations too; calibrated or trained.

    Example: cctool quantize student.pt --method int8 --data cifar10

    Example: cctool quantize student.pt --method int4 --rounding adaround

    Example: cctool quantize student.pt --method lsq --weight-bits 4 --epochs 10 --teacher student.pt
    """
    values = dict(locals())
    options = _options(context, values)
    _refuse_idle(context, options)
    invocation = common.Invocation(
        verb="quantize",
        console=Console(quiet=quiet, as_json=as_json, debug=debug),
        source=source,
        output=output,
        force=force,
        allow_nonfinite=allow_nonfinite,
        model=common.model_options(arch, arg, input_shape, mean, std, spec, trust_pickle),
        runtime=RuntimeOptions(device, precision, seed, deterministic),
        user_code=(data, val_data, test_data, optimizer, teacher_arch),
    )
    from cctool.operations.quantize.run import run

    invocation.write(run, options, say_report)


_PLAIN = (
    "method", "weight_bits", "weight_only", "activation_bits", "per_channel", "asymmetric", "rounding",
    "rounding_steps", "init", "terms", "edges", "include_1d", "max_drop",
)  # fmt: skip


def _options(context: typer.Context, values: dict[str, Any]) -> QuantizeOptions:
    given: dict[str, Any] = {name: values[name] for name in _PLAIN}
    given["include"], given["exclude"] = tuple(values["include"] or ()), tuple(values["exclude"] or ())
    if values["preset"] is not None:
        given = {name: value for name, value in given.items() if common.is_given(context, name)}
    given["group"] = values["group_size"]
    given["layers"] = tuple(parse_layer_bits(text) for text in values["layer"] or ())
    given["choices"] = _choices(values["choices"])
    if values["target"] is not None:
        given["target"] = parse_target(values["target"])
    given["calibration"] = CalibrationOptions(
        values["calibration"],
        values["observer"],
        values["percentile"],
        values["deviations"],
        values["symmetric_activations"],
        values["reduce_range"],
        values["equalize"],
        values["bias_correction"],
    )
    given["tuning"] = TuningOptions(
        values["epochs"],
        values["optimizer"],
        values["lr"],
        None if values["teacher"] is None else _teacher(values),
        values["freeze_norm"],
        values["alpha_decay"],
    )
    data = [values[name] for name in ("data", "val_data", "test_data", "batch_size", "workers", "limit")]
    return preset_options(values["preset"], **given, data=common.data_options(*data))


def _choices(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(piece) for piece in text.split(",")}))
    except ValueError:
        raise UsageError(f"--choices {text}: comma-separated bits are expected, as in 2,4,8") from None


def _teacher(values: dict[str, Any]) -> TeacherOptions:
    model = common.model_options(
        values["teacher_arch"],
        values["teacher_arg"],
        values["teacher_input"],
        values["teacher_mean"],
        values["teacher_std"],
        None,
        values["trust_pickle"],
    )
    return TeacherOptions(values["teacher"], model, values["temperature"], values["alpha"])


def _refuse_idle(context: typer.Context, options: QuantizeOptions) -> None:
    """Refuse what stands on the command line and would change nothing."""
    observing = options.activations and options.method not in CLIPPING
    watching = options.method in INTEGERS
    teaching = ("teacher_arch", "teacher_arg", "teacher_input", "teacher_mean", "teacher_std")
    method = f"--method {options.method}"
    looks = observing or options.calibration.bias_correction or options.rounding is Rounding.ADAROUND
    idle = (
        (options.rounding is Rounding.NEAREST, ("rounding_steps",), "there is no --rounding adaround"),
        (options.method is not QuantizeMethod.CODEBOOK, ("init",), f"{method} has no codebook"),
        (not (looks or options.activations), ("calibration",), f"{method} looks at no images"),
        (not observing, ("observer", "percentile", "deviations"), f"{method} calibrates no activations"),
        (
            not observing or options.method is QuantizeMethod.LSQ,
            ("symmetric_activations",),
            f"{method} has no such choice",
        ),
        (
            options.calibration.observer is not Observer.PERCENTILE,
            ("percentile",),
            "it is for --observer percentile",
        ),
        (options.calibration.observer is not Observer.N_STD, ("deviations",), "it is for --observer n-std"),
        (
            not (watching or options.activations),
            ("reduce_range",),
            f"{method} has no 8-bit integers of weights to reduce",
        ),
        (not options.activations, ("edges",), f"{method} treats all layers alike; --layer names some"),
        (options.activations, ("include_1d",), "biases stay as they are beside integer kernels"),
        (not options.searches, ("choices",), "nothing is chosen; --target or --max-drop choose"),
        (
            not options.epochs,
            ("optimizer", "lr", "freeze_norm", "teacher"),
            "nothing is trained; --epochs says for how long",
        ),
        (options.tuning.teacher is None, (*teaching, "temperature", "alpha"), "there is no --teacher"),
        (options.method is not QuantizeMethod.PACT, ("alpha_decay",), f"{method} learns no clipping levels"),
    )
    for wrong, names, reason in idle:
        found = ", ".join(f"--{name.replace('_', '-')}" for name in names if common.is_given(context, name))
        if wrong and found:
            raise UsageError(f"{found}: {reason}")
