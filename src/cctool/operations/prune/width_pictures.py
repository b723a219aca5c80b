"""The picture of kept widths that `cctool prune --plot` writes beside its product."""

from __future__ import annotations

from pathlib import Path

from cctool.analysis.widths import WidthBar, check_picture_suffix, write_widths
from cctool.operations.context import Context
from cctool.operations.pipeline import labelled
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.report import PruneReport

__all__ = ["picture_path", "write_picture"]


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


def write_picture(report: PruneReport, path: Path, context: Context) -> None:
    """Draw the widths before and after a cut."""
    widths = [
        WidthBar(family.name, family.units * family.width, family.kept * family.width, family.note)
        for family in report.families
    ]
    before, after = report.parameters_before, report.parameters_after
    title = (
        f"{path.name.split('.')[0]}: kept widths, parameters {before:,} -> {after:,} ({after / before:.1%})"
    )
    write_widths(widths, path, title, overwrite=context.force)
