"""What one step of a pruning did, and the picture of kept widths that `--plot` puts beside its product."""

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
        steps: how many there are.
        cut: families, frozen places, and how far the cut is from the masked network; None where weights were
            masked, or empty channels cut.
        masks: what was masked; None where nothing was.
        emptied: what was cut because masks had left it empty.
        target: where the search for a target ended.
        budget: where the search for a budget ended.
        before: what the network costs that the command was given.
        after: what the network costs that came out.
        recalibrated: images from which batch-norm statistics were estimated again.
        finetuned: epochs of training.
        metrics_before: of the source.
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
    """What a step did, before anything is measured."""
    goals = changed.target, changed.budget
    return StepReport(step, options.steps, changed.cut, changed.masks, changed.emptied, *goals, before, after)


def pictured(report: StepReport, options: PruneOptions, context: Context, label: str) -> StepReport:
    """The report, with the picture that was asked for."""
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
    """Where the picture of one step goes; None where none was asked for.

    Raises:
        UsageError: the name that was given is no picture's.
    """
    if not options.plot and options.plot_file is None:
        return None
    if options.plot_file is None:
        return labelled(context.output, label).with_suffix(".widths.png")
    path = Path(options.plot_file)
    check_picture_suffix(path)
    return labelled(path, label)
