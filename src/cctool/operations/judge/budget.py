"""``--max-drop``: how much of the main metric may be lost, for searches that measure on validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cctool.base.errors import TrainingError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics
from cctool.operations.context import Context
from cctool.operations.judge.task import judge_of
from cctool.options.target import Drop
from cctool.tasks.base import Measure

_POINTS = "%"


@dataclass(frozen=True)
class BudgetScale:
    """A budget of the main metric.

    Attributes:
        measure: the main metric.
        budget: as it was asked for.
        dense: what was measured on the validation split before.
    """

    measure: Measure
    budget: Drop
    dense: Metrics

    @property
    def before(self) -> float:
        """The metric before."""
        return self.dense.values[self.measure.name]

    def value(self, metrics: Metrics) -> float:
        """The metric of a trial; one that is no number counts as the worst there is."""
        return metrics.values.get(self.measure.name, -math.inf if self.measure.rising else math.inf)

    @property
    def allowed(self) -> float:
        """What may be lost, as `lost` counts it."""
        return float(self.budget)

    def lost(self, value: float) -> float:
        """What is lost at a value: in the metric's unit, or as a fraction of the value before."""
        worse = self.before - value if self.measure.rising else value - self.before
        if not self.budget.relative:
            return worse
        return worse / abs(self.before) if self.before else (0.0 if worse <= 0 else float("inf"))

    @property
    def digits(self) -> str:
        """Format of the metric's values."""
        return ".2f" if self.measure.unit else ".4g"

    @property
    def falls(self) -> str:
        """What the metric does as the network gets worse."""
        return "falls" if self.measure.rising else "rises"

    def shown(self, drop: float) -> str:
        """A drop with its unit."""
        if self.budget.relative:
            return f"{100 * drop:.2f} %"
        return f"{drop:.2f} {'points' if self.measure.unit == _POINTS else self.measure.unit}".rstrip()

    def sentence(self, drop: float) -> str:
        """What a drop means for the metric."""
        return f"validation {self.measure.title} {self.falls} by {self.shown(drop)}"

    @property
    def wanted(self) -> str:
        """The budget with its unit, as in "1.5 points"."""
        if self.budget.relative:
            return str(self.budget)
        return self.shown(self.allowed).replace(f"{self.allowed:.2f}", f"{self.allowed:g}")

    def part(self, drop: float) -> str:
        """A drop as a part of the budget."""
        return f"{100 * drop if self.budget.relative else drop:.2f} of {self.wanted}"

    def change(self, drop: float) -> str:
        """A drop as a signed change of the metric's value."""
        # 0 - drop, because -drop would print a drop of 0 as -0.00.
        change = 0 - drop if self.measure.rising else drop
        return f"{'+' if change >= 0 else '-'}{self.shown(abs(change))}"


def budget_scale(
    checkpoint: Checkpoint, budget: float, before: Sequence[Metrics], context: Context
) -> BudgetScale:
    """The budget of a search.

    Args:
        checkpoint: the network before.
        budget: `Drop`, or a number in the metric's own unit.
        before: its metrics.
        context: of the command.

    Raises:
        TrainingError: if nothing says how the network is judged; if the main metric is a loss, whose unit
            means nothing, and the budget is not relative; or if the budget is all of a percentage or a part
            of 0.
        UsageError: if nothing was measured on the validation split.
    """
    measure = judge_of(checkpoint, context).require_measure("--max-drop")
    wanted = budget if isinstance(budget, Drop) else Drop(budget)
    dense = next((found for found in before if found.split == "validation"), None)
    if dense is None or measure.name not in dense.values:
        raise UsageError(
            f"--max-drop searches on the validation split by {measure.title}: the data has none "
            "(--val-data names one), or the outputs have no such metric"
        )
    if not wanted.relative and not measure.rising and not measure.unit:
        raise TrainingError(
            f"--max-drop {wanted}: {measure.title} has no unit to count in; give a part of its value, as in "
            "--max-drop 2%"
        )
    # Percentages may rise by any part of their value, but lose no more than all of it.
    if measure.rising and measure.unit == _POINTS and wanted >= (1 if wanted.relative else 100):
        most = "100%" if wanted.relative else "100 points"
        raise TrainingError(
            f"--max-drop {wanted}: that is all of {measure.title}; less than {most} is allowed"
        )
    scale = BudgetScale(measure, wanted, dense)
    if wanted.relative and measure.rising and not scale.before:
        raise TrainingError(f"--max-drop {wanted}: {measure.title} is 0, of which no part can be lost")
    return scale
