"""Sections of docs/benchmarks.md on two checkouts side by side: their commands, and their tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def planted_faults(result: dict[str, Any], table: Draw) -> str:
    """How many faults the tests of each checkout caught, by package."""
    rows = result["rows"]
    checkouts = list(dict.fromkeys(row["checkout"] for row in rows))
    lines = []
    for package in sorted({row["package"] for row in rows}):
        own = [row for row in rows if row["package"] == package]
        caught = [sum(row["caught"] for row in own if row["checkout"] == commit) for commit in checkouts]
        lines.append((package, len({row["fault"] for row in own}), *caught))
    lines.append(("all", *(sum(int(line[column]) for line in lines) for column in range(1, len(lines[0])))))
    headers = ("package", "faults", *(f"caught at {commit}" for commit in checkouts))
    return (
        "## Faults that the tests notice\n\n"
        "One line of the code is made wrong at a time, and the tests that should notice are run. A fault is "
        "caught if one of them fails.\n\n" + table(headers, lines)
    )


SECTIONS: dict[str, Callable[[dict[str, Any], Draw], str]] = {
    "parity": parity,
    "planted_faults": planted_faults,
}
