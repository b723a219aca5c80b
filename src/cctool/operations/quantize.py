"""`cctool quantize`: store weights in fewer bits; the network goes on with the values that are left.

The numbers come out the same on every device: tensors are encoded on the CPU, where division is exact.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.payload import place
from cctool.checkpoint.spec import Metrics
from cctool.copying import copied
from cctool.errors import QuantizationError
from cctool.operations.context import Context, Outcome
from cctool.operations.mask_storage import encode_under_mask, masks_by_place, stored_with_masks
from cctool.operations.measuring import measured_splits
from cctool.operations.sizes import stored_bytes
from cctool.operations.sources import open_source
from cctool.operations.tap_upkeep import recalibrated_taps
from cctool.options.quantize import QuantizeOptions
from cctool.quantization.methods import METHODS
from cctool.quantization.selection import Selected, Skipped, select

__all__ = ["QuantizeReport", "TensorReport", "run"]


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor.

    Attributes:
        name: its first name.
        tied: its further names.
        shape: of the tensor.
        encoding: how it is stored now.
        bytes_before: as it was stored.
        bytes_after: as it is stored now, ranges included.
        max_error: largest absolute difference to the value before.
        sqnr_db: signal to quantization noise, 10 log10(sum w^2 / sum (w - w')^2); None where nothing changed.
    """

    name: str
    tied: tuple[str, ...]
    shape: tuple[int, ...]
    encoding: str
    bytes_before: int
    bytes_after: int
    max_error: float
    sqnr_db: float | None


@dataclass(frozen=True)
class QuantizeReport:
    """What one quantization did.

    Attributes:
        method: name of the method.
        tensors: what was quantized.
        skipped: what was not, and why.
        bytes_before: of all tensors of the network as they were stored.
        bytes_after: of all tensors as they are stored now.
        metrics_before: of the network that came in.
        metrics_after: of the network with the values that are left.
        notes: what else is worth knowing.
    """

    method: str
    tensors: tuple[TensorReport, ...]
    skipped: tuple[Skipped, ...]
    bytes_before: int
    bytes_after: int
    metrics_before: tuple[Metrics, ...]
    metrics_after: tuple[Metrics, ...]
    notes: tuple[str, ...]


def run(checkpoint: Checkpoint, options: QuantizeOptions, context: Context) -> Iterator[Outcome]:
    """Quantize the chosen tensors of a copy of the network.

    Raises:
        QuantizationError: if nothing is chosen, or a tensor cannot be stored so.
        UsageError: if a pattern matches nothing.
        DataError: if the data that was named cannot be opened.
    """
    selected, skipped = select(
        checkpoint.model, include_1d=options.include_1d, include=options.include, exclude=options.exclude
    )
    if not selected:
        reasons = "; ".join(_counted(skipped))
        raise QuantizationError(f"nothing is left to quantize: {reasons or 'the network has no tensors'}")
    source = open_source(options.data, checkpoint, context)
    before = measured_splits(checkpoint, source, options.data, context)
    # Optimizer state belongs to the values before.
    product = replace(checkpoint, model=copied(checkpoint.model), resume=None)
    stored = dict(checkpoint.stored)
    masks = masks_by_place(checkpoint.model)
    reports = []
    for item in context.reporter.progress(selected, "quantizing", len(selected)):
        mask = masks.get(place(item.tensor))
        encoded, found = _quantized(item, mask, checkpoint.stored.get(item.names[0]), options, context)
        stored |= dict.fromkeys(item.names, encoded)
        reports.append(found)
    product = stored_with_masks(replace(product, stored=stored))
    _decode_into(product, [item.names[0] for item in selected], context)
    product, of_taps = recalibrated_taps(product, source, options.data, context)
    after = measured_splits(product, source, options.data, context)
    notes = (*_storage_notes(checkpoint, product, reports), *_counted(skipped), *of_taps)
    report = QuantizeReport(
        method=str(options.method),
        tensors=tuple(reports),
        skipped=tuple(skipped),
        bytes_before=stored_bytes(checkpoint),
        bytes_after=stored_bytes(product),
        metrics_before=before,
        metrics_after=after,
        notes=notes,
    )
    yield Outcome(product, report, metrics_before=before, metrics_after=after, notes=notes)


def _quantized(
    item: Selected,
    mask: Tensor | None,
    earlier: EncodedTensor | None,
    options: QuantizeOptions,
    context: Context,
) -> tuple[EncodedTensor, TensorReport]:
    method = METHODS[options.method]
    tensor = item.tensor.detach().cpu()
    try:
        encoded = encode_under_mask(tensor, mask, method.encoding, method.parameters(item, options))
    except QuantizationError as error:
        raise QuantizationError(f"{item.names[0]}: {error}; --exclude leaves it as it is") from None
    max_error, sqnr = _errors(tensor, context.tables.encodings[encoded.encoding].decode(encoded))
    report = TensorReport(
        name=item.names[0],
        tied=item.names[1:],
        shape=tuple(tensor.shape),
        encoding=encoded.encoding,
        bytes_before=tensor.numel() * tensor.element_size() if earlier is None else earlier.nbytes,
        bytes_after=encoded.nbytes,
        max_error=max_error,
        sqnr_db=sqnr,
    )
    return encoded, report


def _errors(before: Tensor, after: Tensor) -> tuple[float, float | None]:
    signal = before.double()
    noise = signal - after
    power = float(noise.square().sum())
    ratio = float(signal.square().sum()) / power if power else 0.0
    return float(noise.abs().max()), 10 * math.log10(ratio) if ratio else None


def _decode_into(checkpoint: Checkpoint, names: Iterable[str], context: Context) -> None:
    """Give the model the values that its stored tensors decode to."""
    state = checkpoint.model.state_dict()
    with torch.no_grad():
        for name in names:
            encoded = checkpoint.stored[name]
            state[name].copy_(context.tables.encodings[encoded.encoding].decode(encoded))


def _storage_notes(before: Checkpoint, after: Checkpoint, reports: list[TensorReport]) -> list[str]:
    chosen = {name for report in reports for name in (report.name, *report.tied)}
    again = Counter(form.encoding for name, form in before.stored.items() if name in chosen)
    kept = Counter(form.encoding for name, form in after.stored.items() if name not in chosen)
    return [
        *(f"{n} tensors were stored as {name}: decoded, and encoded anew" for name, n in again.items()),
        *(f"{n} tensors stay stored as {name}" for name, n in kept.items()),
        *(
            f"{report.name} does not shrink: {report.bytes_before:,} -> {report.bytes_after:,} bytes"
            for report in reports
            if report.bytes_after >= report.bytes_before
        ),
    ]


def _counted(skipped: list[Skipped]) -> list[str]:
    counts = Counter(item.reason for item in skipped)
    return [f"left alone: {n} tensors ({reason})" for reason, n in counts.items()]
