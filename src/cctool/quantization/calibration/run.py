"""Ranges of activations, found on images that pass through the network in floating point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from cctool.base.errors import QuantizationError
from cctool.base.networks import in_eval_mode
from cctool.quantization.calibration.observers import RangeObserver, make_observer
from cctool.quantization.network.attach import following_values, quantizers_of
from cctool.quantization.network.points import Observing
from cctool.quantization.quantizers.base import Quantizer


def observe(
    model: nn.Module, images: Iterable[Tensor], make: Callable[[str], RangeObserver | None]
) -> dict[str, RangeObserver]:
    """Pass the activations at all places to observers.

    Args:
        model: with quantizers, which are bypassed meanwhile.
        images: batches on its device.
        make: returns the observer for a key; None for no observer.

    Returns:
        Observers by key, in order of execution.

    Raises:
        QuantizationError: if there are no images.
    """
    observers: dict[str, RangeObserver] = {}
    ignored: set[str] = set()

    def follow(key: str, value: Tensor) -> None:
        if key in ignored:
            return
        if key not in observers:
            made = make(key)
            if made is None:
                ignored.add(key)
                return
            observers[key] = made
        observers[key].observe(value)

    seen = 0
    with torch.no_grad(), in_eval_mode(model), following_values(model, follow):
        for batch in images:
            model(batch)
            seen += len(batch)
    if not seen:
        raise QuantizationError("there are no images to find ranges on")
    return observers


def observer_of(observing: Observing, quantizer: Quantizer) -> RangeObserver:
    """An observer for the bits of a quantizer."""
    config = quantizer.config
    return make_observer(
        observing.observer,
        bits=config.bits - config.reduce_range,
        symmetric=config.symmetric,
        percentile=observing.percentile,
        n_std=observing.deviations,
    )


def calibrate_activations(
    model: nn.Module, images: Iterable[Tensor], observing: Observing
) -> Mapping[str, RangeObserver]:
    """Set the ranges of the uniform quantizers of activations, in place; learned ones are not changed.

    Images are batches on the model's device.
    """
    held = quantizers_of(model)
    assert held is not None
    chosen = {
        key: quantizer
        for key in held.activation_keys
        if (quantizer := held.quantizer(key)) is not None and quantizer.config.method == "uniform"
    }

    def make(key: str) -> RangeObserver | None:
        return observer_of(observing, chosen[key]) if key in chosen else None

    observers = observe(model, images, make)
    for key, observer in observers.items():
        chosen[key].set_range(*observer.bounds())
    return observers
