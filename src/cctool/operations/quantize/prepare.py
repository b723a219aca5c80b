"""Prepare a network for quantization: floating point, ordinary layers, quantizers attached and calibrated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cctool.base.networks import copied, several
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations.context import Context
from cctool.operations.keep import events
from cctool.operations.keep.encode import computed_weights, quantized_weights
from cctool.operations.quantize.plan import Plan, attach_plan
from cctool.operations.quantize.report import ActivationReport
from cctool.options.quantize.options import QuantizeOptions
from cctool.quantization.calibration.observers import RangeObserver
from cctool.quantization.calibration.run import observe, observer_of
from cctool.quantization.calibration.weight_ranges import fit_computed, fit_weight
from cctool.quantization.network.attach import (
    attach,
    detach,
    fold_of,
    following_values,
    held_by,
    quantizers_of,
)
from cctool.quantization.network.edit import with_quantizers
from cctool.quantization.network.placement import Activation, Left
from cctool.quantization.network.points import CallPoint, Observing, activation_key, weight_key
from cctool.quantization.quantizers.base import Quantizer
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.transforms.codec.taps import drop_taps, set_taps, with_taps
from cctool.transforms.layers.base import swapped_layers


def in_floats(checkpoint: Checkpoint, context: Context, *, ordinary: bool) -> tuple[Checkpoint, list[str]]:
    """A copy without quantizers, whose weights have the values that the quantizers gave, and notes.

    With ``ordinary`` layers in a transform domain become ordinary ones, too.
    """
    notes = []
    product = replace(checkpoint, model=copied(checkpoint.model), resume=None)
    model, held = product.model, quantizers_of(checkpoint.model)
    if held is not None:
        notes.append(
            f"the quantizers of --method {held.state.method or 'an earlier step'} were taken off; weights "
            "keep the values that these made"
        )
        with torch.no_grad():
            for _, parameter, quantizer, fold in quantized_weights(model):
                parameter.copy_(quantizer.eval()(parameter, fold))
        computed = computed_weights(model)
        if computed:
            notes.append(
                f"{several(len(computed), 'computed weight')} took again the values that the parameters give"
            )
        detach(model)
        product = replace(product, spec=with_quantizers(product.spec, model), stored={})
    swapped = swapped_layers(model)
    if ordinary and swapped:
        # The plain network has no codecs: they are taken off before, and put on again after.
        taps = drop_taps(model)
        product = events.plain_checkpoint(replace(product, model=model))
        set_taps(product.model, taps)
        product = replace(product, spec=with_taps(product.spec, product.model))
        left = swapped_layers(product.model)
        notes.append(
            f"{several(len(swapped) - len(left), 'layer')} in a transform domain became ordinary: integer "
            "kernels take weights, not coefficients"
        )
    return events.decoded(product, context) if product.stored else product, notes


def attached(checkpoint: Checkpoint, planned: Plan) -> Checkpoint:
    """The checkpoint with a plan's quantizers attached in place; those of weights have their ranges."""
    model = checkpoint.model
    attach_plan(model, planned)
    fit_weights(model, planned)
    return replace(checkpoint, spec=with_quantizers(checkpoint.spec, model), stored={})


def fit_weights(model: nn.Module, planned: Plan) -> None:
    """Set the ranges of a plan's weights, in place, as calls take them."""
    held = held_by(model)
    for _, parameter, quantizer, fold in quantized_weights(model):
        fit_weight(quantizer, parameter.detach(), fold)
    for name, value in planned.kernels.items():
        found = held.quantizer(weight_key(name))
        assert found is not None
        fit_computed(found, value, fold_of(model, planned.weights[name]))


def observing(options: QuantizeOptions) -> Observing:
    """The options by which ranges of activations are found."""
    asked = options.calibration
    return Observing(observer=asked.observer, percentile=asked.percentile, deviations=asked.deviations)


class _Watching:
    """An observer that also remembers the smallest finite value."""

    def __init__(self, observer: RangeObserver) -> None:
        self.observer = observer
        self.low: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        self.observer.observe(x)
        finite = x.detach()
        finite = finite[torch.isfinite(finite)]
        if finite.numel():
            low = finite.min()
            self.low = low if self.low is None else torch.minimum(self.low, low)

    @property
    def negative(self) -> bool:
        return self.low is not None and bool(self.low < 0)


def calibrated(
    model: nn.Module, planned: Plan, images: Iterable[Tensor], observing: Observing
) -> tuple[ActivationReport, ...]:
    """Find the ranges of a plan's activations in place, on batches that can be iterated several times.

    Activations that no image reaches lose their quantizer, see `unreached`. Symmetric quantizers of
    activations with negative values become signed. The steps of LSQ start as its paper says.
    """
    held = quantizers_of(model)
    assert held is not None
    chosen = {activation_key(a.place, a.slot): (a, config) for a, config in planned.activations.items()}
    observers: dict[str, _Watching] = {}

    def make(key: str) -> RangeObserver | None:
        quantizer = held.quantizer(key)
        if key not in chosen or quantizer is None or not quantizer.has_range:
            return None
        observers[key] = _Watching(observer_of(observing, quantizer))
        return observers[key]  # type: ignore[return-value]

    observe(model, images, make)
    for key, (activation, _) in list(chosen.items()):
        quantizer = held.quantizer(key)
        if key not in observers and quantizer is not None and quantizer.has_range:
            # Without a range it would make a constant of whatever comes.
            held.drop(activation.place, activation.slot)
            del chosen[key]
    # Signs first: they need other quantizers, which then get the ranges.
    for key, watching in observers.items():
        activation, config = chosen[key]
        if config.symmetric and watching.negative and config.method in ("uniform", "lsq"):
            _replace(model, activation, config.model_copy(update={"signed": True}))
    learnt = {key for key, (_, config) in chosen.items() if config.method == "lsq"}
    for key, watching in observers.items():
        quantizer = held.quantizer(key)
        if quantizer is not None and key not in learnt:
            quantizer.set_range(*watching.observer.bounds())
    if learnt:
        _initialise(model, learnt, images)
    clipped = _clipped(model, set(chosen), images)
    return tuple(
        _report(activation, held.quantizer(key), observers.get(key), clipped.get(key))
        for key, (activation, _) in chosen.items()
    )


def reported(model: nn.Module, planned: Plan) -> tuple[ActivationReport, ...]:
    """Report on the activations of a plan as they are quantized now."""
    held = held_by(model)
    found = {a: held.quantizer(activation_key(a.place, a.slot)) for a in planned.activations}
    return tuple(_report(a, quantizer, None, None) for a, quantizer in found.items() if quantizer is not None)


def unreached(model: nn.Module, planned: Plan) -> tuple[Left, ...]:
    """Activations of a plan that stay in floating point because no image of the calibration reached them."""
    held = held_by(model)
    return tuple(
        Left(a.place.title, f"no calibration image reached {a.place.function}, whose {a.slot} has no range")
        for a in planned.activations
        if held.quantizer(activation_key(a.place, a.slot)) is None
    )


def _replace(model: nn.Module, activation: Activation, config: QuantizerConfig) -> None:
    held = quantizers_of(model)
    assert held is not None
    point: CallPoint = held.state.calls[activation.place]
    attach(model, {}, {activation.place: point.model_copy(update={activation.slot: config})})


def _initialise(model: nn.Module, keys: set[str], images: Iterable[Tensor]) -> None:
    held, done = quantizers_of(model), set[str]()
    assert held is not None

    def follow(key: str, value: Tensor) -> None:
        quantizer = held.quantizer(key)
        if key in keys and key not in done and quantizer is not None:
            quantizer.initialise(value.detach())
            done.add(key)

    with torch.no_grad(), following_values(model, follow):
        for batch in images:
            model(batch)
            # The paper sets the step from the first batch.
            return


def _clipped(model: nn.Module, keys: set[str], images: Iterable[Tensor]) -> dict[str, float]:
    """Percent of the values of each activation that are more than half a step outside its range."""
    held = quantizers_of(model)
    assert held is not None
    ends = {key: _ends(quantizer) for key in keys if (quantizer := held.quantizer(key)) is not None}
    outside: dict[str, Tensor] = {}
    total: dict[str, int] = {}

    def follow(key: str, value: Tensor) -> None:
        if key in ends:
            low, high, half = ends[key]
            found = ((value < low - half) | (value > high + half)).sum()
            outside[key] = outside[key] + found if key in outside else found
            total[key] = total.get(key, 0) + value.numel()

    with torch.no_grad(), following_values(model, follow):
        for batch in images:
            model(batch)
    return {key: 100 * float(found) / max(1, total[key]) for key, found in outside.items()}


def _ends(quantizer: Quantizer) -> tuple[float, float, float]:
    """Smallest and largest value of a quantizer's grid, and half a step; zeros without a uniform grid."""
    grid = quantizer.grid()
    if grid is None:
        return 0.0, 0.0, 0.0
    scale, zero = float(grid.scale), int(grid.zero_point)
    return (grid.low - zero) * scale, (grid.high - zero) * scale, scale / 2


def _report(
    activation: Activation, quantizer: Quantizer | None, watching: _Watching | None, clipped: float | None
) -> ActivationReport:
    assert quantizer is not None
    ends, place = _ends(quantizer), activation.place
    return ActivationReport(
        name=place.title,
        what=f"{activation.slot} of {place.function}" if place.function != "input" else "the network's input",
        method=quantizer.config.method,
        bits=quantizer.config.bits,
        low=ends[0],
        high=ends[1],
        clipped=clipped,
        nonfinite=0 if watching is None else watching.observer.nonfinite,
    )
