"""Section of docs/benchmarks.md on commands of two checkouts side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SECTIONS"]

Draw = Callable[[Sequence[str], Sequence[Sequence[object]]], str]


def parity(result: dict[str, Any], table: Draw) -> str:
    """What was run and what differed."""
    rows = [
        (
            row["before"]["commit"],
            row["after"]["commit"],
            row["commands"],
            row["files"],
            f"**{row['differing']}**",
            row["seconds"]["before"],
            row["seconds"]["after"],
        )
        for row in result["rows"]
    ]
    headers = (
        "before",
        "after",
        "commands",
        "files",
        "commands that differ",
        "CPU before, s",
        "CPU after, s",
    )
    return (
        "## Parity of two versions\n\n"
        "Every command and method on small networks and few digits, with each of two checkouts: exit status, "
        "stdout, all numbers but measured times, and every file that they wrote, checkpoints to the byte.\n\n"
        + table(headers, rows)
    )


SECTIONS: dict[str, Callable[[dict[str, Any], Draw], str]] = {"parity": parity}
