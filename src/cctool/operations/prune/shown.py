"""A pruning's report as people read it: tables of families, masks and costs, and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cctool.base.networks import some
from cctool.operations.context import Told, metric_lines
from cctool.tasks.table import measure_named

# Rows of a table that are shown.
_MOST = 40


def told(report: Any) -> Iterator[Told]:
    """Tables and sentences about one step; long tables are truncated."""
    if report.cut is not None:
        yield from _shortened("", _FAMILY, [_family(family) for family in report.cut.families], "families")
        yield _comparison(report.cut)
        # Every network has an input and an output; their widths are not worth a line each time.
        frozen = (item for item in report.cut.frozen if item.op not in ("input", "output"))
        yield from (f"frozen by {reason}" for reason in sorted({f"{x.op}: {x.reason}" for x in frozen}))
    if report.masks is not None:
        yield from _shortened("", _MASKS, [_mask(row) for row in report.masks.tensors], "tensors")
    if report.emptied is not None:
        yield "", _EMPTIED, list(report.emptied.families)
        yield _same_outputs(report.emptied)
    yield "", _COSTS, _costs(report)
    yield from _notes(report)
    yield from metric_lines(report.metrics_before, report.metrics_after)
    if report.picture is not None:
        yield f"kept widths: {report.picture}"


def planned(report: Any) -> Iterator[Told]:
    """Tables and sentences about a planned step, in full, with all that cannot be cut."""
    title = f"step {report.step} of {report.steps}" if report.steps > 1 else ""
    if report.cut is not None:
        yield title, _FAMILY, [_family(family) for family in report.cut.families]
        frozen = [
            (x.parameter, x.dim, f"{x.indices} of {x.of}", x.op, x.module, x.reason)
            for x in report.cut.frozen
        ]
        yield "cannot be cut", _FROZEN, frozen
    if report.masks is not None:
        yield title or "masks", _MASKS, [_mask(row) for row in report.masks.tensors]
    if report.emptied is not None:
        yield title or "empty", _EMPTIED, list(report.emptied.families)
    yield "costs", _COSTS, _costs(report)
    if report.cut is not None:
        yield _comparison(report.cut)
    yield from _notes(report)
    if report.picture is not None:
        yield f"kept widths: {report.picture}"


def _shortened(title: str, columns: tuple[str, ...], rows: list[Any], kind: str) -> Iterator[Told]:
    yield title, columns, rows[:_MOST]
    if len(rows) > _MOST:
        yield f"... and {len(rows) - _MOST} {kind} more; --json has them all"


_FROZEN = ("parameter", "dim", "indices", "by", "in module", "why")


def _comparison(cut: Any) -> str:
    same = _equality(cut)
    if not cut.statistics:
        return same
    places = [f"{found.op} of {found.module}" if found.module else found.op for found in cut.statistics]
    return (
        f"{same}, statistics running over the kept channels in both: {some(places)} "
        "(--exact leaves such widths alone)"
    )


def _equality(cut: Any) -> str:
    """What the comparison of the cut with the masked network found, and of which outputs."""
    compared = [output for output in cut.outputs if not output.not_compared]
    missed = [f"{output.name} ({output.not_compared})" for output in cut.outputs if output.not_compared]
    left_out = f"; not compared: {some(missed)}" if missed else ""
    if not cut.outputs and cut.parameters_after < cut.parameters_before:
        return "not compared: the network puts out no tensor, so nothing shows that cut equals masked"
    if cut.outputs and not compared:
        return f"cut and masked have outputs of the same shapes{left_out}"
    whole = [output for output in compared if output.different is not None]
    counted = [f"{output.different:.2f} % of {output.elements:,} in {output.name} differ" for output in whole]
    if whole and len(whole) == len(compared):
        return f"cut compared with masked in whole numbers: {some(counted)}{left_out}"
    same = f"cut equals masked within {cut.error:.1e} ({cut.precision or 'nothing was cut'})"
    return f"{same}{', ' + some(counted) if counted else ''}{left_out}"


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
        last, measure = next(t for t in budget.curve if t.rate == budget.rate), measure_named(budget.metric)
        notes.append(
            f"largest rate within {budget.wanted}: {budget.rate:.4f} ({last.removed} units); "
            f"{budget.split} {measure.title} {budget.before:.4g} -> {measure.shown(last.value)} "
            f"(n={budget.n:,}, {budget.recalibrated} training images "
            f"{'varied' if budget.augmented else 'as they are'} recalibrate)"
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
