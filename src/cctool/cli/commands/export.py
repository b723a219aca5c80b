"""`cctool export`, and its messages about the files."""

from __future__ import annotations

from typing import Any

from cctool.cli.console import Console
from cctool.cli.frame import Invocation

_LISTED = 10


def export(call: Invocation) -> None:
    """Write the network for other programs, and verify what was written.

    Example: cctool export student.pt --format onnx
    """
    report = call.read()
    for file in report.files:
        _say(call.console, file)
        call.console.path(file.path)
    call.console.document(report)


def _say(console: Console, file: Any) -> None:
    console.note(f"{file.path}: {file.format}, {file.bytes:,} bytes, {file.verified}")
    agreement_notes(console, file)
    if file.kernels is not None:
        kernels_note(console, file.kernels)


def kernels_note(console: Console, kernels: Any) -> None:
    """Print how onnxruntime runs the layers."""
    console.note(
        f"  onnxruntime runs {kernels.integer} layers on integers, {len(kernels.floating)} in floating point"
    )
    for layer in kernels.floating[:_LISTED]:
        console.note(f"    layer {layer.name}: {layer.reason}")
    if len(kernels.floating) > _LISTED:
        console.note(f"    and {len(kernels.floating) - _LISTED} more, see --json")


def agreement_notes(console: Console, file: Any) -> None:
    """Print how close the outputs of a written model are."""
    for agreement in file.agreements:
        console.note(_agreement_line(agreement))
        for line in agreement.lines()[:_LISTED]:
            console.note(f"    {line}")
        if len(agreement.lines()) > _LISTED:
            console.note(f"    and {len(agreement.lines()) - _LISTED} more outputs, see --json")


def _agreement_line(agreement: Any) -> str:
    judged = ", judged in float64" if agreement.judged_in_float64 else ""
    judged += ", judged by the steps of what rounds it" if agreement.judged_by_steps else ""
    chosen = agreement.choices
    first, last = agreement.batch_sizes[0], agreement.batch_sizes[-1]
    sizes = str(first) if first == last else f"{first} to {last}"
    error = "outputs of whole numbers"
    if all(output.not_compared for output in agreement.outputs):
        error = "; ".join(f"{o.name} not compared, {o.not_compared}" for o in agreement.outputs)
    elif any(output.max_abs_error is not None for output in agreement.outputs):
        error = (
            f"max abs error {agreement.max_abs_error:.2g} of a range of {agreement.output_range:.3g}{judged}"
        )
    alone = agreement.outputs[0] if len(agreement.outputs) == 1 else None
    passes = sum(agreement.forward_passes.values())
    enough = agreement.offered is not None and agreement.n < agreement.offered
    count = f"{agreement.n:,} of {agreement.offered:,}, which were enough" if enough else f"{agreement.n:,}"
    return (
        f"  {agreement.inputs} (n={count}, batches of {sizes}; {passes:,} forward passes): {error}"
        + ("" if alone is None else alone.judged)
        + (f", {chosen.title} agreement {chosen.percent:.2f} %" if chosen is not None else "")
        + (f", {agreement.undecided} of the others undecided within rounding" if agreement.undecided else "")
    )
