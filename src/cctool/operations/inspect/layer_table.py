"""An analysis as people read it: the table of layers, and remarks on them."""

from __future__ import annotations

from typing import Any

_SUMS = {
    "parameters": "parameters",
    "macs": "MACs",
    "effective_macs": "effective MACs",
    "matmul_macs": "matmul MACs",
    "norm_ops": "norm ops",
    "activation_ops": "activation ops",
    "pooling_ops": "pooling ops",
    "elementwise_ops": "elementwise ops",
    "bytes": "bytes",
    "nonfinite": "NaN or inf",
    "masked": "masked",
}
_BITS = {"weight_bits": "w bits", "input_bits": "in bits", "output_bits": "out bits"}
# Columns that are only shown if their total is not zero.
_RARE = ("matmul_macs", "nonfinite", "masked")


def layers(table: Any) -> tuple[list[str], list[tuple[object, ...]]]:
    """Columns and rows of the table of layers, without columns that would be empty for this network."""
    totals = table.totals
    shown = [key for key in _SUMS if key not in _RARE or getattr(totals, key)]
    if totals.effective_macs == totals.macs:
        shown.remove("effective_macs")
    bits = [key for key in _BITS if any(getattr(layer.precision, key) for layer in table.layers)]
    headers = ["layer", "type", "settings", "input", "output", *map(_SUMS.__getitem__, shown), "sparsity %"]
    headers += [_BITS[key] for key in bits]

    def numbers(sums: Any) -> list[object]:
        percent = None if sums.sparsity is None else f"{sums.sparsity:.2f}"
        return [*(getattr(sums, key) for key in shown), percent]

    rows: list[tuple[object, ...]] = [
        (
            layer.name,
            layer.type,
            "never run" if layer.name in table.unused else layer.attributes,
            _size(layer.input_shape),
            _size(layer.output_shape),
            *numbers(layer.sums),
            *(getattr(layer.precision, key) for key in bits),
        )
        for layer in table.layers
    ]
    return headers, [*rows, ("total", "", "", "", "", *numbers(totals), *("" for _ in bits))]


def _size(shape: tuple[int, ...] | None) -> str:
    """A shape as text, without its leading batch of one."""
    if shape is None:
        return ""
    return "x".join(map(str, shape[1:] if shape[:1] == (1,) else shape))


def remarks(report: Any) -> list[str]:
    """Sentences on zeros, masks, calls that were not counted, non-finite values, and thop's total."""
    layers, check, totals = report.analysis.layers, report.analysis.cross_check, report.analysis.layers.totals
    found = []
    if totals.effective_macs != totals.macs:
        found.append(
            f"effective MACs: {totals.effective_macs:,} of {totals.macs:,}, without those of zero weights"
        )
    if layers.masked:
        found.append(f"masked, and kept so by training: {', '.join(layers.masked)}")
    if layers.uncounted:
        named = ", ".join(f"{name} ({calls} calls)" for name, calls in layers.uncounted.items())
        found.append(f"not counted, there is no rule: {named}")
    if layers.unused:
        found.append(f"never run in this pass: {', '.join(layers.unused)}")
    found += [
        f"not finite: {fault.name}: {fault.nan:,} NaN, {fault.infinite:,} infinite of {fault.elements:,}"
        for fault in report.nonfinite
    ]
    if check.total is None:
        found.append(str(check.failure))
    else:
        found.append(f"thop counts {check.total:,} operations in all:")
        for line in check.lines:
            found.append(f"  {line.kind}: {line.thop:,}, here {line.ours:,}")
            found[-1] += f"; {line.explanation}" if line.explanation else ""
    return found
