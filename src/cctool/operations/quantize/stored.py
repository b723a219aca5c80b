"""`cctool quantize`: store weights in fewer bits; the network computes with the decoded values.

Tensors are encoded on the CPU, where division is correctly rounded: all devices give the same numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from cctool.base.errors import QuantizationError
from cctool.base.networks import copied, several
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.encoding import EncodedTensor, Encoding
from cctool.checkpoint.file.payload import place
from cctool.operations.context import Context, Outcome
from cctool.operations.data import measured_splits, open_source
from cctool.operations.judge.size import stored_bytes
from cctool.operations.keep import events
from cctool.operations.keep.encode import encode_under_mask, masks_by_place
from cctool.operations.quantize.report import (
    GROWS,
    QuantizeReport,
    TensorReport,
    counted,
    errors_between,
)
from cctool.operations.quantize.warning import signal_and_warning
from cctool.options.quantize.choices import INTEGERS, QuantizeMethod
from cctool.options.quantize.options import QuantizeOptions
from cctool.quantization.encodings.apot_levels import default_terms
from cctool.quantization.encodings.codebook import CODEBOOK
from cctool.quantization.encodings.float16 import BF16, FP16
from cctool.quantization.encodings.intn import INTN
from cctool.quantization.encodings.scale_groups import ScaleGroups
from cctool.quantization.encodings.uint8 import AFFINE_U8
from cctool.quantization.network.tensors import SelectedTensor, Skipped, select

METHODS: dict[QuantizeMethod, Encoding] = {
    QuantizeMethod.FP16: FP16,
    QuantizeMethod.BF16: BF16,
    QuantizeMethod.UINT8: AFFINE_U8,
    QuantizeMethod.CODEBOOK: CODEBOOK,
    QuantizeMethod.APOT: CODEBOOK,
    **dict.fromkeys(INTEGERS, INTN),
}


def _parameters(item: SelectedTensor, options: QuantizeOptions, seed: int) -> dict[str, JsonValue]:
    """Parameters of the method's encoding for one tensor."""
    method, bits, axis = options.method, options.bits, item.channels if options.channelwise else None
    if method in (QuantizeMethod.FP16, QuantizeMethod.BF16):
        return {}
    if method is QuantizeMethod.UINT8:
        return {"axis": axis}
    if method is QuantizeMethod.CODEBOOK:
        return {"kind": "kmeans", "bits": bits, "axis": None, "init": str(options.init), "seed": seed}
    if method is QuantizeMethod.APOT:
        terms = default_terms(bits) if options.terms is None else options.terms
        return {"kind": "apot", "bits": bits, "axis": axis, "terms": terms}
    return {"bits": bits, "symmetric": not options.asymmetric, "axis": axis, "group": options.group}


def run(checkpoint: Checkpoint, options: QuantizeOptions, context: Context) -> Iterator[Outcome]:
    """Quantize the selected tensors of a copy of the network.

    Raises:
        QuantizationError: if nothing is selected, or a tensor cannot be stored in the method's encoding.
        UsageError: if a pattern matches nothing.
        DataError: if the data set that was given cannot be opened.
    """
    selected, skipped = select(
        checkpoint.model, include_1d=options.include_1d, include=options.include, exclude=options.exclude
    )
    if not selected:
        reasons = "; ".join(counted(skipped))
        raise QuantizationError(f"nothing is left to quantize: {reasons or 'the network has no tensors'}")
    source = open_source(options.data, checkpoint, context)
    before = measured_splits(checkpoint, source, options.data, context)
    # The state of the optimizer belongs to the earlier values.
    product = replace(checkpoint, model=copied(checkpoint.model), resume=None)
    product, reports, grown = encode_selected(product, checkpoint, selected, options, context)
    skipped += grown
    if not reports:
        raise QuantizationError(f"nothing is left to quantize: {'; '.join(counted(skipped))}")
    product, followed = events.changed(product, source, options.data, context)
    after = measured_splits(product, source, options.data, context)
    signal, warned = signal_and_warning(checkpoint, product, source, options.data, context, (before, after))
    notes = (
        *_idle_patterns(checkpoint.model, options, selected),
        *_idle_group(options, product, reports),
        *_storage_notes(checkpoint, product, reports),
        *counted(skipped),
        *followed,
        *warned,
    )
    report = QuantizeReport(
        method=str(options.method),
        tensors=tuple(reports),
        skipped=tuple(skipped),
        bytes_before=stored_bytes(checkpoint),
        bytes_after=stored_bytes(product),
        metrics_before=before,
        metrics_after=after,
        notes=notes,
        signal=signal,
    )
    yield Outcome(
        product, report, metrics_before=before, metrics_after=after, notes=notes, signal=report.signal
    )


def _idle_patterns(
    model: nn.Module, options: QuantizeOptions, selected: Sequence[SelectedTensor]
) -> Iterator[str]:
    """Notes on patterns without which the same tensors would be selected."""
    names = [item.names for item in selected]
    for flag, patterns in (("include", options.include), ("exclude", options.exclude)):
        for number, pattern in enumerate(patterns):
            others = patterns[:number] + patterns[number + 1 :]
            if flag == "include" and not others:
                continue
            chosen = {"include": options.include, "exclude": options.exclude, flag: others}
            found, _ = select(model, include_1d=options.include_1d, **chosen)
            if [item.names for item in found] == names:
                yield f"--{flag} {pattern} changes nothing: the same tensors are quantized without it"


def _idle_group(
    options: QuantizeOptions, product: Checkpoint, reports: Sequence[TensorReport]
) -> Iterator[str]:
    """A note if no channel has more weights than a group."""
    forms = [product.stored[report.name] for report in reports]
    longest = max(math.prod(ScaleGroups(form.shape, _axis(form)).rest) for form in forms)
    if options.group is not None and options.group >= longest:
        one = "channel has" if options.channelwise else "tensor has"
        yield (
            f"--group-size {options.group:,} divides nothing: no {one} more than {longest:,} weights, so "
            "that each has one scale"
        )


def _axis(form: EncodedTensor) -> int | None:
    axis = form.parameters.get("axis")
    return axis if isinstance(axis, int) else None


def encode_selected(
    product: Checkpoint,
    before: Checkpoint,
    selected: Sequence[SelectedTensor],
    options: QuantizeOptions,
    context: Context,
) -> tuple[Checkpoint, list[TensorReport], list[Skipped]]:
    """Encode selected tensors by the options' method; the product's model gets the decoded values in place.

    ``before`` is the input, whose stored forms count as the bytes before. ``selected`` may be tensors of
    another network with the same names. Tensors of which the encoded form would be larger than the values
    themselves stay as they are: these are returned, too.
    """
    stored = dict(product.stored)
    state = product.model.state_dict()
    masks = masks_by_place(product.model)
    reports, grown = [], list[Skipped]()
    for item in context.reporter.progress(selected, "quantizing", len(selected)):
        # The selection may come from another network; the values are the product's.
        own = replace(item, tensor=state[item.names[0]])
        encoded, found = _quantized(
            own, masks.get(place(own.tensor)), before.stored.get(item.names[0]), options, context
        )
        if encoded.nbytes > own.tensor.numel() * own.tensor.element_size():
            grown += [Skipped(name, tuple(own.tensor.shape), GROWS) for name in item.names]
            continue
        stored |= dict.fromkeys(item.names, encoded)
        reports.append(found)
    with torch.no_grad():
        for found in reports:
            encoded = stored[found.name]
            state[found.name].copy_(context.tables.encodings[encoded.encoding].decode(encoded))
    return replace(product, stored=stored), reports, grown


def encoded_directly(
    product: Checkpoint,
    before: Checkpoint,
    options: QuantizeOptions,
    context: Context,
    *,
    done: Collection[str],
    left: Collection[str],
) -> tuple[Checkpoint, tuple[TensorReport, ...], tuple[Skipped, ...]]:
    """Encode tensors that have no quantizer: those of other modules, and 1-D ones if the options say so.

    ``done`` names tensors that are stored already, ``left`` layers that the user excluded. Otherwise as
    `encode_selected`.
    """
    chosen, skipped = select(product.model, include_1d=options.include_1d)
    kept_out = [
        item
        for item in chosen
        if any(_layer_of(name) in left or _refused(name, options) for name in item.names)
    ]
    rest = [item for item in chosen if not set(done).intersection(item.names) and item not in kept_out]
    skipped += [
        Skipped(name, tuple(item.tensor.shape), "left out by an option")
        for item in kept_out
        for name in item.names
        if name not in done
    ]
    if not rest:
        return product, (), tuple(skipped)
    product, reports, grown = encode_selected(product, before, rest, options, context)
    return product, tuple(reports), (*skipped, *grown)


def _layer_of(name: str) -> str:
    """The module whose weight a tensor is, or is a part of: torch keeps parametrizations in modules within.

    >>> _layer_of("fc.weight"), _layer_of("fc.parametrizations.weight.original1")
    ('fc', 'fc')
    """
    return f".{name}".rpartition(".parametrizations.")[0][1:] or name.rpartition(".")[0]


def _refused(name: str, options: QuantizeOptions) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) or fnmatchcase(module, pattern) for pattern in patterns)

    module = _layer_of(name)
    return matches(options.exclude) or (bool(options.include) and not matches(options.include))


def _quantized(
    item: SelectedTensor,
    mask: Tensor | None,
    earlier: EncodedTensor | None,
    options: QuantizeOptions,
    context: Context,
) -> tuple[EncodedTensor, TensorReport]:
    tensor = item.tensor.detach().cpu()
    parameters = _parameters(item, options, context.runtime.seed)
    try:
        encoded = encode_under_mask(tensor, mask, METHODS[options.method], parameters)
    except QuantizationError as error:
        raise QuantizationError(f"{item.names[0]}: {error}; --exclude leaves it as it is") from None
    max_error, sqnr = errors_between(tensor, context.tables.encodings[encoded.encoding].decode(encoded))
    report = TensorReport(
        name=item.names[0],
        tied=item.names[1:],
        shape=tuple(tensor.shape),
        encoding=encoded.encoding,
        bits=options.bits,
        bytes_before=tensor.numel() * tensor.element_size() if earlier is None else earlier.nbytes,
        bytes_after=encoded.nbytes,
        max_error=max_error,
        sqnr_db=sqnr,
    )
    return encoded, report


def _storage_notes(before: Checkpoint, after: Checkpoint, reports: list[TensorReport]) -> list[str]:
    chosen = {name for report in reports for name in (report.name, *report.tied)}
    again = Counter(form.encoding for name, form in before.stored.items() if name in chosen)
    kept = Counter(form.encoding for name, form in after.stored.items() if name not in chosen)
    return [
        *(
            f"{several(n, 'tensor')} {'was' if n == 1 else 'were'} stored as {name}: decoded, and encoded "
            "anew"
            for name, n in again.items()
        ),
        *(
            f"{several(n, 'tensor')} {'stays' if n == 1 else 'stay'} stored as {name}"
            for name, n in kept.items()
        ),
        *(
            f"{report.name} does not shrink: {report.bytes_before:,} -> {report.bytes_after:,} bytes"
            for report in reports
            if (report.bytes_after or 0) >= (report.bytes_before or 0)
        ),
    ]
