"""The report of one step of a pruning, and `--plot`'s picture of kept widths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cctool.analysis.widths import WidthBar, check_picture_suffix, write_widths
from cctool.checkpoint.spec import Metrics
from cctool.operations.context import Context
from cctool.operations.pipeline import labelled
from cctool.operations.prune.costs import Costs
from cctool.operations.prune.goals import BudgetReport, TargetReport
from cctool.operations.prune.masks import EmptiedReport
from cctool.operations.prune.step import Changed
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.report import PruneReport
from cctool.pruning.masks.report import MaskReport


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: its number, from 1.
        steps: number of all steps.
        cut: families, frozen places, and how far the cut is from the masked network; None if weights were
            masked, or empty channels cut.
        masks: what was masked; None if nothing was.
        emptied: what was cut because masks had emptied it.
        target: result of the search for a target.
        budget: result of the search for a budget.
        before: costs of the command's input.
        after: costs of the product.
        recalibrated: number of images from which batch-norm statistics were estimated again.
        finetuned: epochs of fine-tuning.
        metrics_before: of the input.
        metrics_after: of the product.
        picture: path of the picture of widths.
    """

    step: int
    steps: int
    cut: PruneReport | None
    masks: MaskReport | None
    emptied: EmptiedReport | None
    target: TargetReport | None
    budget: BudgetReport | None
    before: Costs
    after: Costs
    recalibrated: int = 0
    finetuned: int = 0
    metrics_before: tuple[Metrics, ...] = ()
    metrics_after: tuple[Metrics, ...] = ()
    picture: str | None = None


def step_report(
    changed: Changed, step: int, options: PruneOptions, before: Costs, after: Costs
) -> StepReport:
    """The report of a step, without metrics."""
    goals = changed.target, changed.budget
    return StepReport(step, options.steps, changed.cut, changed.masks, changed.emptied, *goals, before, after)


def pictured(report: StepReport, options: PruneOptions, context: Context, label: str) -> StepReport:
    """Draw the picture of widths if the options ask for it; returns the report with its path."""
    path = picture_path(options, context, label)
    if path is None or report.cut is None:
        return report
    widths = [
        WidthBar(family.name, family.units * family.width, family.kept * family.width, family.note)
        for family in report.cut.families
    ]
    before, after = report.cut.parameters_before, report.cut.parameters_after
    share = f"parameters {before:,} -> {after:,} ({after / before:.1%})"
    title = f"{path.name.split('.')[0]}: kept widths, {share}"
    write_widths(widths, path, title, overwrite=context.force)
    return replace(report, picture=str(path))


def picture_path(options: PruneOptions, context: Context, label: str) -> Path | None:
    """Path of the picture of one step; None if the options ask for none.

    Raises:
        UsageError: the suffix of the given name is not that of a picture.
    """
    if not options.plot and options.plot_file is None:
        return None
    if options.plot_file is None:
        return labelled(context.output, label).with_suffix(".widths.png")
    path = Path(options.plot_file)
    check_picture_suffix(path)
    return labelled(path, label)
