"""How much a pruning removes for a target (a cost to reach) or a budget (a drop of accuracy to keep)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cctool.base.errors import PruningError
from cctool.base.networks import copied
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.data import measured
from cctool.operations.judge.budget import BudgetScale, budget_scale
from cctool.operations.keep.events import cut_model
from cctool.operations.prune.costs import counter
from cctool.operations.train.batch_norm import recalibrated
from cctool.options.prune.choices import Images, StepMode
from cctool.options.prune.options import PruneOptions
from cctool.options.target import Drop, Quantity, Target
from cctool.pruning.cut.planner import Planner
from cctool.pruning.cut.report import ThinResult
from cctool.pruning.cut.surgery import CutPlan
from cctool.pruning.select.order import Candidates, by_options, grain_of, order
from cctool.pruning.select.targets import TriedCut, fewest_removed

# The search for a budget tries the rates 1/8, 2/8, ..., and then bisects down to this difference.
_GRID = 8
_FINEST = 1 / 512
RECALIBRATION = 1024
"""Images from which the search estimates batch-norm statistics, unless ``--recalibrate`` gives a number."""


@dataclass(frozen=True)
class TargetReport:
    """The result of the search for a target.

    Attributes:
        quantity: the cost that was limited.
        limit: in multiply-accumulates, parameters, bytes or microseconds.
        before: cost of the command's input.
        reached: cost of the product; at most the limit.
        above: cost if one unit less were removed, or one grain of ``--round-to``; None if nothing had to be
            removed.
        trials: all cuts that were counted, in order.
    """

    quantity: str
    limit: float
    before: float
    reached: float
    above: float | None
    trials: tuple[TriedCut, ...]


@dataclass(frozen=True)
class BudgetTrial:
    """One network that the search for a budget measured.

    Attributes:
        rate: fraction of the removable units that were removed.
        removed: number of removed units.
        value: metric on the validation split, after batch-norm statistics were estimated again.
        drop: what is lost, in the metric's unit (percentage points for percentages), or relative to the value
            before if the budget is.
    """

    rate: float
    removed: int
    value: float
    drop: float


@dataclass(frozen=True)
class BudgetReport:
    """The result of the search for a budget.

    Attributes:
        metric: that was measured.
        split: that it was measured on.
        n: number of samples.
        budget: what may be lost, in the unit of ``drop``.
        wanted: the same with its unit, as in "1.5 points" and "2%".
        relative: whether budget and drops are fractions of the value before.
        before: metric of the input network.
        rate: the largest rate found within the budget.
        recalibrated: number of images for batch-norm statistics, for each trial and the product.
        augmented: whether these images were augmented.
        curve: all trials in the order of rates.
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
    relative: bool = False
    wanted: str = ""


def limit_of(target: Target, before: float, options: PruneOptions, step: int) -> float:
    """What the network may cost after a step (from 1): ``--growth`` divides the way to the target into steps.

    ``before`` is the cost of the command's input.
    """
    fraction = target.value if target.relative else target.value / before
    # The network costs less already.
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

    ``planner`` and ``checkpoint`` are of the network that this step (from 1) starts from; ``earlier`` is the
    report of the previous step.

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
    # Verification may plan again without families that it cannot cut exactly: the last report counts.
    return result, found[-1]


def _start(present: float, earlier: TargetReport | None, options: PruneOptions) -> float:
    """Cost of the command's input, as needed at a later step.

    Counts do not change. Times do, with the machine's speed: the input's is inferred from the ``present``
    time of this step's network, which is the input if steps are independent, else a known share of it.
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

    Batch-norm statistics are estimated again for every trial, from training images that are augmented or not,
    whichever keeps more of the dense network's accuracy: padded crops have other statistics.

    A grid of rates is measured first, because accuracy need not fall evenly; then the interval between the
    largest rate within the budget and the next one of the grid is halved until it is one unit or 1/512 wide.

    ``planner`` is of the checkpoint's network, which is not changed; ``before`` are its metrics.

    Raises:
        UsageError: the data has no validation split, or the metric has no unit and the budget is absolute.
        PruningError: not even one unit can be removed.
    """
    scale = budget_scale(checkpoint, options.max_drop or Drop(0.0), before, context)
    dense = scale.dense
    if not checkpoint.history and options.data.val_data is None:
        context.reporter.warn(
            f"this network was trained elsewhere, perhaps on the very images of {source.reference}'s "
            "validation split: --val-data names images that it has not seen"
        )
    search = _BudgetSearch(planner, checkpoint, source, scale, options, context)
    # Verifying a large cut first finds families that cannot be cut exactly, before any trial is measured.
    planner.verified(lambda chosen: search.counts(chosen, 1 - 1 / _GRID))
    search.choose_images()
    rate = search.largest(scale.allowed)
    if not search.removed(rate):
        least = min(search.trials.values(), key=lambda trial: trial.rate)
        raise PruningError(
            f"--max-drop {scale.budget}: no unit can go within this budget; at rate {least.rate:.3f} "
            f"{scale.sentence(least.drop)} (n={dense.n:,})"
        )
    result = planner.verified(lambda chosen: search.counts(chosen, rate))
    curve = tuple(sorted(search.trials.values(), key=lambda trial: trial.rate))
    report = BudgetReport(
        metric=scale.measure.name,
        split="validation",
        n=dense.n,
        budget=scale.allowed,
        before=scale.before,
        rate=rate,
        recalibrated=search.recalibrated,
        augmented=search.augmented,
        curve=curve,
        relative=scale.budget.relative,
        wanted=scale.wanted,
    )
    return result, report


@dataclass
class _BudgetSearch:
    """Measures the network at different rates, each rate once."""

    planner: Planner
    checkpoint: Checkpoint
    source: DataSource
    scale: BudgetScale
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
        """Choose augmented images or not: as the options say, or as suits the dense network better."""
        if self.options.recalibrate_images is not None:
            self.augmented = self.options.recalibrate_images is Images.AUGMENTED
            return
        kept = {augmented: self._measured(None, augmented) for augmented in (False, True)}
        if self.recalibrated:
            self.augmented = self.scale.lost(kept[True]) < self.scale.lost(kept[False])
            kind = "varied as for training" if self.augmented else "as they are"
            verb, of = ("keeps", "of") if self.scale.measure.rising else ("has", "instead of")
            digits = self.scale.digits
            self.context.reporter.note(
                f"batch-norm statistics from {self.recalibrated:,} training images {kind}: the dense network "
                f"{verb} {kept[self.augmented]:{digits}} {of} {self.scale.before:{digits}} with them, "
                f"{kept[not self.augmented]:{digits}} with the other kind"
            )

    def _measured(self, plan: CutPlan | None, augmented: bool) -> float:
        """The main metric on the validation split after a cut, with batch-norm statistics estimated again."""
        trial = replace(self.checkpoint, model=copied(self.checkpoint.model))
        if plan is not None:
            cut_model(trial.model, plan)
        source, data, images = self.source, self.options.data, self.options.recalibrate or RECALIBRATION
        self.recalibrated = recalibrated(trial, source, images, data, self.context, augmented=augmented)
        return self.scale.value(measured(trial, source, data, self.context, split="validation"))

    def look(self, rate: float) -> BudgetTrial:
        if rate not in self.trials:
            chosen = self.planner.candidates()
            selection, plan = self.planner.planned(chosen, self.counts(chosen, rate))
            value = self._measured(plan, self.augmented)
            drop = self.scale.lost(value)
            self.trials[rate] = BudgetTrial(rate, selection.removed_units(), value, drop)
            self.context.reporter.note(
                f"rate {rate:.4f}: validation {self.scale.measure.title} {value:{self.scale.digits}} "
                f"({self.scale.change(drop)}, n={self.scale.dense.n:,})"
            )
        return self.trials[rate]

    def largest(self, budget: float) -> float:
        """Find the largest rate whose drop is within the budget; 0 if there is none."""
        grid = [number / _GRID for number in range(1, _GRID)]
        measured_grid = [self.look(rate) for rate in self.context.reporter.progress(grid, "measuring rates")]
        within = [trial.rate for trial in measured_grid if trial.drop <= budget]
        low = max(within, default=0.0)
        # A rate of 1 would leave nothing of a family.
        high = min(low + 1 / _GRID, 1 - _FINEST)
        while high - low > _FINEST and self.removed(high) - self.removed(low) > 1:
            middle = (low + high) / 2
            if self.look(middle).drop <= budget:
                low = middle
            else:
                high = middle
        return low
