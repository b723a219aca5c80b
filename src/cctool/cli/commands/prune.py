"""`cctool prune`, and what it says of a plan and of a product."""

from __future__ import annotations

from typing import Any

from cctool.cli.console import Console
from cctool.cli.frame import Call, show_metrics
from cctool.options.prune.choices import Scope


def prune(call: Call) -> None:
    """Remove channels physically, or mask weights; what is left computes what the masked network would.

    Example: cctool prune student.pt --method slimming --rate 0.5

    Example: cctool prune student.pt --method l2 --target macs=0.5 --finetune-epochs 10
    """
    options = call.options
    if options.normalize is not None and options.effective_scope is Scope.LOCAL:
        call.console.warn(
            "--normalize changes no choice where units compete in their family; --scope global compares them"
        )
    if options.dry_run:
        from cctool.operations.prune.run import plan

        _print_plan(call.console, call.read(carry_out=plan))
    else:
        call.write(_say_report)


_MOST = 40


def _print_plan(console: Console, reports: Any) -> None:
    """Print what a dry run found: the command's product."""
    for report in reports:
        title = f"step {report.step} of {report.steps}" if report.steps > 1 else ""
        if report.cut is not None:
            console.table(title, _FAMILY, [_family(family) for family in report.cut.families])
            frozen = report.cut.frozen
            console.table(
                "cannot be cut",
                ("parameter", "dim", "indices", "by", "in module", "why"),
                [(f.parameter, f.dim, f"{f.indices} of {f.of}", f.op, f.module, f.reason) for f in frozen],
            )
        if report.masks is not None:
            console.table(title or "masks", _MASKS, [_mask(row) for row in report.masks.tensors])
        if report.emptied is not None:
            console.table(title or "empty", _EMPTIED, report.emptied.families)
        console.table("costs", _COSTS, _costs(report))
        if report.cut is not None:
            console.note(_comparison(report.cut))
        for note in _notes(report):
            console.note(note)
        if report.picture is not None:
            console.note(f"kept widths: {report.picture}")
    console.document(reports)


def _say_report(console: Console, report: Any) -> None:
    """Say on stderr what a step did."""
    if report.cut is not None:
        families = report.cut.families
        console.talk_table("", _FAMILY, [_family(family) for family in families[:_MOST]])
        if len(families) > _MOST:
            console.note(f"... and {len(families) - _MOST} families more; --json has them all")
        console.note(_comparison(report.cut))
        # Every network has an input and an output; their widths are not worth a line each time.
        frozen = {
            f"{item.op}: {item.reason}" for item in report.cut.frozen if item.op not in ("input", "output")
        }
        for reason in sorted(frozen):
            console.note(f"frozen by {reason}")
    if report.masks is not None:
        rows = report.masks.tensors
        console.talk_table("", _MASKS, [_mask(row) for row in rows[:_MOST]])
        if len(rows) > _MOST:
            console.note(f"... and {len(rows) - _MOST} tensors more; --json has them all")
    if report.emptied is not None:
        console.talk_table("", _EMPTIED, report.emptied.families)
        console.note(_same_outputs(report.emptied))
    console.talk_table("", _COSTS, _costs(report))
    for note in _notes(report):
        console.note(note)
    show_metrics(console, report.metrics_before, report.metrics_after)
    if report.picture is not None:
        console.note(f"kept widths: {report.picture}")


def _comparison(cut: Any) -> str:
    same = f"cut equals masked within {cut.error:.1e} ({cut.precision or 'nothing was cut'})"
    if not cut.statistics:
        return same
    places = [f"{found.op} of {found.module}" if found.module else found.op for found in cut.statistics]
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return (
        f"{same}, statistics running over the kept channels in both: {', '.join(places[:3])}{more} "
        "(--exact leaves such widths alone)"
    )


_FAMILY = ("family", "units", "kept", "width", "parameters touched", "removed up to", "kept from", "note")


def _family(family: Any) -> tuple[object, ...]:
    return (
        family.name,
        family.units,
        family.kept,
        family.kept * family.width,
        family.parameters,
        family.removed_to,
        family.kept_from,
        family.note,
    )


_EMPTIED = ("family", "units", "kept")


def _same_outputs(emptied: Any) -> str:
    if not emptied.families:
        return "no channel is empty: nothing was cut"
    return f"outputs are the same within {emptied.error:.1e} ({emptied.precision})"


_MASKS = ("tensor", "shape", "weights", "kept", "kept %", "note")


def _mask(row: Any) -> tuple[object, ...]:
    share = 100 * row.kept / row.total if row.total else 100.0
    return row.name, "x".join(map(str, row.shape)), row.total, row.kept, round(share, 2), row.note


_COSTS = ("", "before", "after", "share")


def _costs(report: Any) -> list[tuple[object, ...]]:
    before, after = report.before, report.after
    rows: list[tuple[str, Any, Any]] = [
        ("parameters", before.parameters, after.parameters),
        ("MACs", before.macs, after.macs),
        ("bytes as stored", before.bytes, after.bytes),
    ]
    if before.latency is not None and after.latency is not None:
        where = f"latency, ms ({after.latency.device}, batch {after.latency.batch})"
        rows.append((where, before.latency.milliseconds, after.latency.milliseconds))
    return [
        (name, old, new, f"{new / old:.1%}" if old and new is not None else None) for name, old, new in rows
    ]


def _notes(report: Any) -> list[str]:
    notes: list[str] = []
    target, budget = report.target, report.budget
    if target is not None:
        notes.append(_reached(target))
    if budget is not None:
        last = next(trial for trial in budget.curve if trial.rate == budget.rate)
        notes.append(
            f"largest rate within {budget.budget:g} points: {budget.rate:.4f} ({last.removed} units); "
            f"{budget.split} {budget.metric} {budget.before:.2f} -> {last.value:.2f} (n={budget.n:,}, "
            f"{budget.recalibrated} training images {'varied' if budget.augmented else 'as they are'} "
            "recalibrate)"
        )
    if report.cut is not None:
        untouched = [family for family in report.cut.families if family.note]
        notes += [f"{family.name} keeps its {family.units} units: {family.note}" for family in untouched]
        notes += report.cut.notes
    if report.masks is not None:
        notes += _of_masks(report.masks)
    if report.emptied is not None:
        notes += report.emptied.notes
    return list(dict.fromkeys(notes))


def _reached(target: Any) -> str:
    unit = " us" if target.quantity == "latency" else ""

    def cost(value: float) -> str:
        return f"{value:,.0f}{unit} ({value / target.before:.2%})"

    above = "" if target.above is None else f"; one unit less would leave {cost(target.above)}"
    counted = f"{len(target.trials)} network{'s' if len(target.trials) > 1 else ''} counted"
    return (
        f"target {target.quantity} {cost(target.limit)}: reached {cost(target.reached)} of "
        f"{target.before:,.0f}{unit}{above}, {counted}"
    )


def _of_masks(masks: Any) -> list[str]:
    share = 100 * (1 - masks.kept / masks.total) if masks.total else 0.0
    notes = [
        f"masked {share:.2f} % of {masks.total:,} weights; zeros {masks.sparsity_before:.2f} -> "
        f"{masks.sparsity_after:.2f} %"
    ]
    if masks.pattern is not None:
        holds = "holds in every group" if masks.pattern_holds else "does not hold everywhere"
        notes.append(f"{masks.pattern} {holds} of the weights that it fits")
    return [*notes, *masks.notes]
