"""AdaRound: rounds weights up or down so that each layer's output is preserved, not each weight.

M. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, section 3.3.
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
from cctool.base.networks import copied, in_eval_mode
from cctool.base.runtime import Reporter, Silent
from cctool.checkpoint.edits.mask import masks_of
from cctool.quantization.network.attach import (
    EndOfPassError,
    NetworkQuantizers,
    following_calls,
    norm_factors,
    quantizers_of,
)
from cctool.quantization.network.calls import CallSite, Flow, FlowCall
from cctool.quantization.network.placement import Left, PlacedLayer, plan_points
from cctool.quantization.network.points import weight_key
from cctool.quantization.refine.im2col import ConvGeometry, geometry_of, outputs_at, rows_at
from cctool.quantization.refine.rounding import Rows, WeightRounding, learn

_MOST_ROWS = 2**14
_MOST_BYTES = 2**28
_GRIDS = ("uniform", "lsq", "wrpn")


@dataclass(frozen=True)
class RoundedLayer:
    """How the weight of one layer was rounded.

    Attributes:
        layer: its name.
        nearest, learned: mean squared errors of its output, after batch norm and clipping, with nearest and
            with learned rounding, on rows that were not used for learning.
        changed: fraction of the weights that the learned rounding changes.
        kept: whether the learned rounding was used; nearest rounding is used if its error is smaller.
        rows: number of output places used for learning.
    """

    layer: str
    nearest: float
    learned: float
    changed: float
    kept: bool
    rows: int


@dataclass(frozen=True)
class AdaRoundReport:
    """What was rounded.

    Attributes:
        layers: in order of execution.
        skipped: quantized layers whose rounding was not learned, and why.
        images: number of images.
        steps: per layer.
    """

    layers: tuple[RoundedLayer, ...]
    skipped: tuple[Left, ...]
    images: int
    steps: int


def adaround(
    model: nn.Module,
    flow: Flow,
    images: Iterable[Tensor],
    *,
    steps: int,
    seed: int,
    reporter: Reporter | None = None,
    reference: nn.Module | None = None,
) -> AdaRoundReport:
    """Learn the rounding of weights, layer by layer in order of execution, and round them.

    Each layer is fitted to its floating-point output, given its input in the network whose previous layers
    are quantized (eq. 25); the error includes the batch norm and the clipping behind it. Outputs of
    convolutions are compared at sampled places, at most 16,384 in all and as many as fit 256 MB of inputs, so
    that memory does not grow with the images. An eighth of them, from the last images, is held out: if the
    learned rounding is not better there, nearest rounding is used.

    Takes two passes over the images for each layer, up to that layer.

    Args:
        model: with quantizers whose ranges are set; weights are changed in place.
        flow: of the network without quantizers.
        images: batches on its device, the same in every iteration.
        steps: of Adam for each layer, 1 or more.
        seed: for places and batches.
        reporter: gets the progress.
        reference: a copy of ``model``, with its quantizers, that has the parameters of the floating-point
            network; None if ``model`` still has them, and is copied.

    Raises:
        QuantizationError: if there are no images.
    """
    reporter = reporter or Silent()
    held = quantizers_of(model)
    if held is None:
        return AdaRoundReport((), (), 0, steps)
    seen = sum(len(batch) for batch in images)
    if not seen:
        raise QuantizationError("there are no images to learn a rounding on")
    reference = copied(model) if reference is None else reference
    chosen = [_chosen(model, flow, held, layer) for layer in plan_points(flow, "none").layers]
    layers = [found for found in chosen if isinstance(found, PlacedLayer)]
    rounded = []
    with in_eval_mode(model), in_eval_mode(reference):
        for layer in reporter.progress(layers, "learning to round", len(layers)):
            # Anew for each layer, so that its result does not depend on what others drew.
            generator = torch.Generator().manual_seed(seed)
            rows = _collected(model, reference, flow, layer, images, seen, generator)
            rounded.append(_rounded(model, flow, held, layer, rows, steps, generator))
    skipped = tuple(found for found in chosen if isinstance(found, Left))
    return AdaRoundReport(tuple(rounded), skipped, seen, steps)


def _chosen(
    model: nn.Module, flow: Flow, held: NetworkQuantizers, layer: PlacedLayer
) -> PlacedLayer | Left | None:
    """The layer if its rounding can be learned, or why not; None if it is not quantized."""
    point = held.state.calls.get(layer.place)
    quantizer = held.quantizer(weight_key(layer.weight))
    if layer.kernel is not None:
        return Left(layer.place.title, "its weight is computed")
    if point is None or point.weight is None or quantizer is None:
        return None
    call = flow.at(layer.place)
    uses = Counter(name for other in flow.calls for name in other.tensors.values())
    if call.tensors.get("weight") != layer.weight or layer.weight not in dict(model.named_parameters()):
        return Left(layer.place.title, "its weight is computed")
    if call.bias is not None:
        return Left(layer.place.title, "its bias is computed")
    if uses[layer.weight] > 1:
        return Left(layer.place.title, f"{layer.weight} is used {uses[layer.weight]} times")
    if quantizer.grid() is None or quantizer.config.method not in _GRIDS:
        return Left(layer.place.title, f"the levels of {quantizer.config.method} are not evenly spaced")
    return layer


@torch.no_grad()
def _collected(
    model: nn.Module,
    reference: nn.Module,
    flow: Flow,
    layer: PlacedLayer,
    images: Iterable[Tensor],
    count: int,
    generator: torch.Generator,
) -> Rows:
    """The inputs of a layer, and the outputs it should have, at sampled places."""
    call = flow.at(layer.place)
    geometry = geometry_of(call)
    width = max(1, _row_size(call, geometry)) * 4
    most = max(1, min(_MOST_ROWS, _MOST_BYTES // width))
    inputs, targets, left = [], [], most
    for batch in images:
        wanted = _seen(reference, layer.place, batch, quantized=False)[1]
        taken = _seen(model, layer.place, batch, quantized=True)[0]
        if geometry.dims and taken.dim() == geometry.dims + 1:
            # An input without a batch dimension.
            wanted, taken = wanted[None], taken[None]
        # Rounded up, so that the last images may get fewer places or none.
        numbers, places = _places(wanted, geometry, -(-most // count), generator)
        numbers, places = numbers[:left].to(taken.device), places[:left].to(taken.device)
        inputs.append(rows_at(taken, geometry, numbers, places).float())
        targets.append(outputs_at(wanted, geometry, numbers, places).float())
        left -= len(numbers)
        if left <= 0:
            break
    return Rows(torch.cat(inputs, 1), torch.cat(targets), geometry)


def _row_size(call: FlowCall, geometry: ConvGeometry) -> int:
    """Number of inputs that one place of the output depends on, over all groups."""
    shape = call.weight_shape
    if not geometry.dims:
        return shape[1]
    size = shape[0] if geometry.transposed else shape[1] * geometry.groups
    return size * int(torch.Size(shape[2:]).numel())


def _places(
    y: Tensor, geometry: ConvGeometry, each: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Numbers of images and of places in them, ``each`` distinct ones per image."""
    size = y[0].numel() // y.shape[1 if geometry.dims else -1]
    if each >= size:
        chosen = torch.arange(size).expand(len(y), size)
    else:
        chosen = torch.stack([torch.randperm(size, generator=generator)[:each] for _ in range(len(y))])
    numbers = torch.arange(len(y))[:, None].expand_as(chosen)
    return numbers.reshape(-1), chosen.reshape(-1)


def _seen(model: nn.Module, place: CallSite, batch: Tensor, *, quantized: bool) -> tuple[Tensor, Tensor]:
    """The input and the output of a layer."""
    found: list[tuple[Tensor, Tensor]] = []

    def follow(at: CallSite, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        if at == place:
            # Later calls may modify these tensors in place, but the pass ends here.
            found.append((args[0] if args else kwargs["input"], result))
            raise EndOfPassError

    with following_calls(model, follow, quantized=quantized), suppress(EndOfPassError):
        model(batch)
    if not found:
        raise QuantizationError(f"{place.title} was not called on calibration images")
    return found[0]


def _rounded(
    model: nn.Module,
    flow: Flow,
    held: NetworkQuantizers,
    layer: PlacedLayer,
    rows: Rows,
    steps: int,
    generator: torch.Generator,
) -> RoundedLayer:
    """Learn the rounding of one layer, and round its weight."""
    quantizer = held.quantizer(weight_key(layer.weight))
    call = flow.at(layer.place)
    assert quantizer is not None
    weight = model.get_parameter(layer.weight)
    norm = model.get_submodule(layer.norm) if layer.norm is not None else None
    fold = norm_factors(norm) if norm is not None and quantizer.config.axis is None else None
    if held.state.weights[layer.weight].norm is None:
        fold = None
    rounding = WeightRounding(weight.detach(), quantizer, fold, masks_of(model).get(layer.weight))
    bias_name = call.tensors.get("bias")
    bias = model.get_parameter(bias_name).detach() if bias_name is not None else None
    after = _After(model, flow, layer)
    result = learn(rounding, rows, bias, after, steps=steps, generator=generator)
    with torch.no_grad():
        weight.copy_(rounding.chosen(result.up if result.kept else rounding.nearest))
    return RoundedLayer(
        layer.place.title, result.nearest, result.learned, result.changed, result.kept, result.rows
    )


class _After:
    """The batch norm and the clipping behind a layer, applied to outputs (P, C)."""

    def __init__(self, model: nn.Module, flow: Flow, layer: PlacedLayer) -> None:
        call = flow.at(layer.place)
        self.factors: Tensor | None = None
        self.shift: Tensor | None = None
        if layer.norm is not None:
            norm = model.get_submodule(layer.norm)
            call = flow.calls[call.users[0]]
            factors, mean = norm_factors(norm), norm._buffers["running_mean"]
            assert factors is not None
            assert mean is not None
            bias = norm._parameters.get("bias")
            self.factors = factors
            self.shift = (0 if bias is None else bias.detach()) - mean * factors
        self.ends = _clip(flow, call)

    def __call__(self, y: Tensor) -> Tensor:
        if self.factors is not None and self.shift is not None:
            y = y * self.factors + self.shift
        return y if self.ends is None else y.clamp(*self.ends)


def _clip(flow: Flow, call: FlowCall) -> tuple[float | None, float | None] | None:
    """Bounds of the clipping that is the only user of a call's result; None without."""
    if len(call.users) != 1 or flow.calls.index(call) in flow.outputs:
        return None
    user = flow.calls[call.users[0]]
    if user.place.function == "relu":
        return 0.0, None
    if user.place.function == "relu6":
        return 0.0, 6.0
    if user.place.function == "hardtanh":
        given = user.settings
        low = given.get("min_val", given.get("argument1", -1.0))
        high = given.get("max_val", given.get("argument2", 1.0))
        return float(low), float(high)
    return None
