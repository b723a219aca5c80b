"""Sections of docs/benchmarks.md on half the units of every family of whole collections of networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SECTIONS"]

Draw = Callable[[Sequence[str], Sequence[Sequence[object]]], str]
Row = dict[str, Any]

TOLERANCE = 1e-4
ALLOWANCE = 1e9  # bytes beside those that scale with the network: torch itself


def _ok(row: Row, tool: str) -> bool:
    return bool(row.get(tool, {}).get("status") == "ok")


def _equal(row: Row) -> bool:
    """Whether the cut network is the masked one by the benchmark's own oracle."""
    return _ok(row, "cctool") and row["cctool"]["oracle_error"] <= TOLERANCE


def _sound(row: Row) -> bool:
    """Whether the cut network runs forward and backward, survives its file and was cut again."""
    ours = row["cctool"]
    again = ours["second_parameters"] < ours["parameters_after"]
    return bool(ours["forward"] and ours["backward"] and ours["round_trip"] and again)


def _left(row: Row, tool: str) -> str:
    if not _ok(row, tool):
        return str(row.get(tool, {}).get("status", "not run")).partition(":")[0]
    found = row[tool]
    wrong = "" if found.get("forward", True) else ", wrong output"
    return f"{found['parameters_after'] / found['parameters']:.3f}{wrong}"


def _both(ours: Row, theirs: Row, key: str, digits: int) -> str:
    return f"{ours[key]:.{digits}f} / " + (f"{theirs[key]:.{digits}f}" if key in theirs else "-")


def _line(row: Row) -> tuple[object, ...]:
    ours, theirs = row["cctool"], row.get("torch_pruning", {})
    if ours["status"] != "ok":
        return (row["network"], _left(row, "cctool"), "", "", _left(row, "torch_pruning"), "", "", "")
    exact = f"{ours['oracle_error']:.0e}"
    if ours["statistics"]:
        exact += f", over {ours['statistics']} kept statistics"
    return (
        row["network"],
        _left(row, "cctool"),
        exact,
        _left(row, "exact") if ours["statistics"] else "",
        _left(row, "torch_pruning"),
        _both(ours, theirs, "removable", 4),
        _both(ours, theirs, "seconds", 2),
        f"{ours['peak_bytes'] / 1e9:.2f} / {ours['dense_bytes'] / 1e9:.2f}",
    )  # fmt: skip


def _summary(rows: Sequence[Row]) -> str:
    cut = [row for row in rows if _ok(row, "cctool")]
    plain = [row for row in cut if _equal(row) and not row["cctool"]["statistics"]]
    kept = [row for row in cut if _equal(row) and row["cctool"]["statistics"]]
    half = [row for row in cut if row["cctool"]["parameters_after"] < 0.5 * row["cctool"]["parameters"]]
    both = [row for row in cut if _ok(row, "torch_pruning")]
    behind = [r for r in both if r["cctool"]["removable"] < r["torch_pruning"].get("removable", 0) - 1e-6]
    strict = [row for row in rows if _ok(row, "exact")]
    plainly = [r for r in strict if r["exact"]["error"] <= TOLERANCE and not r["exact"]["statistics"]]
    seconds = [sum(row[tool]["seconds"] for row in both) for tool in ("cctool", "torch_pruning")]
    tried = [row for row in rows if "torch_pruning" in row]
    memory = max((r["cctool"]["peak_bytes"] - ALLOWANCE) / r["cctool"]["dense_bytes"] for r in cut)
    return (
        f"{len(cut)} of {len(rows)} networks are cut, {len(half)} below half of their parameters; "
        f"{sum(map(_sound, cut))} run forward and backward, come through a file unchanged and are cut again. "
        f"{len(plain) + len(kept)} equal the masked network within {TOLERANCE:g}: {len(plain)} as it stands, "
        f"{len(kept)} with layer norms, attention or other statistics over the channels that are kept; with "
        f"`--exact`, {len(plainly)} of {len(strict)} such ones equal the plainly masked network, too. "
        f"Torch-Pruning cuts {len(both)} of {len(tried)}; on these its removable fraction is larger in "
        f"{len(behind)} cases, and the time of trace and cut is {seconds[0]:.0f} s against {seconds[1]:.0f} s"
        + (f" (**{seconds[0] / seconds[1]:.2f}**)" if seconds[1] else "")
        + f". Peak memory is at most {max(memory, 0):.2f} times the dense bytes + 1 GB."
    )


def zoo(result: Row, table: Draw, title: str) -> str:
    """Half the units of every family, network by network."""
    rows = [row for row in result["rows"] if "cctool" in row]
    headers = (
        "network",
        "parameters left",
        "cut against masked",
        "left with `--exact`",
        "left by Torch-Pruning",
        "removable, ours / theirs",
        "CPU s, ours / theirs",
        "peak / dense GB",
    )
    return (
        f"## Pruning: {title}\n\n"
        "Half the units of every family by L2 norm, random weights; both tools with their defaults, one "
        "thread, the same limits of memory and time. Cut and masked networks are compared by an oracle of "
        "the benchmark's own; our seconds leave out the verification, which the peer does not have.\n\n"
        f"{_summary(rows)}\n\n" + table(headers, [_line(row) for row in rows])
    )


TITLES = {
    "prune_zoo": "all of torchvision's classifiers",
    "prune_zoo_segmentation": "torchvision's segmentation networks",
    "prune_zoo_timm": "families of timm",
}
SECTIONS: dict[str, Callable[[Row, Draw], str]] = {
    name: lambda result, table, title=title: zoo(result, table, title)  # type: ignore[misc]
    for name, title in TITLES.items()
}
