"""The report of `cctool quantize`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cctool.base.networks import several, some
from cctool.checkpoint.spec import Metrics, Signal
from cctool.operations.context import Told, metric_lines
from cctool.quantization.network.placement import Left
from cctool.quantization.network.tensors import Skipped

GROWS = "it would take more bytes than its values do now"
"""Why a tensor of few values, beside which its scales or its table count, stays as it is."""


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor.

    Attributes:
        name: its first name.
        tied: other names of the same tensor.
        shape: of the tensor.
        encoding: how it is stored now.
        bits: per value; None if it is stored dense.
        bytes_before: as it was stored; of a computed weight those of what it is made of, None if that is not
            known.
        bytes_after: as it is stored now, scales included; likewise.
        max_error: largest absolute difference to the earlier values.
        sqnr_db: signal to quantization noise, 10 log10(sum w^2 / sum (w - w')^2); None without noise.
    """

    name: str
    tied: tuple[str, ...]
    shape: tuple[int, ...]
    encoding: str
    bits: int | None
    bytes_before: int | None
    bytes_after: int | None
    max_error: float
    sqnr_db: float | None


@dataclass(frozen=True)
class ActivationReport:
    """How one activation is quantized.

    Attributes:
        name: of the module that makes the call.
        what: the function that is called, and whether it is its input or output.
        method: of its quantizer.
        bits: per value.
        low: smallest value of the grid.
        high: largest value of the grid.
        clipped: percent of the values of calibration outside of the grid; None without calibration.
        nonfinite: number of infinities and NaN that calibration left out.
    """

    name: str
    what: str
    method: str
    bits: int
    low: float
    high: float
    clipped: float | None
    nonfinite: int = 0


@dataclass(frozen=True)
class SensitivityReport:
    """What quantizing one layer alone costs.

    Attributes:
        layer: its name.
        bits: that were tried.
        damage: change of the network's outputs, see `tasks.base.Task.divergence`.
        bytes: of its weight.
        chosen: whether these bits were chosen.
    """

    layer: str
    bits: int
    damage: float
    bytes: int
    chosen: bool


@dataclass(frozen=True)
class QuantizeReport:
    """What one quantization did.

    Attributes:
        method: its name.
        tensors: weights that were quantized.
        skipped: tensors that were not, and why.
        activations: that are quantized.
        left: layers and activations that stay in floating point, and why.
        calibrated_on: number of training images that ranges were found on.
        bytes_before: of all tensors of the input as stored.
        bytes_after: of all tensors of the product as stored.
        metrics_before: of the input network.
        metrics_after: of the product.
        sensitivity: from which bits were chosen.
        notes: for the history.
        signal: what is left of the outputs' signal; None without images.
    """

    method: str
    tensors: tuple[TensorReport, ...]
    skipped: tuple[Skipped, ...]
    bytes_before: int
    bytes_after: int
    metrics_before: tuple[Metrics, ...]
    metrics_after: tuple[Metrics, ...]
    notes: tuple[str, ...]
    signal: Signal | None = None
    activations: tuple[ActivationReport, ...] = ()
    left: tuple[Left, ...] = ()
    calibrated_on: int = 0
    sensitivity: tuple[SensitivityReport, ...] = ()


def errors_between(before: Tensor, after: Tensor) -> tuple[float, float | None]:
    """Largest absolute difference, and the signal to quantization noise in dB; None without noise."""
    # In float64, in which the differences of float32 values are exact or nearly so.
    signal = before.detach().double().cpu()
    noise = signal - after.detach().cpu()
    power = float(noise.square().sum())
    ratio = float(signal.square().sum()) / power if power else 0.0
    largest = float(noise.abs().max()) if noise.numel() else 0.0
    return largest, 10 * math.log10(ratio) if ratio else None


def counted(skipped: Sequence[Skipped]) -> list[str]:
    """A note for each reason why tensors were not quantized."""
    counts = Counter(item.reason for item in skipped)
    return [f"left alone: {several(n, 'tensor')} ({reason})" for reason, n in counts.items()]


def in_floating_point(left: Sequence[Left]) -> list[str]:
    """A note for each reason why layers and activations stay in floating point."""
    counts = Counter(item.reason for item in left)
    return [f"left in floating point: {n} ({reason})" for reason, n in counts.items()]


# Rows that are shown of what stays in floating point.
_MOST = 40
_TENSORS = ("tensor", "shape", "stored as", "bits", "bytes before", "bytes after", "max error", "SQNR dB")
_ACTIVATIONS = ("module", "value", "quantizer", "bits", "low", "high", "clipped %")
_SENSITIVITY = ("layer", "bits", "damage", "bytes", "chosen")


def signal_table(signal: Signal) -> Told:
    """The figures of the outputs' signal, a row each."""
    rows = [(name, value) for name, value in _signal_figures(signal)]
    title = f"outputs before and after, on {signal.n} {signal.split} images"
    return title, ("measured", "value"), rows


def signal_lines(signal: Signal) -> tuple[str, ...]:
    """The same figures as phrases, for the history in full."""
    figures = (f"{name} {value}" for name, value in _signal_figures(signal))
    return (f"on {signal.n} {signal.split} images", *figures)


def _signal_figures(signal: Signal) -> Iterator[tuple[str, str]]:
    same = signal.snr_db is None and signal.snr_db_with_mean is None and not signal.nonfinite
    for name, ratio in (
        ("signal-to-noise", signal.snr_db),
        ("signal-to-noise with the mean", signal.snr_db_with_mean),
    ):
        yield name, "no difference" if same else "no signal" if ratio is None else f"{ratio:.1f} dB"
    if signal.agreement is not None:
        yield f"{signal.agreement_of} agreement", f"{signal.agreement:.2f} %"
    if signal.nonfinite:
        yield "NaN or infinite", f"{signal.nonfinite:,} values"
    if signal.uncompared:
        yield "not compared", some(signal.uncompared)


def told(report: Any) -> Iterator[Told]:
    """Tables of weights, activations, sensitivity and what stays in floating point; sizes, notes, metrics."""
    if report.tensors:
        yield (
            "weights",
            _TENSORS,
            [
                (
                    *(t.name, "x".join(map(str, t.shape)), t.encoding, t.bits),
                    *(t.bytes_before, t.bytes_after, t.max_error, t.sqnr_db),
                )
                for t in report.tensors
            ],
        )
    if report.activations:
        rows = [(a.name, a.what, a.method, a.bits, a.low, a.high, a.clipped) for a in report.activations]
        yield "activations", _ACTIVATIONS, rows
    if report.sensitivity:
        title = "what quantizing one layer alone costs"
        costs = [(s.layer, s.bits, s.damage, s.bytes, "x" if s.chosen else "") for s in report.sensitivity]
        yield title, _SENSITIVITY, costs
    if report.left:
        yield "in floating point", ("name", "why"), [(x.name, x.reason) for x in report.left[:_MOST]]
        if len(report.left) > _MOST:
            yield f"and {len(report.left) - _MOST} more in floating point"
    yield (
        f"tensors {report.bytes_before:,} -> {report.bytes_after:,} bytes "
        f"({report.bytes_before / max(report.bytes_after, 1):.2f}x smaller)"
    )
    if report.signal is not None:
        yield signal_table(report.signal)
    yield from report.notes
    yield from metric_lines(report.metrics_before, report.metrics_after)
