"""Thin a model: couple, score, select, verify, cut. The operation and the benchmarks call this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cctool.errors import PruningError
from cctool.graph.channels import ChannelGraph, Frozen, couple
from cctool.options.prune import PruneOptions
from cctool.pruning.scores import score_context
from cctool.pruning.selection import Selection, select
from cctool.pruning.surgery import CutPlan, apply_cut, plan_cut
from cctool.pruning.verify import BATCH_SIZES, Check, check, find_culprits


@dataclass(frozen=True)
class FamilyReport:
    """What became of one family.

    Attributes:
        name: the module that produces its channels first.
        units: units before.
        kept: units after.
        width: channels of that module in one unit.
        members: every (tensor, dim) that its units touch.
        parameters: parameters that its units touch, buffers apart; families overlap in these.
        note: why it lost nothing, "" if it did.
    """

    name: str
    units: int
    kept: int
    width: int
    members: tuple[tuple[str, int], ...]
    parameters: int
    note: str


@dataclass(frozen=True)
class PruneReport:
    """What a pruning did and did not do.

    Attributes:
        families: every family, in the order of the forward pass.
        frozen: parameter dims that cannot be cut, with the operation that froze them.
        parameters_before: number of parameters.
        parameters_after: number after the cut.
        error: largest difference of the cut from the masked network, relative to the largest output.
        precision: the dtype in which that was measured.
        batch_sizes: batch sizes at which all output shapes were compared.
        notes: what a user should know besides.
        statistics: calls whose statistics now run over the channels that are kept, so that the error is the
            difference from the masked network with such statistics; without any, it is exact as it stands.
    """

    families: tuple[FamilyReport, ...]
    frozen: tuple[Frozen, ...]
    parameters_before: int
    parameters_after: int
    error: float
    precision: str
    batch_sizes: tuple[int, ...]
    notes: tuple[str, ...]
    statistics: tuple[str, ...] = ()


@dataclass(frozen=True)
class ThinResult:
    """The plan that was (or would be) carried out, what it came from, and the report."""

    plan: CutPlan
    report: PruneReport
    graph: ChannelGraph
    selection: Selection


def plan_thinning(
    model: nn.Module, inputs: Sequence[Tensor], options: PruneOptions, *, step: int = 1, seed: int = 0
) -> ThinResult:
    """Plan and verify a pruning; the model stays as it is.

    Args:
        model: any module; widths, weights and flags are left alone.
        inputs: positional arguments of its forward, on its device; one sample suffices.
        options: what is asked for.
        step: number of the step, from 1.
        seed: for the methods that draw.

    Raises:
        UsageError: a pattern matches nothing.
        PruningError: there is nothing that can be cut.
    """
    graph = _coupled(model, inputs, options.exact)
    spared: dict[str, str] = {}
    notes: list[str] = []
    while True:
        selection = select(model, graph, options, score_context(model, seed), step, spared)
        plan = plan_cut(model, graph, selection)
        if not plan.tensors:
            _refuse_nothing(graph, selection, options, step)
            outcome = Check(0.0, 0.0, "", "")
            notes.append("nothing to remove: the rate is below one unit")
            break
        outcome = check(model, graph, selection, plan, inputs)
        if not outcome.failure:
            break
        culprits = find_culprits(model, graph, selection, inputs)
        if not culprits:
            raise PruningError(
                f"{outcome.failure}, and no family is to blame: does the network give other outputs at "
                "each call?"
            )
        spared |= {graph.families[n].name: reason for n, reason in culprits.items()}
        notes += [f"{graph.families[n].name} keeps its width: {reason}" for n, reason in culprits.items()]
    return ThinResult(plan, _report(model, graph, selection, plan, outcome, notes), graph, selection)


def _coupled(model: nn.Module, inputs: Sequence[Tensor], exact: bool) -> ChannelGraph:
    """Couple on one sample, which is fastest, or on all where the network does not take a single one."""
    try:
        return couple(model, [value[:1] if value.ndim else value for value in inputs], exact)
    # Code with a bare squeeze() may fail in any way on a batch of one; what is truly wrong fails again.
    except Exception:
        return couple(model, list(inputs), exact)


def thin(
    model: nn.Module, inputs: Sequence[Tensor], options: PruneOptions, *, step: int = 1, seed: int = 0
) -> ThinResult:
    """Prune a model in place; arguments and errors as `plan_thinning`."""
    result = plan_thinning(model, inputs, options, step=step, seed=seed)
    apply_cut(model, result.plan)
    return result


def _refuse_nothing(graph: ChannelGraph, selection: Selection, options: PruneOptions, step: int) -> None:
    free = [f for f in graph.families if f.name not in selection.spared]
    if free:
        return
    if selection.spared:
        (name, reason), *rest = selection.spared.items()
        others = f", and {len(rest)} more" if rest else ""
        raise PruningError(f"nothing can be cut with method {options.method.value}: {name}: {reason}{others}")
    reasons = list(dict.fromkeys(f"{f.op}: {f.reason}" for f in graph.frozen))
    raise PruningError(f"nothing can be cut: every channel is frozen ({'; '.join(reasons[:3])})")


def _report(
    model: nn.Module,
    graph: ChannelGraph,
    selection: Selection,
    plan: CutPlan,
    outcome: Check,
    notes: Sequence[str],
) -> PruneReport:
    parameters = dict(model.named_parameters())
    after = 0
    for name, parameter in parameters.items():
        shape = list(parameter.shape)
        for cut in plan.tensors.get(name, ()):
            shape[cut.dim] = cut.keep.numel()
        after += torch.Size(shape).numel()
    families = []
    for family, kept in zip(graph.families, selection.kept, strict=True):
        touched = sum(
            place.indices.numel()
            * parameters[place.tensor].numel()
            // parameters[place.tensor].shape[place.dim]
            for place in family.places
            if place.tensor in parameters
        )
        members = tuple((place.tensor, place.dim) for place in family.places)
        note = "" if not bool(kept.all()) else selection.spared.get(family.name, "")
        families.append(
            FamilyReport(family.name, family.units, int(kept.sum()), family.width, members, touched, note)
        )
    return PruneReport(
        families=tuple(families),
        frozen=graph.frozen,
        parameters_before=sum(p.numel() for p in parameters.values()),
        parameters_after=after,
        error=outcome.error,
        precision=outcome.precision,
        batch_sizes=BATCH_SIZES,
        notes=tuple(notes),
        statistics=tuple(
            f"{s.op} in {s.module or 'the model'}: {s.reason} ({', '.join(s.families)})" for s in outcome.statistics
        ),
    )
