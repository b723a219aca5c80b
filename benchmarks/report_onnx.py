"""Section of docs/benchmarks.md on exported int8 networks against onnxruntime's static quantization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["SECTIONS"]

Draw = Callable[[Sequence[str], Sequence[Sequence[object]]], str]


def onnx_int8(result: dict[str, Any], table: Draw) -> str:
    """Speed and bytes of int8 files."""
    rows = []
    for row in result["rows"]:
        times, faster, smaller = row["milliseconds"], row["speedup"], row["smaller"]
        for kind, title in (
            ("ours", "`cctool export`"),
            ("static", "`quantize_static`, int8"),
            ("static_u8", "`quantize_static`, uint8"),
        ):
            kernels = row["kernels"][kind]
            floating = sum(kernels.get(name, 0) for name in ("Conv", "FusedConv", "Gemm", "FusedGemm"))
            rows.append(
                (
                    row["network"],
                    title,
                    times[kind],
                    f"{faster[kind]:.2f}x",
                    f"{row['bytes'][kind]:,}",
                    f"{smaller[kind]:.2f}x",
                    floating,
                )
            )
    ratios = "; ".join(
        f"{row['network']}: **{row['speed_ratio']:.2f}x** the speed of int8, "
        f"**{row['speed_ratio_u8']:.2f}x** that of uint8, **{row['bytes_ratio']:.3f}x** the bytes"
        for row in result["rows"]
    )
    saturating = result["rows"][0]["saturating_cpu"]
    headers = ("network", "file", "ms", "faster than float", "bytes", "smaller", "layers in float")
    return (
        "## Integers in onnxruntime\n\n"
        "Random weights, 224x224, the same 32 calibration images; QDQ, weights int8 per channel, activations "
        "uint8 (ours) and of both types (the peer's). Two threads, one image at a time, "
        f"{result['rows'][0]['rounds']} rounds in turn, {'without' if saturating else 'with'} VNNI. Ours to "
        f"the peer's: {ratios}.\n\n" + table(headers, rows)
    )


SECTIONS: dict[str, Callable[[dict[str, Any], Draw], str]] = {"onnx_int8": onnx_int8}
