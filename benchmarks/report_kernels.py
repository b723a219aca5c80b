"""Section of docs/benchmarks.md on the transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SECTIONS"]

Draw = Callable[[Sequence[str], Sequence[Sequence[object]]], str]


def dct_speed(result: dict[str, Any], table: Draw) -> str:
    """Time of the DCT of a batch of maps, against torch-dct."""
    rows = [
        (
            row["work"],
            row["threads"],
            *(f"{row['seconds'][tool] * 1e3:.0f}" for tool in ("cctool", "torch_dct", "scipy")),
            f"**{row['ratio']:.1f}**",
            f"{row['ratio_scipy']:.2f}",
        )
        for row in result["rows"]
    ]
    headers = (
        "DCT of",
        "threads",
        "cctool, ms",
        "torch-dct, ms",
        "scipy, ms",
        "times as fast as torch-dct",
        "as scipy",
    )
    shape = ", ".join(map(str, result["rows"][0]["shape"]))
    return (
        "## The DCT of feature maps\n\n"
        f"A ({shape}) float32 batch on the CPU, median of {result['rows'][0]['rounds']} rounds in turn; the "
        "results agree to 1e-5. scipy stands here for information: it has no gradients and no CUDA.\n\n"
        + table(headers, rows)
    )


SECTIONS: dict[str, Callable[[dict[str, Any], Draw], str]] = {"dct_speed": dct_speed}
