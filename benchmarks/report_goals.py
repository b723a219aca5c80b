"""Sections of docs/benchmarks.md on pruning to a target, to a budget, and on what it does to latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SECTIONS"]

Draw = Callable[[Sequence[str], Sequence[Sequence[object]]], str]


def prune_targets(result: dict[str, Any], table: Draw) -> str:
    """How near a MAC target is met."""
    rows = [
        (
            row["network"],
            row["scope"],
            row["round_to"],
            f"{row['macs']:,}",
            f"{row['share']:.2%}",
            f"**{row['error']:.2%}**",
            row["seconds"],
        )
        for row in result["rows"]
    ]
    headers = ("network", "scope", "multiples of", "MACs", "reached", "off the target", "command, s")
    return (
        "## Pruning to a target\n\n"
        "`cctool prune --method l2 --target macs=0.5`; the MACs of the written file, counted anew. "
        "The target is never exceeded.\n\n" + table(headers, rows)
    )


def prune_budget(result: dict[str, Any], table: Draw) -> str:
    """The largest rate within a budget of accuracy."""
    rows = []
    for row in result["rows"]:
        (v0, n), (v1, _), (t0, m), (t1, _) = (
            row[key] for key in ("validation_before", "validation_after", "test_before", "test_after")
        )
        beyond = ", ".join(f"{rate}: {drop:.2f}" for rate, drop in row["drop_at_larger_rates"].items())
        rows.append(
            (
                row["method"],
                f"**{row['rate']:.4f}**",
                f"{row['macs']:.1%}",
                f"{row['parameters']:.1%}",
                f"{v0:.2f} -> {v1:.2f} (n={n:,})",
                f"{t0:.2f} -> {t1:.2f} (n={m:,})",
                "yes" if row["equal_to_evaluate"] else "no",
                beyond,
            )
        )
    headers = (
        "method", "rate", "MACs left", "parameters left", "validation top-1", "test top-1", "as `evaluate`",
        "points lost at larger rates",
    )  # fmt: skip
    return (
        "## Pruning to a budget of accuracy\n\n"
        f"The trained ResNet-20 on CIFAR-10, `--max-drop {result['rows'][0]['budget']}`, one shot, batch "
        "norm recalibrated from 1,024 training images, no fine-tuning. The search looks at the validation "
        "split alone.\n\n" + table(headers, rows)
    )


def onnx_latency(result: dict[str, Any], table: Draw) -> str:
    """Speed-up in onnxruntime against the reduction of MACs."""
    rows = [
        (
            f"{row['asked']:.0%}",
            f"{row['macs']:,}",
            f"{row['share']:.1%}",
            row["milliseconds"],
            f"{row['reduction']:.2f}x",
            f"{row['speedup']:.2f}x",
            f"**{row['efficiency']:.2f}**",
        )
        for row in result["rows"]
    ]
    headers = ("target", "MACs", "share", "ms", "MACs reduced", "speed-up", "speed-up / reduction")
    return (
        "## Latency of a pruned resnet50\n\n"
        "`cctool prune --method l2 --target macs=... --round-to 8`, `cctool export`, then onnxruntime on one "
        f"CPU thread, one image at a time, {result['rows'][0]['rounds']} rounds in turn.\n\n"
        + table(headers, rows)
    )


SECTIONS: dict[str, Callable[[dict[str, Any], Draw], str]] = {
    "prune_targets": prune_targets,
    "prune_budget": prune_budget,
    "onnx_latency": onnx_latency,
}
