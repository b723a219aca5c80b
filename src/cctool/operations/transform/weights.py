"""`cctool transform --target weights`: layers whose parameters are coefficients in a transform domain.

select -> ordinary weight -> coefficients per axis -> corner | mask -> swap edits, mask edits, stored forms
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cctool.base.errors import TransformError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import add_masks, mask_name
from cctool.checkpoint.encoding import EncodedTensor
from cctool.operations.context import Context, Outcome
from cctool.operations.data import measured_splits, open_source
from cctool.operations.judge.size import stored_bytes
from cctool.operations.keep import events
from cctool.operations.transform.weights_report import (
    TransformWeightsReport,
    coded_layer_report,
    counted,
    layer_bytes,
)
from cctool.options.transform.choices import Select
from cctool.options.transform.options import TransformOptions, WeightOptions
from cctool.transforms.kernels import by_name as kernels
from cctool.transforms.layers.axes import KLT, MAX_KLT_LENGTH, TransformedAxis
from cctool.transforms.layers.base import with_swaps
from cctool.transforms.layers.build import coefficient_layer
from cctool.transforms.layers.coefficients import CoefficientLayer, Coefficients
from cctool.transforms.layers.keep import chosen
from cctool.transforms.layers.which import SelectedLayer, SkippedLayer, select_layers, transformed_axes
from cctool.transforms.swap import put_in_place


@dataclass(frozen=True)
class _Coded:
    """One layer before, and the one that replaces it."""

    selected: SelectedLayer
    layer: CoefficientLayer

    @property
    def name(self) -> str:
        """Its first name."""
        return self.selected.names[0]


def run(checkpoint: Checkpoint, options: TransformOptions, context: Context) -> Iterator[Outcome]:
    """Transform the selected layers of the network in place.

    Raises:
        UsageError: if the kernel is unknown, options do not fit it, or a pattern matches nothing.
        TransformError: if no layer can be transformed.
    """
    _check(options)
    selected, skipped = select_layers(checkpoint.model, options.weights.layers)
    source = open_source(options.data, checkpoint, context)
    before = measured_splits(checkpoint, source, options.data, context)
    # Sizes as in a file, before the layers are replaced in place.
    stored = events.stored(checkpoint, context.tables, settle=False)
    bytes_before = {item.names[0]: layer_bytes(stored, item.names[0]) for item in selected}
    network_before = stored_bytes(stored)
    coded, untouched = _coded(selected, options, context)
    skipped = [*skipped, *untouched]
    if not coded:
        raise TransformError(f"nothing is left to transform: {'; '.join(counted(skipped))}")
    notes = [*_notes(checkpoint, coded, options), *counted(skipped)]
    product = _with_layers(checkpoint, coded, options.weights)
    product, followed = events.changed(product, source, options.data, context)
    after = measured_splits(product, source, options.data, context)
    layers = tuple(
        coded_layer_report(item.name, item.selected.plain, item.layer, bytes_before[item.name], product)
        for item in coded
    )
    notes += followed
    notes += [
        f"{layer.name} does not shrink: {layer.bytes_before:,} -> {layer.bytes_after:,} bytes"
        for layer in layers
        if layer.bytes_after > layer.bytes_before
    ]
    report = TransformWeightsReport(
        kernel=options.kernel,
        layers=layers,
        skipped=tuple(skipped),
        bytes_before=network_before,
        bytes_after=stored_bytes(product),
        metrics_before=before,
        metrics_after=after,
        notes=tuple(notes),
    )
    yield Outcome(product, report, metrics_before=before, metrics_after=after, notes=tuple(notes))


def with_coefficients(checkpoint: Checkpoint, options: TransformOptions, context: Context) -> Checkpoint:
    """Transform the selected layers of the network in place, as `run`, without measuring anything."""
    _check(options)
    selected, skipped = select_layers(checkpoint.model, options.weights.layers)
    coded, untouched = _coded(selected, options, context)
    if not coded:
        raise TransformError(f"nothing is left to transform: {'; '.join(counted([*skipped, *untouched]))}")
    return _with_layers(checkpoint, coded, options.weights)


def _check(options: TransformOptions) -> None:
    kernel, weights = options.kernel, options.weights
    kernels.check_kernel(kernel, klt=True)
    if weights.levels is not None and not kernels.is_wavelet(kernel):
        raise UsageError(f"--levels {weights.levels}: {kernel} has none; wavelets do")
    if weights.select is Select.CORNER and kernel == "identity":
        raise UsageError("--select corner: identity has no frequencies; --select energy keeps the largest")


def _coded(
    selected: Sequence[SelectedLayer], options: TransformOptions, context: Context
) -> tuple[list[_Coded], list[SkippedLayer]]:
    """Layers of coefficients for the selected ones, and layers that cannot be transformed, with reasons."""
    weights, coded, untouched = options.weights, [], []
    for item in context.reporter.progress(selected, "transforming", len(selected)):
        axes = transformed_axes(
            item.plain.weight, options.kernel, axes=weights.axes, block=weights.block, levels=weights.levels
        )
        small = f"it has only {weights.axes or 'channel and spatial'} axes of size 1"
        reason = _too_long(axes) if axes else small
        if reason:
            untouched.append(SkippedLayer(item.names[0], reason))
        else:
            coded.append(_Coded(item, coefficient_layer(item.plain, Coefficients(axes=axes))))
    return coded, untouched


def _too_long(axes: Sequence[TransformedAxis]) -> str:
    lengths = [axis.length for axis in axes if axis.kernel == KLT and axis.length > MAX_KLT_LENGTH]
    if not lengths:
        return ""
    return f"klt of {lengths[0]:,} channels at once takes too long; --block {MAX_KLT_LENGTH // 8} takes fewer"


def _with_layers(checkpoint: Checkpoint, coded: Sequence[_Coded], weights: WeightOptions) -> Checkpoint:
    """Put the layers into the network, mask coefficients that are not kept, and update the spec."""
    model = checkpoint.model
    for item in coded:
        # New modules are in training mode.
        item.layer.train(item.selected.layer.training)
        put_in_place(model, item.name, item.layer)
    masks = chosen({item.name: item.layer for item in coded}, weights)
    add_masks(model, {f"{name}.coefficients": mask for name, mask in masks.items()})
    stored = {name: form for name, form in checkpoint.stored.items() if not _belongs(name, coded)}
    spec = with_swaps(checkpoint.spec, model)
    return events.masked(replace(checkpoint, spec=spec, stored=stored, resume=None))


def _belongs(tensor: str, coded: Sequence[_Coded]) -> bool:
    """Whether a tensor is the weight of a replaced layer, or one that the weight was computed from."""
    owner, _, leaf = tensor.rpartition(".")
    return leaf not in ("bias", mask_name("bias")) and any(owner in item.selected.names for item in coded)


def _notes(checkpoint: Checkpoint, coded: Sequence[_Coded], options: TransformOptions) -> list[str]:
    rounded = {k: form for k, form in events.forms_of(checkpoint).items() if _belongs(k, coded)}
    again = sum(isinstance(item.selected.layer, CoefficientLayer) for item in coded)
    notes = [
        f"{n} weights were stored as {form}: what they decode to was transformed; "
        "`cctool quantize` stores the coefficients so"
        for form, n in Counter(_inner(form) for form in rounded.values()).items()
    ]
    if again:
        notes.append(f"{again} layers were transformed already: their weights were, anew")
    if checkpoint.resume is not None:
        notes.append("the state of the optimizer belongs to the weights, and was dropped")
    blocked = any(axis.block for item in coded for axis in item.layer.arguments.axes)
    if options.weights.block is not None and not blocked:
        notes.append(f"--block {options.weights.block}: no transformed channel axis is longer")
    return notes


def _inner(form: EncodedTensor) -> str:
    inner = form.parameters.get("inner")
    return inner if isinstance(inner, str) else form.encoding
