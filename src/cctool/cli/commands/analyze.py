"""`cctool analyze`, and its tables."""

from __future__ import annotations

from typing import Any

from cctool.cli.commands.export import agreement_line
from cctool.cli.commands.history import SHORT_HEADERS, full_history, short_rows
from cctool.cli.console import Console
from cctool.cli.frame import Call
from cctool.options.inspect.analyze import View


def analyze(call: Call) -> None:
    """Show what a checkpoint holds and computes, layer by layer, and how it came about.

    Example: cctool analyze model.pt --macs --onnx
    """
    console, report, view = call.console, call.read(), call.options.view
    for file in report.written:
        console.path(file.path)
    if view is View.SPEC:
        console.document(report.spec, always=True)
        return
    if view is View.HISTORY:
        console.text(full_history(report.history) or "no history: the file was not written by a command")
    elif not console.as_json:
        _show(console, report, talk=bool(report.written))
    console.document(report)


def _show(console: Console, report: Any, talk: bool) -> None:
    """Show the tables: the command's product, or talk beside the paths of the files written."""
    table, say = (console.talk_table, console.note) if talk else (console.table, console.text)
    analysis = report.analysis
    headers, rows = _layers(analysis.layers)
    shape = "x".join(map(str, report.spec.input_shape))
    table(f"{report.spec.architecture}, one input of {shape}", headers, rows)
    for line in _remarks(report):
        say(line)
    if report.history:
        table("History (--history: in full)", SHORT_HEADERS, short_rows(report.history))
    for file in report.written:
        for agreement in file.agreements:
            console.note(agreement_line(agreement))


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
_RARE = ("matmul_macs", "nonfinite", "masked")


def _layers(table: Any) -> tuple[list[str], list[tuple[object, ...]]]:
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
    """Without the batch of one, where that comes first."""
    if shape is None:
        return ""
    return "x".join(map(str, shape[1:] if shape[:1] == (1,) else shape))


def _remarks(report: Any) -> list[str]:
    layers, check, totals = report.analysis.layers, report.analysis.cross_check, report.analysis.layers.totals
    remarks = []
    if totals.effective_macs != totals.macs:
        remarks.append(
            f"effective MACs: {totals.effective_macs:,} of {totals.macs:,}, without those of zero weights"
        )
    if layers.masked:
        remarks.append(f"masked, and kept so by training: {', '.join(layers.masked)}")
    if layers.uncounted:
        named = ", ".join(f"{name} ({calls} calls)" for name, calls in layers.uncounted.items())
        remarks.append(f"not counted, there is no rule: {named}")
    if layers.unused:
        remarks.append(f"never run in this pass: {', '.join(layers.unused)}")
    remarks += [
        f"not finite: {fault.name}: {fault.nan:,} NaN, {fault.infinite:,} infinite of {fault.elements:,}"
        for fault in report.nonfinite
    ]
    if check.total is None:
        remarks.append(str(check.failure))
    else:
        remarks.append(f"thop counts {check.total:,} operations in all:")
        for line in check.lines:
            remarks.append(f"  {line.kind}: {line.thop:,}, here {line.ours:,}")
            remarks[-1] += f"; {line.explanation}" if line.explanation else ""
    return remarks
