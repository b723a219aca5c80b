"""How much a pruning removes where a target or a budget says so: the searches and what they saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cctool.base.errors import PruningError, UsageError
from cctool.base.networks import copied
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.data import measured
from cctool.operations.keep.events import cut_model
from cctool.operations.prune.costs import counter
from cctool.operations.train.batch_norm import recalibrated
from cctool.options.prune.choices import Images, StepMode
from cctool.options.prune.options import PruneOptions
from cctool.options.target import Quantity, Target
from cctool.pruning.cut.planner import Planner
from cctool.pruning.cut.report import ThinResult
from cctool.pruning.cut.surgery import CutPlan
from cctool.pruning.select.order import Candidates, by_options, grain_of, order
from cctool.pruning.select.targets import TriedCut, fewest_removed

_GRID = 8
_FINEST = 1 / 512
RECALIBRATION = 1024
"""Images from which the search estimates batch-norm statistics again, unless ``--recalibrate`` says more."""


@dataclass(frozen=True)
class TargetReport:
    """Where the search for a target ended.

    Attributes:
        quantity: what was limited.
        limit: what it may cost: multiply-accumulates, parameters, bytes or microseconds.
        before: what the network cost that this command was given.
        reached: what it costs now; at most the limit.
        above: what it would cost with one unit less removed, or one grain of ``--round-to``; None where
            nothing had to go.
        trials: all networks that were counted, in order.
    """

    quantity: str
    limit: float
    before: float
    reached: float
    above: float | None
    trials: tuple[TriedCut, ...]


@dataclass(frozen=True)
class BudgetTrial:
    """One network that the search for a budget looked at.

    Attributes:
        rate: fraction of the removable units that went.
        removed: units that went.
        value: its metric on the validation split, after batch-norm statistics were estimated again.
        drop: points lost.
    """

    rate: float
    removed: int
    value: float
    drop: float


@dataclass(frozen=True)
class BudgetReport:
    """Where the search for a budget ended.

    Attributes:
        metric: what was measured.
        split: on which split.
        n: on how many samples.
        budget: points that may be lost.
        before: the metric of the network that came in.
        rate: the largest rate that was found within the budget.
        recalibrated: images from which statistics were estimated again, for each trial and the product.
        augmented: whether these images were varied as for training.
        curve: all trials by rate.
    """

    metric: str
    split: str
    n: int
    budget: float
    before: float
    rate: float
    recalibrated: int
    augmented: bool
    curve: tuple[BudgetTrial, ...]


def limit_of(target: Target, before: float, options: PruneOptions, step: int) -> float:
    """What the network may cost after a step: the kept fraction shrinks as ``--growth`` says.

    Args:
        target: of the last step.
        before: what the network costs that the command was given.
        options: steps and growth.
        step: from 1.
    """
    fraction = target.value if target.relative else target.value / before
    if fraction >= 1:
        return before
    return before * (1 - options.growth.at(1 - fraction, step, options.steps))


def within_target(
    planner: Planner,
    target: Target,
    earlier: TargetReport | None,
    checkpoint: Checkpoint,
    options: PruneOptions,
    context: Context,
    step: int,
) -> tuple[ThinResult, TargetReport]:
    """Plan the cut that removes the fewest units such that the network costs no more than its target.

    Args:
        planner: of the network that this step starts from.
        target: what is limited.
        earlier: where the step before ended; None at the first.
        checkpoint: that this step starts from.
        options: steps, growth, scope.
        context: reporter and encodings.
        step: number of the step, from 1.

    Raises:
        PruningError: the target cannot be reached.
    """
    count = counter(target.quantity, checkpoint, options, context)
    found: list[TargetReport] = []

    def counts(chosen: Candidates) -> Mapping[int, int]:
        ordered = order(chosen, options.effective_scope)

        def cost(kept: Mapping[int, int]) -> float:
            return count(planner.planned(chosen, kept)[1])

        start = _start(cost(ordered.counts(0)), earlier, options)
        limit = limit_of(target, start, options, step)
        unit = " us" if target.quantity is Quantity.LATENCY else ""
        context.reporter.note(f"searching: {target.quantity} at most {limit:,.0f} of {start:,.0f}{unit}")
        grains = {number: grain_of(planner.graph.families[number], options) for number in chosen.scores}
        reached = fewest_removed(ordered, cost, limit, f"--target {target}", grains)
        above, costs = reached.above.cost if reached.above else None, reached.chosen.cost
        found.append(TargetReport(target.quantity.value, limit, start, costs, above, reached.trials))
        return reached.counts

    result = planner.verified(counts)
    return result, found[-1]


def _start(present: float, earlier: TargetReport | None, options: PruneOptions) -> float:
    """What the network that the command was given costs, seen from a later step.

    Counts stand. A time is of its moment, so that it is told from the present network's: the same one where
    steps are independent, else the one that the step before left a share of.
    """
    if earlier is None:
        return present
    if earlier.quantity != Quantity.LATENCY.value:
        return earlier.before
    progressive = options.step_mode is StepMode.PROGRESSIVE
    return present * earlier.before / earlier.reached if progressive else present


def within_budget(
    planner: Planner,
    checkpoint: Checkpoint,
    source: DataSource,
    before: tuple[Metrics, ...],
    options: PruneOptions,
    context: Context,
) -> tuple[ThinResult, BudgetReport]:
    """Plan the cut of the largest rate whose loss on the validation split stays within ``--max-drop``.

    Batch-norm statistics are estimated again for every trial, from training images as they are or varied as
    for training, whichever keeps more of the dense network's accuracy: padded crops have other statistics.

    A grid of rates is measured first, because accuracy need not fall evenly; then the gap between the largest
    rate within the budget and the next one of the grid is halved until it is a unit or a 512th wide.

    Args:
        planner: of the checkpoint's network.
        checkpoint: it stays as it is.
        source: its training images recalibrate, its validation images judge.
        before: metrics of the network that came in.
        options: budget, scope, method.
        context: reporter, device.

    Raises:
        UsageError: the data has no validation split, or the outputs are no logits.
        PruningError: not even one unit can go.
    """
    budget = options.max_drop or 0.0
    dense = next((found for found in before if found.split == "validation"), None)
    if dense is None or "top1" not in dense.values:
        raise UsageError(
            "--max-drop searches on the validation split by top-1: the data has none (--val-data names one), "
            "or the outputs are no logits"
        )
    if not checkpoint.history and options.data.val_data is None:
        context.reporter.warn(
            f"this network was trained elsewhere, perhaps on the very images of {source.reference}'s "
            "validation split: --val-data names images that it has not seen"
        )
    search = _BudgetSearch(planner, checkpoint, source, dense, options, context)
    # Families that a trial finds guilty are spared before anything is judged.
    planner.verified(lambda chosen: search.counts(chosen, 1 - 1 / _GRID))
    search.choose_images()
    rate = search.largest(budget)
    if not search.removed(rate):
        least = min(search.trials.values(), key=lambda trial: trial.rate)
        raise PruningError(
            f"--max-drop {budget:g}: no unit can go within this budget; at rate {least.rate:.3f} validation "
            f"top-1 falls by {least.drop:.2f} points (n={dense.n:,})"
        )
    result = planner.verified(lambda chosen: search.counts(chosen, rate))
    curve = tuple(sorted(search.trials.values(), key=lambda trial: trial.rate))
    report = BudgetReport(
        metric="top1",
        split="validation",
        n=dense.n,
        budget=budget,
        before=dense.values["top1"],
        rate=rate,
        recalibrated=search.recalibrated,
        augmented=search.augmented,
        curve=curve,
    )
    return result, report


@dataclass
class _BudgetSearch:
    """Measures the network at one rate after the other, each rate once."""

    planner: Planner
    checkpoint: Checkpoint
    source: DataSource
    dense: Metrics
    options: PruneOptions
    context: Context
    recalibrated: int = 0
    augmented: bool = False
    trials: dict[float, BudgetTrial] = field(default_factory=dict)

    def counts(self, chosen: Candidates, rate: float) -> Mapping[int, int]:
        options = replace(self.options, rate=rate, steps=1, step_mode=StepMode.INDEPENDENT)
        return by_options(self.planner.graph, chosen, options)

    def removed(self, rate: float) -> int:
        chosen = self.planner.candidates()
        return self.planner.planned(chosen, self.counts(chosen, rate))[0].removed_units()

    def choose_images(self) -> None:
        """Take the kind of images that was asked for, or whose statistics suit the dense network better."""
        if self.options.recalibrate_images is not None:
            self.augmented = self.options.recalibrate_images is Images.AUGMENTED
            return
        kept = {augmented: self._measured(None, augmented) for augmented in (False, True)}
        if self.recalibrated:
            self.augmented = kept[True] > kept[False]
            kind = "varied as for training" if self.augmented else "as they are"
            self.context.reporter.note(
                f"batch-norm statistics from {self.recalibrated:,} training images {kind}: the dense network "
                f"keeps {kept[self.augmented]:.2f} of {self.dense.values['top1']:.2f} with them, "
                f"{kept[not self.augmented]:.2f} with the other kind"
            )

    def _measured(self, plan: CutPlan | None, augmented: bool) -> float:
        """Top-1 on the validation split after a cut, with statistics estimated again."""
        trial = replace(self.checkpoint, model=copied(self.checkpoint.model))
        if plan is not None:
            cut_model(trial.model, plan)
        source, data, images = self.source, self.options.data, self.options.recalibrate or RECALIBRATION
        self.recalibrated = recalibrated(trial, source, images, data, self.context, augmented=augmented)
        return measured(trial, source, data, self.context, split="validation").values["top1"]

    def look(self, rate: float) -> BudgetTrial:
        if rate not in self.trials:
            chosen = self.planner.candidates()
            selection, plan = self.planner.planned(chosen, self.counts(chosen, rate))
            value = self._measured(plan, self.augmented)
            drop = self.dense.values["top1"] - value
            self.trials[rate] = BudgetTrial(rate, selection.removed_units(), value, drop)
            self.context.reporter.note(
                f"rate {rate:.4f}: validation top-1 {value:.2f} ({0 - drop:+.2f} points, n={self.dense.n:,})"
            )
        return self.trials[rate]

    def largest(self, budget: float) -> float:
        """Find the largest rate whose drop is within the budget; 0 if there is none."""
        grid = [number / _GRID for number in range(1, _GRID)]
        measured_grid = [self.look(rate) for rate in self.context.reporter.progress(grid, "measuring rates")]
        within = [trial.rate for trial in measured_grid if trial.drop <= budget]
        low = max(within, default=0.0)
        high = min(low + 1 / _GRID, 1 - _FINEST)
        while high - low > _FINEST and self.removed(high) - self.removed(low) > 1:
            middle = (low + high) / 2
            if self.look(middle).drop <= budget:
                low = middle
            else:
                high = middle
        return low
