"""`cctool quantize`, and what it says when it is done."""

from __future__ import annotations

from typing import Any

from cctool.cli.console import Console
from cctool.cli.frame import Call, show_metrics


def quantize(call: Call) -> None:
    """Compute and store in fewer bits: weights alone, or activations too; calibrated or trained.

    Example: cctool quantize student.pt --method int8 --data cifar10

    Example: cctool quantize student.pt --method int4 --rounding adaround

    Example: cctool quantize student.pt --method lsq --weight-bits 4 --epochs 10 --teacher student.pt
    """
    call.write(_say_report)


_MOST = 40


def _say_report(console: Console, report: Any) -> None:
    """Show tables of weights, activations and of what stayed in floating point; then sizes and metrics."""
    if report.tensors:
        console.talk_table(
            "weights",
            ("tensor", "shape", "stored as", "bits", "bytes before", "bytes after", "max error", "SQNR dB"),
            [
                (
                    t.name,
                    "x".join(map(str, t.shape)),
                    t.encoding,
                    t.bits,
                    t.bytes_before,
                    t.bytes_after,
                    t.max_error,
                    t.sqnr_db,
                )
                for t in report.tensors
            ],
        )
    if report.activations:
        console.talk_table(
            "activations",
            ("module", "value", "quantizer", "bits", "low", "high", "clipped %"),
            [(a.name, a.what, a.method, a.bits, a.low, a.high, a.clipped) for a in report.activations],
        )
    if report.sensitivity:
        console.talk_table(
            "what quantizing one layer alone costs",
            ("layer", "bits", "damage", "bytes", "chosen"),
            [(s.layer, s.bits, s.damage, s.bytes, "x" if s.chosen else "") for s in report.sensitivity],
        )
    if report.left:
        console.talk_table(
            "in floating point", ("name", "why"), [(item.name, item.reason) for item in report.left[:_MOST]]
        )
        if len(report.left) > _MOST:
            console.note(f"and {len(report.left) - _MOST} more in floating point")
    console.note(
        f"tensors {report.bytes_before:,} -> {report.bytes_after:,} bytes "
        f"({report.bytes_before / max(report.bytes_after, 1):.2f}x smaller)"
    )
    for note in report.notes:
        console.note(note)
    show_metrics(console, report.metrics_before, report.metrics_after)
