"""Sections of docs/benchmarks.md on quantized networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SECTIONS"]

Draw = Callable[[Sequence[str], Sequence[Sequence[object]]], str]


def quantize_methods(result: dict[str, Any], table: Draw) -> str:
    """Accuracy and bytes of what `cctool quantize` makes without training."""
    floats = {row["network"]: row for row in result["rows"] if row["method"] == "float"}
    rows = [
        (
            row["network"],
            row["method"],
            f"{row['top1']:.2f}",
            f"**{row['top1'] - floats[row['network']]['top1']:+.2f}**" if row["method"] != "float" else "",
            f"{row['n']:,}",
            f"{row['bytes']:,}",
            f"{floats[row['network']]['bytes'] / row['bytes']:.2f}",
        )
        for row in result["rows"]
    ]
    headers = ("network", "method", "top-1, %", "points", "n", "bytes of the file", "smaller")
    return (
        "## Quantization without training\n\n"
        "`cctool quantize --method ...` on trained networks, CIFAR-10; 1,024 un-augmented training images "
        "where a method looks at images. Bytes are those of the checkpoint, of ONNX files in the last two "
        "rows of a network: our int8 network exported and run in onnxruntime, and the float network after "
        "onnxruntime's own `quantize_static` (QDQ, per channel, min-max, uint8 activations) on the same "
        "images. CPUs without VNNI, as the one here, saturate in both (`--reduce-range` avoids "
        "it).\n\n" + table(headers, rows)
    )


SECTIONS: dict[str, Callable[[dict[str, Any], Draw], str]] = {"quantize_methods": quantize_methods}
