"""Section of docs/benchmarks.md on layers of basis functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SECTIONS"]

Draw = Callable[[Sequence[str], Sequence[Sequence[object]]], str]


def transform_layers(result: dict[str, Any], table: Draw) -> str:
    """Accuracy and size by kernel, layers, network and data."""
    plain = {_where(row): row for row in result["rows"] if row["kernel"] == "none"}
    rows = []
    for row in result["rows"]:
        if row["kernel"] == "none":
            continue
        before = plain[_where(row)]
        rows.append(
            (
                row["architecture"].rpartition(":")[2],
                row["data"],
                f"{row['images']:,} x {row['epochs']}",
                row["kernel"],
                row["layers"],
                f"{before['accuracy']:.2f}",
                f"**{row['accuracy']:.2f}**",
                f"{before['parameters']:,} -> {row['parameters']:,}",
                f"{before['bytes']:,} -> {row['bytes']:,}",
                f"{before['macs']:,} -> {row['macs']:,}",
            )
        )
    headers = (
        "network", "data", "images x epochs", "kernel", "layers", "plain, %", "basis, %", "parameters",
        "bytes", "MACs",
    )  # fmt: skip
    tests = ", ".join(
        f"{n:,} of {data}" for data, n in {row["data"]: row["n"] for row in plain.values()}.items()
    )
    return (
        "## Layers of basis functions\n\n"
        "Networks trained from scratch at cctool's defaults, plain and with layers whose rows are basis "
        "functions of trainable frequency (`cctool train --swap basis:KERNEL:LAYERS`). Top-1 on test images: "
        f"{tests}. MACs are real products: 4 for a complex one, 2 for that of a complex and a real number. "
        "Networks on CIFAR-10 saw one epoch of a slice of its images: that they run is all that this shows, "
        "for a few steps leave most of them at the 10 % of chance.\n\n" + table(headers, rows)
    )


def _where(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["architecture"], row["data"], row["epochs"]


SECTIONS: dict[str, Callable[..., str]] = {"transform_layers": transform_layers}
