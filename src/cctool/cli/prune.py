"""`cctool prune`: the signature of the command, its plan and its report."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from cctool.cli import common
from cctool.cli.console import Console
from cctool.errors import UsageError
from cctool.options.common import DataOptions, Precision, RuntimeOptions
from cctool.options.prune import PruneMethod, PruneOptions, PrunePreset, Scope, StepMode, preset_options


def prune(
    context: typer.Context,
    source: common.Source,
    output: common.Output = None,
    method: Annotated[
        PruneMethod, typer.Option(help="How channels are ranked; the lowest go.")
    ] = PruneOptions.method,
    rate: Annotated[
        float, typer.Option(help="Fraction of the removable units to remove, in [0, 1).")
    ] = PruneOptions.rate,
    scope: Annotated[
        Optional[Scope],  # noqa: UP045
        typer.Option(
            help="Rank across the network or in each family. Default: global for slimming, else local."
        ),
    ] = None,
    round_to: Annotated[int, typer.Option(help="Keep widths that are multiples of this.")] = 1,
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="GLOB", help="Modules or families that keep their width; may be repeated."),
    ] = None,
    only: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="GLOB", help="Cut nothing but these; may be repeated."),
    ] = None,
    keep: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="In place of --rate: fraction of each width that a step keeps, truncated."),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Prune in so many steps, a checkpoint each.")
    ] = PruneOptions.steps,
    step_mode: Annotated[
        StepMode, typer.Option(help="Each step starts from the source, or from the step before.")
    ] = PruneOptions.step_mode,
    finetune_epochs: Annotated[
        int, typer.Option(help="Epochs of training after each step, with a new optimizer.")
    ] = PruneOptions.finetune_epochs,
    optimizer: Annotated[
        str, typer.Option(help="Of the fine-tuning: sgd, adam, adamw or my.py:factory.")
    ] = PruneOptions.optimizer,
    lr: Annotated[Optional[float], typer.Option(help="Learning rate of the fine-tuning.")] = None,  # noqa: UP045
    keep_storage: Annotated[
        bool, typer.Option("--keep-storage", help="Store fine-tuned tensors as they were stored before.")
    ] = False,
    recalibrate: Annotated[
        int, typer.Option(metavar="N", help="Estimate batch-norm statistics again from N training images.")
    ] = PruneOptions.recalibrate,
    preset: Annotated[
        Optional[PrunePreset],  # noqa: UP045
        typer.Option(help="Set the options as a published method did; options that you give stand."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
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
    """Remove channels physically; what is left computes what the masked network would.

    Example: cctool prune student.pt --method slimming --rate 0.5
    """
    given: dict[str, Any] = {
        "method": method,
        "rate": rate,
        "scope": scope,
        "round_to": round_to,
        "exclude": tuple(exclude or ()),
        "only": tuple(only or ()),
        "keep": keep,
        "steps": steps,
        "step_mode": step_mode,
        "finetune_epochs": finetune_epochs,
        "optimizer": optimizer,
        "lr": lr,
        "keep_storage": keep_storage,
        "recalibrate": recalibrate,
    }
    if preset is not None:
        given = {name: value for name, value in given.items() if common.is_given(context, name)}
    options = preset_options(
        preset,
        **given,
        data=common.data_options(data, val_data, test_data, batch_size, workers, limit),
    )
    _refuse_idle(context, options)
    console = Console(quiet=quiet, as_json=as_json, debug=debug)
    invocation = common.Invocation(
        verb="prune",
        console=console,
        source=source,
        output=output,
        force=force,
        allow_nonfinite=allow_nonfinite,
        model=common.model_options(arch, arg, input_shape, mean, std, spec, trust_pickle),
        runtime=RuntimeOptions(device, precision, seed, deterministic),
        user_code=(data, val_data, test_data, optimizer),
    )
    if dry_run:
        _print_plan(invocation, options)
    else:
        from cctool.operations.prune import run

        invocation.write(run, options, _report)


def _refuse_idle(context: typer.Context, options: PruneOptions) -> None:
    """Refuse what stands on the command line and would change nothing."""
    if options.keep is not None and common.is_given(context, "rate"):
        origin = f"--preset {options.preset} sets --keep" if options.preset else "--keep is given"
        raise UsageError(f"{origin}, which takes the place of --rate: give one of them")
    if not options.finetune_epochs:
        idle = [f"--{name}" for name in ("optimizer", "lr") if common.is_given(context, name)]
        if idle:
            raise UsageError(f"{', '.join(idle)}: nothing is fine-tuned; --finetune-epochs says for how long")


def _print_plan(invocation: common.Invocation, options: PruneOptions) -> None:
    from cctool.operations.prune import plan

    reports = invocation.read(plan, options)
    console = invocation.console
    for step, report in enumerate(reports, start=1):
        console.table(
            f"step {step} of {len(reports)}" if len(reports) > 1 else "",
            ("family", "units", "kept", "width", "parameters touched", "note"),
            [(f.name, f.units, f.kept, f.kept * f.width, f.parameters, f.note) for f in report.families],
        )
        console.table(
            "cannot be cut",
            ("parameter", "dim", "indices", "by", "in module", "why"),
            [(f.parameter, f.dim, f"{f.indices} of {f.of}", f.op, f.module, f.reason) for f in report.frozen],
        )
        console.text(
            f"parameters {report.parameters_before:,} -> {report.parameters_after:,} "
            f"({report.parameters_after / max(report.parameters_before, 1):.1%})"
        )
        for note in report.notes:
            console.note(note)
    console.document(reports)


def _report(console: Console, report: Any) -> None:
    cut = report.cut
    macs = f"{common.number(report.macs_before)} -> {common.number(report.macs_after)}"
    console.note(f"parameters {cut.parameters_before:,} -> {cut.parameters_after:,}, MACs {macs}")
    console.note(f"cut equals masked within {cut.error:.1e} ({cut.precision or 'nothing was cut'})")
    untouched = [family for family in cut.families if family.note]
    for family in untouched:
        console.note(f"{family.name} keeps its {family.units} units: {family.note}")
    # Every network has an input and an output; their widths are not worth a line each time.
    frozen = sorted(
        {f"{item.op}: {item.reason}" for item in cut.frozen if item.op not in ("input", "output")}
    )
    for reason in frozen:
        console.note(f"frozen by {reason}")
    for note in cut.notes:
        console.note(note)
    common.show_metrics(console, report.metrics_before, report.metrics_after)
