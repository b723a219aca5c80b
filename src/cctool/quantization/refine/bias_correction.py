"""Bias correction: removes the mean error that quantization causes in each layer's output.

M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section
4.2 and supplementary material D, where the expected error is measured on images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import QuantizationError
from cctool.base.networks import in_eval_mode
from cctool.base.runtime import Reporter, Silent
from cctool.quantization.network.attach import EndOfPassError, following_calls, norm_factors, quantizers_of
from cctool.quantization.network.calls import CallSite, Flow, channel_dim
from cctool.quantization.network.placement import Left, PlacedLayer, plan_points


@dataclass(frozen=True)
class CorrectedLayer:
    """The correction of one layer.

    Attributes:
        layer: its name.
        into: qualified name of the parameter that was changed.
        error: root mean square over channels of the mean error before.
        size: root mean square over channels of the mean floating-point output, for comparison.
    """

    layer: str
    into: str
    error: float
    size: float


@dataclass(frozen=True)
class BiasReport:
    """What was corrected.

    Attributes:
        layers: in order of execution.
        skipped: quantized layers that were not corrected, and why.
        images: number of images.
    """

    layers: tuple[CorrectedLayer, ...]
    skipped: tuple[Left, ...]
    images: int


@torch.no_grad()
def correct_biases(
    model: nn.Module,
    flow: Flow,
    images: Iterable[Tensor],
    reporter: Reporter | None = None,
    *,
    reference: nn.Module | None = None,
) -> BiasReport:
    """Correct the layers that have quantizers, in place and in order of execution.

    For each channel, the mean over images and places of the layer's floating-point output, minus that in the
    quantized network whose previous layers are corrected, is added to the layer's bias, or, scaled, to the
    shift of the batch norm behind it. Takes one pass over the images for the floating-point network, and one
    for each layer, up to that layer.

    Args:
        model: with quantizers whose ranges are set; it is run in evaluation mode.
        flow: of the network without quantizers.
        images: batches on its device, the same in every iteration.
        reporter: gets the progress.
        reference: a copy of ``model``, with its quantizers, that has the parameters of the floating-point
            network; None if ``model`` still has them. It must be copied before weights are rounded.

    Raises:
        QuantizationError: if there are no images.
    """
    reporter = reporter or Silent()
    held = quantizers_of(model)
    places = held.state.calls if held is not None else {}
    placed = plan_points(flow, "none").layers
    layers = [layer for layer in placed if layer.place in places]
    # All floating-point means are measured before the first correction changes the model.
    reference = reference if reference is not None else model
    with in_eval_mode(model), in_eval_mode(reference):
        expected, seen = _means(reference, images, [layer.place for layer in layers], quantized=False)
        targets = {layer.place: _target(model, flow, layer) for layer in layers}
        corrected = []
        for layer in reporter.progress(layers, "correcting biases", len(layers)):
            into = targets[layer.place]
            if isinstance(into, Left):
                continue
            found, _ = _means(model, images, [layer.place], quantized=True)
            error = expected[layer.place] - found[layer.place]
            parameter = model.get_parameter(into)
            factors = _factors(model, layer, into)
            parameter.add_((error if factors is None else error * factors).to(parameter.dtype))
            corrected.append(
                CorrectedLayer(layer.place.title, into, _size(error), _size(expected[layer.place]))
            )
    skipped = [found for found in targets.values() if isinstance(found, Left)]
    skipped += [
        Left(layer.place.title, "its weight is computed, and not rounded where it is called")
        for layer in placed
        if layer.kernel is not None and layer.place not in places
    ]
    return BiasReport(tuple(corrected), tuple(skipped), seen)


def _means(
    model: nn.Module, images: Iterable[Tensor], places: Sequence[CallSite], *, quantized: bool
) -> tuple[dict[CallSite, Tensor], int]:
    """Mean output of each channel at places, float64 (C,), and the number of images."""
    sums: dict[CallSite, Tensor] = {}
    counts: Counter[CallSite] = Counter()

    def follow(place: CallSite, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        if place not in places:
            return
        rows = result.movedim(channel_dim(place, result.dim()), 0).flatten(1)
        sums[place] = sums.get(place, 0) + rows.sum(1, dtype=torch.float64)
        counts[place] += rows.shape[1]
        # Places are in order of execution, so the rest of the pass is not needed.
        if place == places[-1]:
            raise EndOfPassError

    seen = 0
    with following_calls(model, follow, quantized=quantized):
        for batch in images:
            with suppress(EndOfPassError):
                model(batch)
            seen += len(batch)
    if not seen:
        raise QuantizationError("there are no images to correct biases on")
    return {place: total / counts[place] for place, total in sums.items()}, seen


def _target(model: nn.Module, flow: Flow, layer: PlacedLayer) -> str | Left:
    """Name of the parameter to which a constant can be added for a layer's output."""
    call = flow.at(layer.place)
    parameters = dict(model.named_parameters())
    uses = Counter(name for other in flow.calls for name in other.tensors.values())
    name = call.tensors.get("bias")
    if name is None and layer.norm is not None:
        name = flow.calls[call.users[0]].tensors.get("bias")
    if name is None or name not in parameters:
        return Left(layer.place.title, "neither it nor a batch norm behind it has a bias")
    if uses[name] > 1:
        return Left(layer.place.title, f"{name} is used {uses[name]} times")
    return name


def _factors(model: nn.Module, layer: PlacedLayer, into: str) -> Tensor | None:
    """Factors of the batch norm between a layer's output and the changed shift; None if there is none."""
    if layer.norm is None or into.rpartition(".")[0] != layer.norm:
        return None
    return norm_factors(model.get_submodule(layer.norm))


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
