"""What one step of a pruning does to a network: cut or mask channels, mask weights, cut empty channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.data import example
from cctool.operations.keep import events
from cctool.operations.prune.goals import BudgetReport, TargetReport, within_budget, within_target
from cctool.operations.prune.images import evidence_for
from cctool.operations.prune.masks import EmptiedReport, emptied_cut, mask_channels, mask_weights
from cctool.options.prune.choices import Granularity, StepMode
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.planner import Planner
from cctool.pruning.cut.report import PruneReport, ThinResult
from cctool.pruning.cut.surgery import CutPlan
from cctool.pruning.masks.choose import idle_patterns
from cctool.pruning.masks.report import MaskReport
from cctool.pruning.scores.weights import weight_saliency
from cctool.pruning.select.rates import read_rates


@dataclass(frozen=True)
class Changed:
    """A network that was cut or masked, with reports.

    Attributes:
        checkpoint: the result.
        plan: of the cut, for rewinding; None if only masks were set or empty channels cut.
        cut: report of a cut, or of the channels that were masked.
        masks: report of masks.
        emptied: report of a cut of empty channels.
        target: result of the search for a target.
        budget: result of the search for a budget.
        notes: for the history.
    """

    checkpoint: Checkpoint
    plan: CutPlan | None = None
    cut: PruneReport | None = None
    masks: MaskReport | None = None
    emptied: EmptiedReport | None = None
    target: TargetReport | None = None
    budget: BudgetReport | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Changer:
    """Carries out the steps of one command.

    Attributes:
        source: its data set; None without.
        options: of the command.
        context: of the command.
        metrics: of the input network, for a budget.
        target: result of the search for a target in the previous step.
    """

    source: DataSource | None
    options: PruneOptions
    context: Context
    metrics: tuple[Metrics, ...]
    target: TargetReport | None = None

    def changed(self, checkpoint: Checkpoint, step: int) -> Changed:
        """Cut or mask the network that a step (from 1) starts from, in place.

        Raises:
            PruningError: nothing can be cut, or a target or budget cannot be met.
            UsageError: a pattern or a table of rates names nothing of this network.
        """
        options = self.options
        if options.apply_masks:
            cut, emptied = emptied_cut(checkpoint, self.context, exclude=options.exclude, only=options.only)
            return Changed(cut, emptied=emptied, notes=emptied.notes)
        # Parts of weights keep all channels: nothing is coupled, planned or verified.
        if options.granularity is not Granularity.CHANNEL:
            return self._weights_masked(checkpoint, step)
        found, target, budget = self._planned(checkpoint, options, step)
        if options.mask:
            masked, report = mask_channels(checkpoint, found, options)
            done = Changed(masked, cut=found.report, masks=report, notes=found.report.notes)
        else:
            done = self._cut(checkpoint, found)
        reached = (*_goal_notes(target, budget), *self._table_notes())
        return replace(done, target=target, budget=budget, notes=(*reached, *done.notes))

    def last_step(self, checkpoint: Checkpoint) -> ThinResult:
        """Plan what all steps together will remove from a network, without changing it."""
        at_once = replace(self.options, step_mode=StepMode.INDEPENDENT)
        return self._planned(checkpoint, at_once, self.options.steps)[0]

    def _planned(
        self, checkpoint: Checkpoint, options: PruneOptions, step: int
    ) -> tuple[ThinResult, TargetReport | None, BudgetReport | None]:
        context, plain = self.context, events.plain_checkpoint(checkpoint)
        planner = Planner(
            plain.model,
            example(plain),
            options,
            seed=context.runtime.seed,
            evidence=evidence_for(plain, self.source, options, context),
        )
        planner.spared |= events.fixed_widths(planner, checkpoint)
        if options.target is not None:
            found, target = within_target(
                planner, options.target, self.target, checkpoint, options, context, step
            )
            # Later steps of a progressive pruning start from less; the target is relative to the input.
            self.target = target
            return found, target, None
        if options.max_drop is not None and self.source is not None:
            found, budget = within_budget(planner, checkpoint, self.source, self.metrics, options, context)
            return found, None, budget
        return planner.verified(planner.by_options(step)), None, None

    def _cut(self, checkpoint: Checkpoint, found: ThinResult) -> Changed:
        """Carry out a plan, and warn of what could not be cut along."""
        cut, remarks = events.cut(checkpoint, found.plan, self.context)
        for remark in remarks:
            self.context.reporter.warn(remark)
        notes = (*found.report.notes, *_frozen_notes(found.report), *remarks)
        return Changed(cut, found.plan, found.report, notes=notes)

    def _weights_masked(self, checkpoint: Checkpoint, step: int) -> Changed:
        options, context = self.options, self.context
        evidence = evidence_for(checkpoint, self.source, options, context)
        generator = torch.Generator().manual_seed(context.runtime.seed)
        saliency = partial(weight_saliency, options.method, evidence=evidence, generator=generator)
        rates = None if options.rates is None else read_rates(options.rates)
        masked, report = mask_weights(checkpoint, options, saliency, step=step, rates=rates)
        report = replace(report, notes=(*idle_patterns(checkpoint.model, options), *report.notes))
        return Changed(masked, masks=report, notes=(*self._table_notes(), *report.notes))

    def _table_notes(self) -> tuple[str, ...]:
        """The table of rates as a note, because its file may change."""
        if self.options.rates is None:
            return ()
        rows = (f"{name} {rate:g}" for name, rate in read_rates(self.options.rates).items())
        return (f"rates: {', '.join(rows)}",)


def _goal_notes(target: TargetReport | None, budget: BudgetReport | None) -> tuple[str, ...]:
    """Results of a search as notes; otherwise the history has only the options."""
    notes = []
    if target is not None:
        notes.append(f"target {target.quantity} {target.limit:,.0f}: reached {target.reached:,.0f}")
    if budget is not None:
        notes.append(f"largest rate within {budget.wanted} of {budget.metric}: {budget.rate:g}")
    return tuple(notes)


def _frozen_notes(report: PruneReport) -> tuple[str, ...]:
    inner = [frozen for frozen in report.frozen if frozen.op not in ("input", "output")]
    reasons = sorted({f"{frozen.op}: {frozen.reason}" for frozen in inner})
    return tuple(f"kept their width because of {reason}" for reason in reasons)
