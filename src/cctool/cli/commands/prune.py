"""`cctool prune`, and its messages about a plan and a product."""

from __future__ import annotations

from typing import Any

from cctool.cli.console import Console
from cctool.cli.frame import Invocation
from cctool.options.prune.choices import Scope


def prune(call: Invocation) -> None:
    """Remove channels physically, or mask weights; what is left computes what the masked network would.

    Example: cctool prune student.pt --method slimming --rate 0.5

    Example: cctool prune student.pt --method l2 --target macs=0.5 --finetune-epochs 10
    """
    options = call.options
    if options.normalize is not None and options.effective_scope is Scope.LOCAL:
        call.console.warn(
            "--normalize changes no choice where units compete in their family; --scope global compares them"
        )
    if options.dry_run:
        from cctool.operations.prune.run import plan

        _print_plan(call.console, call.read(carry_out=plan))
    else:
        call.write(_told)


def _print_plan(console: Console, reports: Any) -> None:
    """Print the plan of a dry run; its tables are the command's product."""
    from cctool.operations.prune.shown import planned

    for report in reports:
        for item in planned(report):
            if isinstance(item, str):
                console.note(item)
            else:
                console.table(*item)
    console.document(reports)


def _told(report: Any) -> Any:
    from cctool.operations.prune.shown import told

    return told(report)
