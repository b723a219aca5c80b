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
        "where a method looks at images. Bytes are those of the checkpoint, and of ONNX files in the last "
        "rows of a network: our integer networks exported and run in onnxruntime, and the float network "
        "after onnxruntime's own `quantize_static` (QDQ, per channel, min-max, uint8 activations) on the "
        "same images. CPUs without VNNI, as the one here, saturate where weights use all of 8 bits; "
        "`quantize --method int8` uses 7 of them unless `--full-range` is given.\n\n" + table(headers, rows)
    )


def quantize_trained(result: dict[str, Any], table: Draw) -> str:
    """Accuracy of networks that were trained with quantizers in the loop."""
    rows = []
    for row in result["rows"]:
        before = next(
            other["before"]
            for other in result["rows"]
            if other["network"] == row["network"] and other["before"] is not None
        )
        rows.append(
            (
                f"{row['network']}, {row['data']}",
                row["method"],
                f"{before:.2f}",
                f"{row['top1']:.2f}",
                f"**{row['top1'] - before:+.2f}**",
                f"{row['n']:,}",
                row["epochs"],
                f"{row['bytes']:,}",
            )
        )
    headers = ("network", "method", "float, %", "top-1, %", "points", "n", "epochs", "bytes of the file")
    return (
        "## Quantization with training\n\n"
        "`cctool quantize --method ...` from the float network, with its defaults: SGD from 0.01 by a "
        "cosine, labels alone, first and last layer at 8 bits, the best epoch by validation. One seed: "
        "differences of a few tenths of a point say nothing. The last row of a network trains its floats for "
        "as many epochs (`cctool train --optimizer sgd`), so that nobody takes more training for a gain of a "
        "method.\n\n" + table(headers, rows)
    )


SECTIONS: dict[str, Callable[[dict[str, Any], Draw], str]] = {
    "quantize_methods": quantize_methods,
    "quantize_trained": quantize_trained,
}
