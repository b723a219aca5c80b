"""Section of docs/benchmarks.md on verdicts of exports: true files refused, faulty files accepted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SECTIONS"]

Draw = Callable[[Sequence[str], Sequence[Sequence[object]]], str]

_FAULTS = ("swapped", "zero point", "bias", "activation")


def export_verdicts(result: dict[str, Any], table: Draw) -> str:
    """Both error rates, by what was done to the networks, and by fault."""
    states: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        name = f"{row['state']}, {'trained' if row['steps'] else 'random'}"
        states.setdefault(name, []).append(row)
    shown = []
    for name, rows in [*states.items(), ("**all**", result["rows"])]:
        files = sum(row["seeds"] for row in rows)
        counts: Counter[str] = sum((Counter(row[fault]) for row in rows for fault in _FAULTS), Counter())
        shown.append(
            (
                name,
                len(rows),
                f"{files - sum(row['accepted'] for row in rows)} of {files}",
                f"{counts['accepted']} of {counts['accepted'] + counts['refused'] + counts['differs']}",
                counts["differs"],
                counts["none"],
                f"{max(row['closest'] for row in rows):.2f}",
            )
        )
    kinds = []
    for fault in _FAULTS:
        counts = sum((Counter(row[fault]) for row in result["rows"]), Counter())
        kinds.append((fault, *(counts[what] for what in ("refused", "accepted", "differs", "none"))))
    first = ("networks", "n", "true refused", "faulty accepted", "differs", "no fault", "closest")
    return (
        "## Verdicts of exports\n\n"
        "40 small networks (classifiers, depthwise, residual, U-Net, autoencoder, attention, two heads, "
        "gates; outputs nearly constant, or of 1e-7), each exported once; its file, and copies with a fault "
        f"each, are judged as `cctool export` does, every file at {result['rows'][0]['seeds']} seeds: "
        "refused at all of them, accepted at all, or not the same at all (differs). A change that moves no "
        "channel of the outputs by more than the limit stated for the true file is no fault. "
        "Closest: the largest error of a true file, over its limit.\n\n"
        + table(first, shown)
        + "\n\n"
        + table(("fault", "refused", "accepted", "differs", "no fault"), kinds)
    )


SECTIONS: dict[str, Callable[[dict[str, Any], Draw], str]] = {"export_verdicts": export_verdicts}
