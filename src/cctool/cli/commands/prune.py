"""`cctool prune`: the signature of the command, and from it the options."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from cctool.base.errors import UsageError
from cctool.cli import common
from cctool.cli.console import Console
from cctool.cli.reports.prune import print_plan, say_report
from cctool.options.common import DataOptions, Precision, RuntimeOptions
from cctool.options.prune.choices import (
    AttentionUnit,
    Granularity,
    Growth,
    Images,
    Normalize,
    PruneMethod,
    Reduce,
    Scope,
    StepMode,
)
from cctool.options.prune.options import PruneOptions, PrunePreset, preset_options
from cctool.options.prune.parts import (
    Sparsifier,
    SparsifyOptions,
    TeacherOptions,
    parse_block,
    parse_pattern,
    parse_target,
)

_RANKING = "What goes first"
_AMOUNT = "How much goes"
_SHAPE = "What may go"
_TRAINING = "Training before and after"
_OUTPUT = "Report"


def _option(panel: str, text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel)


def prune(
    context: typer.Context,
    source: common.Source,
    output: common.Output = None,
    method: Annotated[
        PruneMethod,
        _option(
            _RANKING,
            "How units are ranked; the lowest go. taylor, hessian, gradient, apoz and activation look at "
            "training images. Default: slimming for channels, l1 for weights.",
        ),
    ] = PruneOptions.method,
    scope: Annotated[
        Optional[Scope],  # noqa: UP045
        _option(
            _RANKING,
            "Rank across the network or in each family. Default: global for slimming, lamp, taylor and "
            "hessian, else local.",
        ),
    ] = None,
    reduce: Annotated[
        Optional[Reduce],  # noqa: UP045
        _option(
            _RANKING, "How a unit's scores in its several tensors become one. Default: the method's custom."
        ),
    ] = None,
    normalize: Annotated[
        Optional[Normalize],  # noqa: UP045
        _option(_RANKING, "By what a family's scores are divided. Default: the method's custom."),
    ] = None,
    samples: Annotated[
        int, _option(_RANKING, "Training images that data-driven methods look at.")
    ] = PruneOptions.samples,
    rate: Annotated[
        float, _option(_AMOUNT, "Fraction of the removable units (or weights) to remove, in [0, 1).")
    ] = PruneOptions.rate,
    target: Annotated[
        Optional[str],  # noqa: UP045
        _option(
            _AMOUNT,
            "What the network may cost: macs=0.5, params=30%, bytes=1.2MB, latency=0.6 (measured). Up to 1 "
            "is a fraction of what comes in.",
            metavar="QUANTITY=VALUE",
        ),
    ] = None,
    max_drop: Annotated[
        Optional[float],  # noqa: UP045
        _option(
            _AMOUNT, "Points of validation top-1 that may be lost; finds the largest rate.", metavar="POINTS"
        ),
    ] = None,
    rates: Annotated[
        Optional[str],  # noqa: UP045
        _option(_AMOUNT, "Table of rates, family or layer -> rate.", metavar="FILE.csv|.json"),
    ] = None,
    keep: Annotated[
        Optional[float],  # noqa: UP045
        _option(_AMOUNT, "Fraction of each width that a step keeps, truncated."),
    ] = None,
    apply_masks: Annotated[
        bool, _option(_AMOUNT, "Cut what earlier masks left empty, and nothing else.", "--apply-masks")
    ] = False,
    granularity: Annotated[
        Granularity,
        _option(_SHAPE, "Cut channels, or mask weights: single ones, N:M, kernels, rows, columns, blocks."),
    ] = PruneOptions.granularity,
    pattern: Annotated[
        Optional[str],  # noqa: UP045
        _option(_SHAPE, "For --granularity nm: of every M inputs N stay. Default: 2:4.", metavar="N:M"),
    ] = None,
    block: Annotated[
        Optional[str],  # noqa: UP045
        _option(_SHAPE, "For --granularity block: its size. Default: 4x1.", metavar="ROWSxCOLUMNS"),
    ] = None,
    mask: Annotated[
        bool, _option(_SHAPE, "Only mask the channels that would be cut; --apply-masks cuts them.", "--mask")
    ] = False,
    round_to: Annotated[
        str,
        _option(_SHAPE, "Keep widths that are multiples of this; auto: of 8 where there are that many."),
    ] = "1",
    min_channels: Annotated[
        int, _option(_SHAPE, "Cut no family below so many channels.")
    ] = PruneOptions.min_channels,
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        _option(_SHAPE, "Modules, tensors or families that are left alone; may be repeated.", metavar="GLOB"),
    ] = None,
    only: Annotated[
        Optional[list[str]],  # noqa: UP045
        _option(_SHAPE, "Touch nothing but these; may be repeated.", metavar="GLOB"),
    ] = None,
    exact: Annotated[
        bool,
        _option(
            _SHAPE,
            "Leave widths alone over which statistics run (layer norm, attention): all else is exact.",
            "--exact",
        ),
    ] = False,
    attention: Annotated[
        AttentionUnit,
        _option(
            _SHAPE,
            "What goes from attention: equal positions of every head, or whole heads where code allows.",
        ),
    ] = PruneOptions.attention,
    steps: Annotated[
        int, _option(_TRAINING, "Prune in so many steps, a checkpoint each.")
    ] = PruneOptions.steps,
    step_mode: Annotated[
        StepMode, _option(_TRAINING, "Each step starts from the source, or from the step before.")
    ] = PruneOptions.step_mode,
    growth: Annotated[
        Growth, _option(_TRAINING, "How the rate grows from step to step; agp: fast at first.")
    ] = PruneOptions.growth,
    sparsify: Annotated[
        Optional[Sparsifier],  # noqa: UP045
        _option(_TRAINING, "Train before the cut so that units go towards zero."),
    ] = None,
    sparsify_epochs: Annotated[int, _option(_TRAINING, "Epochs of that training.")] = SparsifyOptions.epochs,
    sparsify_strength: Annotated[
        Optional[float],  # noqa: UP045
        _option(_TRAINING, "Weight of its penalty. Default: the method's."),
    ] = None,
    sparsify_lr: Annotated[
        Optional[float],  # noqa: UP045
        _option(_TRAINING, "Its learning rate."),
    ] = None,
    rewind: Annotated[
        Optional[str],  # noqa: UP045
        _option(_TRAINING, "Give what is left the weights of this earlier checkpoint.", metavar="CHECKPOINT"),
    ] = None,
    from_scratch: Annotated[
        bool, _option(_TRAINING, "Initialise the thinned network anew: the control.", "--from-scratch")
    ] = False,
    recalibrate: Annotated[
        int, _option(_TRAINING, "Estimate batch-norm statistics again from N training images.", metavar="N")
    ] = PruneOptions.recalibrate,
    recalibrate_images: Annotated[
        Optional[Images],  # noqa: UP045
        _option(
            _TRAINING,
            "Take these images as they are, or varied as for training, with whose statistics the network "
            "learnt. Default: plain; for --max-drop whichever suits the dense network better.",
        ),
    ] = None,
    finetune_epochs: Annotated[
        int, _option(_TRAINING, "Epochs of training after each step, with a new optimizer.")
    ] = PruneOptions.finetune_epochs,
    optimizer: Annotated[
        str, _option(_TRAINING, "Of --sparsify and the fine-tuning: sgd, adam, adamw or my.py:factory.")
    ] = PruneOptions.optimizer,
    lr: Annotated[
        Optional[float],  # noqa: UP045
        _option(_TRAINING, "Learning rate of the fine-tuning."),
    ] = None,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        _option(
            _TRAINING,
            "Follow this network while fine-tuning; the input itself is a good one.",
            metavar="CHECKPOINT",
        ),
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
    keep_storage: Annotated[
        bool,
        _option(_TRAINING, "Store fine-tuned tensors as they were stored before.", "--keep-storage"),
    ] = False,
    preset: Annotated[
        Optional[PrunePreset],  # noqa: UP045
        typer.Option(help="Set the options as a published method did; options that you give stand."),
    ] = None,
    dry_run: Annotated[
        bool, _option(_OUTPUT, "Print the plan and write no checkpoint.", "--dry-run")
    ] = False,
    plot: Annotated[
        bool, _option(_OUTPUT, "Draw the kept widths beside the product (.widths.png).", "--plot")
    ] = False,
    plot_file: Annotated[
        Optional[str],  # noqa: UP045
        _option(_OUTPUT, "Draw them into this file: .png, .svg or .pdf.", metavar="PATH"),
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
    """Remove channels physically, or mask weights; what is left computes what the masked network would.

    Example: cctool prune student.pt --method slimming --rate 0.5

    Example: cctool prune student.pt --method l2 --target macs=0.5 --finetune-epochs 10
    """
    values = dict(locals())
    options = _options(context, values)
    _refuse_idle(context, options)
    console = Console(quiet=quiet, as_json=as_json, debug=debug)
    if options.normalize is not None and options.effective_scope is Scope.LOCAL:
        console.warn(
            "--normalize changes no choice where units compete in their family; --scope global compares them"
        )
    invocation = common.Invocation(
        verb="prune",
        console=console,
        source=source,
        output=output,
        force=force,
        allow_nonfinite=allow_nonfinite,
        model=common.model_options(arch, arg, input_shape, mean, std, spec, trust_pickle),
        runtime=RuntimeOptions(device, precision, seed, deterministic),
        user_code=(data, val_data, test_data, optimizer, teacher_arch),
    )
    if dry_run:
        from cctool.operations.prune.run import plan

        print_plan(invocation.console, invocation.read(plan, options))
    else:
        from cctool.operations.prune.run import run

        invocation.write(run, options, say_report)


_PLAIN = (
    "method", "rate", "scope", "reduce", "normalize", "samples", "granularity", "mask", "apply_masks",
    "max_drop", "rates", "min_channels", "keep", "exact", "attention", "steps", "step_mode", "growth",
    "finetune_epochs", "optimizer", "lr", "rewind", "from_scratch", "keep_storage", "recalibrate",
    "recalibrate_images", "plot", "plot_file",
)  # fmt: skip


def _options(context: typer.Context, values: dict[str, Any]) -> PruneOptions:
    """Make the options of the run from what stands on the command line."""
    given = {name: values[name] for name in _PLAIN}
    given["round_to"] = _parse_round(values["round_to"])
    given["exclude"], given["only"] = tuple(values["exclude"] or ()), tuple(values["only"] or ())
    if values["granularity"] is not Granularity.CHANNEL and not common.is_given(context, "method"):
        given["method"] = PruneMethod.L1
    if values["preset"] is not None:
        given = {name: value for name, value in given.items() if common.is_given(context, name)}
    if values["target"] is not None:
        given["target"] = parse_target(values["target"])
    if values["pattern"] is not None:
        given["pattern"] = parse_pattern(values["pattern"])
    if values["block"] is not None:
        given["block"] = parse_block(values["block"])
    if values["sparsify"] is not None:
        given["sparsify"] = SparsifyOptions(
            values["sparsify"], values["sparsify_epochs"], values["sparsify_strength"], values["sparsify_lr"]
        )
    if values["teacher"] is not None:
        given["teacher"] = _teacher(values)
    data = [values[name] for name in ("data", "val_data", "test_data", "batch_size", "workers", "limit")]
    return preset_options(values["preset"], **given, data=common.data_options(*data))


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


def _parse_round(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--round-to {text}: a whole number from 1 on, or auto, is expected")
    return int(text)


def _refuse_idle(context: typer.Context, options: PruneOptions) -> None:
    """Refuse what stands on the command line and would change nothing."""

    def given(*names: str) -> str:
        return ", ".join(f"--{name.replace('_', '-')}" for name in names if common.is_given(context, name))

    goals = {
        "--keep": options.keep is not None,
        "--target": options.target is not None,
        "--max-drop": options.max_drop is not None,
        "--rates": options.rates is not None,
        "--apply-masks": options.apply_masks,
        "--granularity nm": options.granularity is Granularity.NM,
    }
    for goal, there in goals.items():
        if there and given("rate"):
            origin = f"--preset {options.preset} sets {goal}" if options.preset and goal == "--keep" else goal
            raise UsageError(f"{origin} takes the place of --rate: give one of them")
    channels = options.granularity is Granularity.CHANNEL
    teaching = ("teacher_arch", "teacher_arg", "teacher_input", "teacher_mean", "teacher_std")
    idle = (
        (
            options.finetune_epochs == 0,
            ("lr", "teacher", "keep_storage"),
            "nothing is fine-tuned; --finetune-epochs says for how long",
        ),
        (
            options.finetune_epochs == 0 and options.sparsify is None,
            ("optimizer",),
            "nothing is trained; --finetune-epochs says for how long",
        ),
        (options.teacher is None, (*teaching, "temperature", "alpha"), "there is no --teacher"),
        (
            options.sparsify is None,
            ("sparsify_epochs", "sparsify_strength", "sparsify_lr"),
            "there is no --sparsify",
        ),
        (options.steps == 1, ("step_mode", "growth"), "a single step has no course; --steps says how many"),
        (
            options.recalibrate == 0 and options.max_drop is None,
            ("recalibrate_images",),
            "no statistics are estimated again; --recalibrate says from how many images",
        ),
        (not options.needs_data, ("samples",), f"--method {options.method} looks at no images"),
        (
            options.apply_masks,
            ("method", "scope", "reduce", "normalize", "min_channels", "round_to", "steps", "sparsify"),
            "--apply-masks cuts what is empty, and chooses nothing",
        ),
        (
            options.apply_masks,
            ("exact", "attention", "plot", "plot_file"),
            "--apply-masks cuts what changes no output, and plans no widths",
        ),
        (
            options.granularity is Granularity.NM,
            ("scope",),
            "--granularity nm chooses within each group of M",
        ),
        (options.keep is not None, ("growth",), "--keep shrinks each width by the same factor at each step"),
        (
            not channels,
            ("round_to", "min_channels", "reduce", "normalize", "exact", "attention", "plot", "plot_file"),
            f"--granularity {options.granularity} changes no width",
        ),
        (
            options.keep is not None or options.rates is not None,
            ("normalize",),
            "each family's width is fixed, so that families are not compared",
        ),
    )
    for wrong, names, reason in idle:
        found = given(*names)
        if wrong and found:
            raise UsageError(f"{found}: {reason}")
