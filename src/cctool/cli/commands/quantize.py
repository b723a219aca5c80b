"""`cctool quantize`, and its messages about the product."""

from __future__ import annotations

from typing import Any

from cctool.cli.frame import Invocation


def quantize(call: Invocation) -> None:
    """Compute and store in fewer bits: weights alone, or activations too; calibrated or trained.

    Example: cctool quantize student.pt --method int8 --data cifar10

    Example: cctool quantize student.pt --method int4 --rounding adaround

    Example: cctool quantize student.pt --method lsq --weight-bits 4 --epochs 10 --teacher student.pt
    """
    call.write(_told)


def _told(report: Any) -> Any:
    from cctool.operations.quantize.report import told

    return told(report)
