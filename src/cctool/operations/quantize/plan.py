"""From options to quantizers: which weights and activations get one, of which kind, with how many bits."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from cctool.base.errors import QuantizationError, UsageError
from cctool.base.networks import qualified, some
from cctool.base.patterns import refuse_unmatched
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations.data import example
from cctool.operations.quantize.report import GROWS
from cctool.options.quantize.choices import CLIPPING, TRAINED, Edges, QuantizeMethod
from cctool.options.quantize.options import QuantizeOptions
from cctool.options.quantize.parts import LayerBits
from cctool.quantization.network.attach import attach
from cctool.quantization.network.calls import CallSite, Flow, flow_of, training_shapes
from cctool.quantization.network.placement import (
    Activation,
    Left,
    PlacedLayer,
    Points,
    Way,
    plan_points,
    stored_alone,
)
from cctool.quantization.network.points import CallPoint, WeightPoint
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.transforms.codec.taps import bypassed

# Of first and last layers with --edges 8.
_EDGE_BITS = 8
# Of the moving average of an activation's range while the network trains.
_MOMENTUM = 0.99
# Of the tensors that a weight is made of; as many as a file may list.
_MOST_NAMES = 1000


@dataclass(frozen=True)
class Plan:
    """What is quantized how.

    Attributes:
        flow: calls of one forward pass, and the tensors between them.
        points: layers and activations that could be quantized.
        weights: quantizers by the weight's name.
        activations: quantizers by activation.
        left: layers and activations that stay in floating point, and why.
    """

    flow: Flow
    points: Points
    weights: Mapping[str, WeightPoint]
    activations: Mapping[Activation, QuantizerConfig]
    left: tuple[Left, ...]

    @property
    def layers(self) -> tuple[PlacedLayer, ...]:
        """Layers whose weight is quantized; of layers that share a weight the first."""
        first: dict[str, PlacedLayer] = {}
        for layer in self.points.layers:
            if layer.weight in self.weights:
                first.setdefault(layer.weight, layer)
        return tuple(first.values())

    @property
    def kernels(self) -> dict[str, Tensor]:
        """Values, before they are quantized, of the quantized weights that are no parameters, by name."""
        found = self.flow.kernels
        return {name: found[name].value for name in self.weights if name in found}


def plan(checkpoint: Checkpoint, options: QuantizeOptions, bits: Mapping[str, int] | None = None) -> Plan:
    """Decide what is quantized how, in a network without quantizers.

    ``bits`` by the weight's name, as a search has chosen them, overrule the options.

    Raises:
        UsageError: if a pattern matches no layer.
        QuantizationError: if there is nothing to quantize.
    """
    model = checkpoint.model
    with bypassed(model):
        inputs = example(checkpoint)
        flow = flow_of(model, inputs)
        trained = training_shapes(model, inputs) if options.method in TRAINED else None
    points = plan_points(flow, _way(options))
    if not options.activations:
        points = stored_alone(points)
    if options.activations or trained is not None:
        points = _called_alike(points, flow)
    if trained is not None:
        points = _seen_in_training(points, trained)
    names = {layer.weight: _names(layer) for layer in points.layers}
    known = sorted({name for several in names.values() for name in several})
    patterns = [*options.include, *options.exclude, *(given.pattern for given in options.layers)]
    if not known:
        raise QuantizationError("the network has no convolution and no linear layer to quantize")
    refuse_unmatched(patterns, known, "layer")
    _refuse_idle_layers(points, options)
    weights, left = _weights(points, options, bits or {})
    # An activation that only layers in floating point take stays in floating point, too.
    floats = {layer.place for layer in points.layers if layer.varies or layer.weight not in weights}
    activations = {
        activation: config
        for activation in points.activations
        if not (activation.takers and floats.issuperset(activation.takers))
        and (config := _activation(activation, points, options)) is not None
    }
    if not weights and all(layer.at_call for layer in points.layers):
        raise QuantizationError(f"nothing is left to quantize: {_reasons(left, _looped(flow).values())}")
    used = {name for layer in points.layers if layer.kernel is not None for name in layer.kernel.made_of}
    if options.activations:
        # Weights alone are stored in few bits whatever takes them.
        left += [Left(place.title, "only some inputs reach it") for place in flow.elsewhere]
        left += [item for item in points.left if item not in left]
        left += [*_other_weights(model, used.union(names), flow)]
    return Plan(flow, points, weights, activations, tuple(left))


def _reasons(left: Collection[Left], looped: Collection[str]) -> str:
    """Why layers stay in floating point; of those in loops their names and a way out."""
    names: dict[str, list[str]] = {}
    for item in left:
        names.setdefault(item.reason, []).append(item.name)
    return "; ".join(
        f"{some(found)}: {reason}; --method int8 --weight-only stores weights in few bits"
        if reason in looped
        else reason
        for reason, found in names.items()
    )


def _looped(flow: Flow) -> dict[CallSite, str]:
    return {call.place: call.looped for call in flow.calls if call.looped}


def _called_alike(points: Points, flow: Flow) -> Points:
    """The layers, of which those vary that are called in a loop of varying length.

    A call has a range, and is rounded, by its number: those of a larger batch than the traced one have none.
    """
    looped = _looped(flow)
    return replace(
        points,
        layers=tuple(
            replace(layer, varies=layer.varies or looped.get(layer.place, "")) for layer in points.layers
        ),
    )


def _seen_in_training(points: Points, shapes: Mapping[CallSite, tuple[int, ...]]) -> Points:
    """The layers, of which those vary whose weight no training pass would see."""
    reason = "in training another computation takes its place"
    return replace(
        points,
        layers=tuple(
            layer if layer.varies or shapes.get(layer.place) == layer.shape else replace(layer, varies=reason)
            for layer in points.layers
        ),
    )


def _way(options: QuantizeOptions) -> Way:
    if not options.activations:
        return "none"
    if options.method in CLIPPING:
        return "clips"
    return "inputs" if options.method is QuantizeMethod.LSQ else "all"


def _names(layer: PlacedLayer) -> tuple[str, ...]:
    """Names that a pattern may match: the layer's module, the weight's module, and the weight."""
    owner = layer.weight.rpartition(".")[0]
    own = () if layer.kernel is None else (qualified(layer.place.module, "weight"),)
    return tuple(dict.fromkeys((layer.place.module, owner, layer.weight, *own)))


def _matches(pattern: str, layer: PlacedLayer) -> bool:
    return any(fnmatchcase(name, pattern) for name in _names(layer))


def _refuse_idle_layers(points: Points, options: QuantizeOptions) -> None:
    """Refuse bits of layers that an item of ``--layer`` before, or another option, decides."""
    for given in options.layers:
        found = [layer for layer in points.layers if _matches(given.pattern, layer)]
        if all(_override(layer, options) is not given for layer in found):
            raise UsageError(
                f"--layer {given.pattern} never counts, because one before it names the same layers"
            )
        if all(_left_out(layer, options) for layer in found):
            raise UsageError(
                f"--layer {given.pattern} never counts: {_left_out(found[0], options)} leaves its layers out"
            )


def _left_out(layer: PlacedLayer, options: QuantizeOptions) -> str:
    """The option that leaves a layer in floating point whatever ``--layer`` says; "" if none does."""
    if any(_matches(pattern, layer) for pattern in options.exclude):
        return "--exclude"
    wanted = not options.include or any(_matches(pattern, layer) for pattern in options.include)
    return "" if wanted else "--include"


def _override(layer: PlacedLayer, options: QuantizeOptions) -> LayerBits | None:
    return next((given for given in options.layers if _matches(given.pattern, layer)), None)


def _weights(
    points: Points, options: QuantizeOptions, bits: Mapping[str, int]
) -> tuple[dict[str, WeightPoint], list[Left]]:
    found: dict[str, WeightPoint] = {}
    left: list[Left] = []
    for layer in points.layers:
        reason = _unwanted(layer, options)
        if reason:
            left.append(Left(layer.place.title, reason))
        elif layer.weight not in found and not _encoded_directly(layer):
            config = _weight_config(layer, options, bits.get(layer.weight))
            channels = None if config.axis is None else layer.shape[config.axis]
            if not options.activations and _grows(layer, config, channels or 1):
                left.append(Left(layer.weight, GROWS))
                continue
            # With one scale for all channels the weight is rounded as if the batch norm were folded in.
            folded = config.method == "uniform" and config.axis is None and layer.axis == 0
            norm = layer.norm if folded else None
            made_of = layer.kernel.made_of if layer.kernel is not None and layer.at_call else ()
            point = WeightPoint(config=config, channels=channels, norm=norm, made_of=made_of[:_MOST_NAMES])
            found[layer.weight] = point
    # A loop calls one layer several times.
    return found, list(dict.fromkeys(left))


def _grows(layer: PlacedLayer, config: QuantizerConfig, channels: int) -> bool:
    """Whether a float32 weight takes fewer bytes than its integers, with a scale for each of the channels."""
    count = math.prod(layer.shape)
    scales = 4 * channels + (0 if config.symmetric else channels)
    return -(-count * config.effective_bits // 8) + scales > 4 * count


def _encoded_directly(layer: PlacedLayer) -> bool:
    """Whether a layer's weight is made of parameters that are rounded without regard to layers."""
    return not layer.at_call and (layer.kernel is None or layer.kernel.own is None)


def _unwanted(layer: PlacedLayer, options: QuantizeOptions) -> str:
    """Why a layer stays in floating point; "" if it does not."""
    given = _override(layer, options)
    if any(_matches(pattern, layer) for pattern in options.exclude):
        return "--exclude"
    if options.include and not any(_matches(pattern, layer) for pattern in options.include):
        return "no --include matches it"
    if given is not None and given.weights is None:
        return f"--layer {given.pattern}=float"
    if given is None and _edge(layer, options) is Edges.FLOAT:
        return "the first or the last layer (--edges float)"
    return "its weight has no elements" if 0 in layer.shape else layer.varies


def _edge(layer: PlacedLayer, options: QuantizeOptions) -> Edges | None:
    """What ``--edges`` says of a first or last layer; None for others, and for weights alone."""
    return options.effective_edges if options.activations and (layer.first or layer.last) else None


def fixed_bits(layer: PlacedLayer, options: QuantizeOptions) -> int | None:
    """Bits that the options give one layer by name or as a first or last layer; None if they do not."""
    given = _override(layer, options)
    if given is not None and given.weights is not None:
        return given.weights
    return _EDGE_BITS if _edge(layer, options) is Edges.EIGHT else None


def _weight_config(layer: PlacedLayer, options: QuantizeOptions, searched: int | None) -> QuantizerConfig:
    given = _override(layer, options)
    method, bits, per_channel = options.method, options.bits, options.channelwise
    uniform = not (method in CLIPPING or method is QuantizeMethod.LSQ)
    if searched is not None:
        bits = searched
    elif given is not None and given.weights is not None:
        bits = given.weights
    elif _edge(layer, options) is Edges.EIGHT:
        # Methods for few bits have no use at 8: first and last layers get a plain uniform quantizer.
        uniform, per_channel = uniform or bits != _EDGE_BITS, per_channel or not uniform
        bits = _EDGE_BITS
    axis = layer.axis if per_channel else None
    reduced = options.reduced_range and bits == _EDGE_BITS
    if not uniform:
        if method is QuantizeMethod.LSQ:
            return QuantizerConfig(method="lsq", bits=bits, axis=axis, reduce_range=reduced)
        return QuantizerConfig(method="wrpn" if method is QuantizeMethod.WRPN else "dorefa", bits=bits)
    return QuantizerConfig(
        method="uniform",
        bits=bits,
        symmetric=not options.asymmetric,
        narrow=not options.asymmetric,
        axis=axis,
        # With few bits the range of least error is narrower than the weight's; None keeps it in training.
        momentum=0.0 if bits >= _EDGE_BITS or method is QuantizeMethod.QAT else None,
        reduce_range=reduced,
    )


def _activation(activation: Activation, points: Points, options: QuantizeOptions) -> QuantizerConfig | None:
    method, bits = options.method, options.bits_of_activations
    given = [
        override.activations
        for layer in points.layers
        if layer.place in activation.takers
        and (override := _override(layer, options)) is not None
        and override.activations is not None
    ]
    if given:
        # Layers that share an input share its quantizer: the one that wants most bits decides.
        bits = max(given)
    elif activation.edge and options.effective_edges is Edges.FLOAT:
        return None
    elif activation.edge and options.effective_edges is Edges.EIGHT:
        bits = _EDGE_BITS
        if method in CLIPPING or method is QuantizeMethod.LSQ:
            return _uniform(bits, options)
    if method in CLIPPING:
        if not activation.clip:
            return _uniform(bits, options)
        return QuantizerConfig(method=_CLIPS[method], bits=bits, signed=False)
    if method is QuantizeMethod.LSQ:
        return QuantizerConfig(method="lsq", bits=bits, signed=False)
    return _uniform(bits, options)


_CLIPS: dict[QuantizeMethod, Any] = {
    QuantizeMethod.PACT: "pact",
    QuantizeMethod.DOREFA: "dorefa",
    QuantizeMethod.WRPN: "wrpn",
}


def _uniform(bits: int, options: QuantizeOptions) -> QuantizerConfig:
    return QuantizerConfig(
        method="uniform", bits=bits, signed=False, symmetric=options.calibration.symmetric, momentum=_MOMENTUM
    )


def _other_weights(model: nn.Module, layers: Collection[str], flow: Flow) -> list[Left]:
    """Parameters of two or more dimensions that no convolution or linear layer is known to use."""
    called = {call.place.module for call in flow.calls}
    constant = {call.weight for call in flow.calls if call.constant}
    # What such a weight was made of before the pass is not known.
    unseen = {call.place.module for call in flow.calls if call.kernel is not None and not call.kernel.made_of}

    def reason(name: str) -> str:
        module = name.rpartition(".")[0]
        if name in constant:
            return "what its layer takes in does not depend on the network's input"
        if module in unseen:
            return "its layer takes a weight of which it is not known what it was made of"
        if module in called:
            return "no convolution and no linear layer takes it"
        return "the traced pass does not reach its module"

    return [
        Left(name, reason(name))
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in layers
    ]


def attach_plan(model: nn.Module, planned: Plan) -> None:
    """Attach the quantizers of a plan to a network, in place, without ranges."""
    calls: dict[CallSite, dict[str, Any]] = {}
    for layer in planned.points.layers:
        if layer.weight in planned.weights and layer.at_call and not layer.varies:
            calls.setdefault(layer.place, {})["weight"] = layer.weight
    for activation, config in planned.activations.items():
        calls.setdefault(activation.place, {})[activation.slot] = config
    attach(model, planned.weights, {place: CallPoint(**given) for place, given in calls.items()})
