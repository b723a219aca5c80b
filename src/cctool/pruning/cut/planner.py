"""Prune a model's channels: couple, score, select, verify, cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from cctool.base.errors import PruningError
from cctool.checkpoint.edits.computed import why_not_parameters
from cctool.graph.channels import couple
from cctool.graph.execution import with_tensors
from cctool.graph.records import ChannelGraph
from cctool.options.prune.choices import AttentionUnit
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.report import ThinResult, report_of
from cctool.pruning.cut.surgery import CutPlan, apply_cut, plan_cut
from cctool.pruning.cut.verify import Check, check, find_culprits
from cctool.pruning.scores.evidence import Evidence
from cctool.pruning.scores.units import score_context, score_families
from cctool.pruning.select.order import (
    Candidates,
    Selection,
    arbitrary_choices,
    by_options,
    candidates,
    idle_patterns,
    select_counts,
)
from cctool.pruning.select.rates import family_rates, read_rates

Counts = Callable[[Candidates], Mapping[int, int]]
"""Returns the number of units that each candidate keeps, by number of the family, before rounding."""


class Planner:
    """Plans cuts of one network, whose channels are coupled and scored once. It does not change the network.

    Args:
        model: any module.
        inputs: positional arguments of its forward, on its device; one sample suffices.
        options: what is asked for.
        seed: for random methods.
        evidence: what was gathered on training images, for the methods that need it.

    Raises:
        UsageError: a pattern matches nothing, or a table of rates cannot be read.
        PruningError: a score is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Tensor],
        options: PruneOptions,
        *,
        seed: int = 0,
        evidence: Evidence | None = None,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.options = options
        heads = options.attention is AttentionUnit.HEADS
        self.graph = _coupled(model, inputs, exact=options.exact, heads=heads)
        self.scores = score_families(self.graph, options, score_context(model, seed, evidence))
        self.spared: dict[str, str] = {}
        self.notes = list(idle_patterns(self.graph, options))
        if options.exact and not _coupled(model, inputs, exact=False, heads=heads).statistics:
            self.notes.append("--exact changes nothing: no statistic runs over channels that could go")
        if heads and _same(self.graph, _coupled(model, inputs, exact=options.exact, heads=False)):
            self.notes.append("--attention heads changes nothing: no attention has heads that could go")
        self._computed = why_not_parameters(model)
        if self._computed:
            self.notes.append(f"channels stay: {self._computed}")
        self._rates: dict[int, float] | None = None
        if options.rates is not None:
            self._rates, notes = family_rates(self.graph, read_rates(options.rates), options.rates)
            self.notes += notes

    def candidates(self) -> Candidates:
        """Families that may lose units, without those that failed an earlier verification."""
        return candidates(self.model, self.graph, self.scores, self.options, self.spared)

    def by_options(self, step: int = 1) -> Counts:
        """Counts by rate, keep or the table of rates for one step."""
        return lambda chosen: by_options(self.graph, chosen, self.options, step, self._rates)

    def planned(self, chosen: Candidates, counts: Mapping[int, int]) -> tuple[Selection, CutPlan]:
        """The cut that keeps this many units of each candidate, not verified."""
        selection = select_counts(self.graph, chosen, counts, self.options)
        return selection, plan_cut(self.model, self.graph, selection)

    def verified(self, counts: Counts) -> ThinResult:
        """Plan a cut and compare the cut network with the masked one; families that fail keep their width.

        Args:
            counts: called again whenever a family has failed, with the remaining candidates.

        Raises:
            PruningError: there is nothing that can be cut.
        """
        while True:
            chosen = self.candidates()
            self._refuse_nothing(chosen)
            wanted = counts(chosen)
            selection, plan = self.planned(chosen, wanted)
            notes = list(self.notes)
            if not plan.tensors:
                outcome = Check(0.0, 0.0, "", "")
                fewer = any(kept < self.graph.families[number].units for number, kept in wanted.items())
                why = (
                    "--round-to or --min-channels keeps every width"
                    if fewer
                    else "the rate is below one unit"
                )
                notes.append(f"nothing to remove: {why}")
                break
            outcome = check(self.model, self.graph, selection, plan, self.inputs)
            if not outcome.failure:
                break
            self._spare(selection, outcome)
        notes += arbitrary_choices(self.graph, chosen, selection)
        report = report_of(self.model, self.graph, self.scores, selection, plan, outcome, notes)
        return ThinResult(plan, report, self.graph, selection)

    def _spare(self, selection: Selection, outcome: Check) -> None:
        culprits = find_culprits(self.model, self.graph, selection, self.inputs)
        if not culprits:
            raise PruningError(
                f"{outcome.failure}, and no family is to blame: does the network give other outputs at "
                "each call?"
            )
        for number, reason in culprits.items():
            name = self.graph.families[number].name
            self.spared[name] = reason
            self.notes.append(f"{name} keeps its width: {reason}")

    def _refuse_nothing(self, chosen: Candidates) -> None:
        if chosen.scores:
            return
        if chosen.spared:
            (name, reason), *rest = chosen.spared.items()
            others = f", and {len(rest)} more" if rest else ""
            method = self.options.method.value
            raise PruningError(f"nothing can be cut with method {method}: {name}: {reason}{others}")
        if self._computed:
            raise PruningError(f"nothing can be cut: {self._computed}")
        reasons = list(dict.fromkeys(f"{f.op}: {f.reason}" for f in self.graph.frozen))
        raise PruningError(f"nothing can be cut: every channel is frozen ({'; '.join(reasons[:3])})")


def plan_thinning(
    model: nn.Module,
    inputs: Sequence[Tensor],
    options: PruneOptions,
    *,
    step: int = 1,
    seed: int = 0,
    evidence: Evidence | None = None,
) -> ThinResult:
    """Plan and verify a pruning by rate, keep or rates, without changing the model.

    Arguments and errors as of `Planner` and `Planner.verified`; `step` counts from 1 and sets the rate.
    """
    planner = Planner(model, inputs, options, seed=seed, evidence=evidence)
    return planner.verified(planner.by_options(step))


def thin(
    model: nn.Module,
    inputs: Sequence[Tensor],
    options: PruneOptions,
    *,
    step: int = 1,
    seed: int = 0,
    evidence: Evidence | None = None,
) -> ThinResult:
    """Prune a model in place; arguments and errors as `plan_thinning`."""
    result = plan_thinning(model, inputs, options, step=step, seed=seed, evidence=evidence)
    apply_cut(model, result.plan)
    return result


def _coupled(model: nn.Module, inputs: Sequence[Tensor], *, exact: bool, heads: bool) -> ChannelGraph:
    """Couple on one sample, which is fastest, or on all if the network does not take a single one."""
    try:
        single = [
            with_tensors(value, lambda tensor: tensor[:1] if tensor.ndim else tensor) for value in inputs
        ]
        return couple(model, single, exact, heads)
    # Code with a bare squeeze() may fail in any way on a batch of one; other errors will recur.
    except Exception:
        return couple(model, list(inputs), exact, heads)


def _same(graph: ChannelGraph, other: ChannelGraph) -> bool:
    """Whether the same units could be cut."""
    ours, theirs = (
        [(family.name, family.units, family.width) for family in found.families] for found in (graph, other)
    )
    return ours == theirs
