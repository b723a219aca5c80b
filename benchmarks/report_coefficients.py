"""Section of docs/benchmarks.md on layers whose weights are transform coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SECTIONS"]

Draw = Callable[[Sequence[str], Sequence[Sequence[object]]], str]


def transform_weights(result: dict[str, Any], table: Draw) -> str:
    """Accuracy of a network with a share of its linear coefficients, against low-rank factors."""
    dense, *others = result["rows"]
    rows = [
        (
            "untouched" if row is dense else row["kernel"],
            row["select"] or ("low rank" if row is not dense else ""),
            f"{row['linear_bytes']:,}",
            f"{row['linear_bytes'] / dense['linear_bytes']:.3f}",
            f"{row['file_bytes']:,}" if row["file_bytes"] else f"{row['network_bytes']:,} (tensors)",
            f"{row['top1_after']:.2f}",
            f"**{row['top1_finetuned']:.2f}**" if "top1_finetuned" in row else "",
        )
        for row in (dense, *others)
    ]
    headers = ("kernel", "kept", "linear layers, bytes", "of", "file, bytes", "top-1, %", "fine-tuned, %")
    return (
        f"## Linear layers at {others[0]['keep']:.0%} of their coefficients\n\n"
        f"`alexnet` on {dense['data']}, {dense['epochs']} epochs from scratch on {dense['images']:,} images, "
        "then "
        f"transformed with `--layers linear --keep {others[0]['keep']:g}` and fine-tuned for "
        f"{dense['finetune_epochs']} epochs at a learning rate of {dense['lr']:g}; top-1 on {dense['n']:,} "
        "test images. SVD is plain low rank at the bytes of the coefficients; `klt` counts its bases, and is "
        "the same approximation for linear layers.\n\n" + table(headers, rows)
    )


SECTIONS: dict[str, Callable[[dict[str, Any], Draw], str]] = {"transform_weights": transform_weights}
