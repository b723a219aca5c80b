"""What `cctool quantize` can be asked: the options of one run, with their checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cctool.base.errors import UsageError
from cctool.options.common import DataOptions, TaskOptions, judged
from cctool.options.fields import Idle, Options, assemble, at_least, nested, option, section
from cctool.options.quantize.choices import (
    CLIPPING,
    INTEGERS,
    TRAINED,
    CodebookInit,
    Edges,
    QuantizeMethod,
    QuantizePreset,
    Rounding,
)
from cctool.options.quantize.parts import CalibrationOptions, LayerBits, TuningOptions, parse_layer_bits
from cctool.options.target import Drop, Quantity, Target, parse_drop, parse_target

_DEFAULT_BITS: dict[QuantizeMethod, int] = {
    **INTEGERS,
    QuantizeMethod.CODEBOOK: 5,
    QuantizeMethod.APOT: 4,
    QuantizeMethod.QAT: 8,
    QuantizeMethod.LSQ: 4,
    QuantizeMethod.PACT: 4,
    QuantizeMethod.DOREFA: 4,
    QuantizeMethod.WRPN: 4,
}
_FLOATS = frozenset({QuantizeMethod.FP16, QuantizeMethod.BF16})
# Of one bit, which is no sign but chooses between two values.
_SINGLE_BITS = frozenset({QuantizeMethod.PACT, QuantizeMethod.DOREFA, QuantizeMethod.CODEBOOK})
_UNIFORM = frozenset({*INTEGERS, QuantizeMethod.QAT})
_EPOCHS = 10
_weights = section("Weights")
_activations = section("Activations")
_layers = section("Which layers")


def _choices(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(piece) for piece in text.split(",")}))
    except ValueError:
        raise UsageError(f"--choices {text}: comma-separated bits are expected, as in 2,4,8") from None


@dataclass(frozen=True)
class QuantizeOptions(Options):
    """Options of one quantization. None means that the default depends on the method."""

    # fmt: off
    method: QuantizeMethod = option(
        QuantizeMethod.UINT8, "Stored weights only: fp16, bf16, uint8, int2 to int7, codebook, apot. "
        "Weights and activations, calibrated: int8; trained: qat, lsq, pact, dorefa, wrpn.")
    weight_bits: int | None = _weights(
        None, "Bits per weight.",
        unset="as the method's name says; codebook 5, apot, lsq, pact, dorefa and wrpn 4, uint8 and qat 8")
    activation_bits: int | None = _activations(
        None, "Bits per activation.", unset="8; for lsq, pact, dorefa and wrpn 4")
    weight_only: bool = _activations(False, "Leave activations in floating point.")
    per_channel: bool | None = _weights(
        None, "One scale for each output channel, or one for the tensor.", "--per-channel/--per-tensor",
        unset="--per-channel; for uint8 and lsq --per-tensor",
        idle=Idle(lambda asked: asked.method in _FLOATS,
                  lambda asked: f"--method {asked.method} has no scales"))
    group: int | None = _weights(
        None, "One scale for every N neighbouring weights of a channel (stored integers).", "--group-size",
        metavar="N", bounds=at_least(1))
    asymmetric: bool = _weights(
        False, "Whether weights have a zero point (intN, qat).", "--asymmetric/--symmetric",
        idle=Idle(lambda asked: asked.method not in _UNIFORM,
                  lambda asked: f"--method {asked.method} has no such choice; intN and qat have"))
    rounding: Rounding = _weights(
        Rounding.NEAREST, "Round to the nearest level, or as learnt for each layer's output (intN).")
    rounding_steps: int = _weights(
        1000, "Optimisation steps of AdaRound for each layer.", bounds=at_least(1),
        idle=Idle(lambda asked: asked.rounding is Rounding.NEAREST, "there is no --rounding adaround"))
    init: CodebookInit = _weights(
        CodebookInit.LINEAR, "Initial centroids of codebook's k-means (Han et al. 2016, section 3.2).",
        idle=Idle(lambda asked: asked.method is not QuantizeMethod.CODEBOOK,
                  lambda asked: f"--method {asked.method} has no codebook"))
    terms: int | None = _weights(
        None, "Powers of two per weight that apot adds up.", unset="one for every two bits")
    edges: Edges | None = _layers(
        None, "First and last layer, where activations are quantized: 8 bits, as the others, or float.",
        unset="8",
        idle=Idle(lambda asked: not asked.activations,
                  lambda asked: f"--method {asked.method} treats all layers alike; --layer names some"))
    layers: tuple[LayerBits, ...] = _layers(
        (), "Bits of some layers: fc=8, layer1.*=w4a8 or conv1=float; the first match counts; may be "
        "repeated.", "--layer", metavar="GLOB=BITS", repeated=True, parse=parse_layer_bits)
    include_1d: bool = _layers(
        False, "Also quantize 1-D tensors: biases, batch norm's scales and running statistics.",
        idle=Idle(lambda asked: asked.activations, "biases stay as they are next to integer kernels"))
    include: tuple[str, ...] = _layers(
        (), "Quantize only these layers or tensors; a tensor's full name always takes it; may be repeated.",
        metavar="GLOB", repeated=True)
    exclude: tuple[str, ...] = _layers(
        (), "Do not quantize these layers or tensors; wins over --include; may be repeated.", metavar="GLOB",
        repeated=True)
    calibration: CalibrationOptions = nested(CalibrationOptions)
    tuning: TuningOptions = nested(TuningOptions)
    target: Target | None = _layers(
        None, "Bytes that the weights may take, absolute or as a fraction; chooses bits layer by layer.",
        metavar="bytes=VALUE", parse=parse_target)
    max_drop: Drop | None = _layers(
        None, "What may be lost of the main metric on validation: points, or % of its value; chooses bits "
        "layer by layer.", metavar="POINTS|%", parse=parse_drop)
    choices: tuple[int, ...] = _layers(
        (2, 4, 8), "Bits that --target and --max-drop choose from.", metavar="B,B,...", parse=_choices,
        shown="2,4,8",
        idle=Idle(lambda asked: not asked.searches, "nothing is chosen; --target or --max-drop choose"))
    preset: QuantizePreset | None = option(
        None, "Set the options of a published method; options that you give win.")
    data: DataOptions = nested(DataOptions)
    judge: TaskOptions = judged()
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """What the method has no use for, bits that it lacks, and choices that exclude each other."""
        method, given = self.method, self.layers
        fixed = method in _FLOATS or method is QuantizeMethod.UINT8
        integers, trained, grouped = method in INTEGERS, method in TRAINED, self.group is not None
        ranged = {*_UNIFORM, QuantizeMethod.UINT8, QuantizeMethod.LSQ, QuantizeMethod.APOT}
        fitted = self.calibration.equalize or self.calibration.bias_correction
        eights = {*self.choices} if self.searches else {self.bits, *(layer.weights for layer in given)}
        edges = self.activations and self.effective_edges is Edges.EIGHT
        adaround = self.rounding is Rounding.ADAROUND
        weight, activation = self.weight_bits, self.activation_bits
        # fmt: off
        return (
            *self._numbers(),
            (weight is not None and fixed, f"--weight-bits: --method {method} says how many bits there are"),
            (weight is not None and self.searches, "--weight-bits: --target and --max-drop choose the bits"),
            (weight is not None and INTEGERS.get(method) not in (None, 8, weight),
             f"--weight-bits {weight}: --method {method} says {INTEGERS.get(method)}"),
            (bool(self.per_channel) and method not in ranged,
             f"--per-channel sets ranges, which {method} does not have for each channel; use it with "
             "--method uint8, intN, qat, lsq or apot"),
            (grouped and (self.activations or not integers),
             "--group-size is for stored integers: --method intN, with int8 --weight-only"),
            (adaround and not integers, "--rounding adaround is for --method intN"),
            (adaround and grouped,
             "--rounding adaround learns with one scale a channel: leave --group-size out"),
            (self.terms is not None and method is not QuantizeMethod.APOT, "--terms is for --method apot"),
            (self.weight_only and not (integers or trained),
             f"--weight-only: --method {method} leaves activations anyway"),
            (activation is not None and not self.activations,
             f"--activation-bits: --method {method} leaves activations in float"),
            (fitted and not integers, "--equalize and --bias-correction are for --method intN"),
            (self.max_drop is not None and not self.max_drop > 0,
             "--max-drop 0: a positive number is needed"),
            (self.target is not None and self.max_drop is not None,
             "--target and --max-drop both choose the bits: give one of them"),
            (self.searches and not integers, "--target and --max-drop choose bits for --method intN"),
            (self.target is not None and self.target.quantity is not Quantity.BYTES,
             f"--target {self.target}: quantizing saves bytes; bytes=VALUE is expected"),
            (self.searches and not (self.choices and all(2 <= bits <= 8 for bits in self.choices)),
             "--choices: bits from 2 to 8 are expected, as in 2,4,8"),
            (self.searches and grouped, "--group-size cannot be combined with --target or --max-drop"),
            (bool(given) and (grouped or not (integers or trained)),
             "--layer is for --method intN without --group-size, and for the trained methods"),
            (not self.activations and any(layer.activations is not None for layer in given),
             "--layer GLOB=wNaM: activations stay in floating point here; GLOB=N is expected"),
            (grouped and fitted, "--group-size cannot be combined with --equalize or --bias-correction"),
            (self.calibration.reduce_range is not None and not (edges or 8 in eights),
             "--reduce-range and --full-range are for weights of 8 bits, and there are none"),
            (self.epochs > 0 and not trained and method is not QuantizeMethod.CODEBOOK,
             f"--epochs: --method {method} trains nothing; codebook, qat, lsq, pact, dorefa, wrpn do"),
        )
        # fmt: on

    def _numbers(self) -> Iterable[tuple[bool, str]]:
        """Bits and terms that the method has no quantizer for."""
        method, weight, activation, terms = self.method, self.weight_bits, self.activation_bits, self.terms
        lowest, fewest = 1 if method in _SINGLE_BITS else 2, 1 if method in CLIPPING else 2
        yield (
            weight is not None and not lowest <= weight <= 8,
            f"--weight-bits {weight}: {lowest} to 8 are allowed with --method {method}",
        )
        yield (
            activation is not None and not fewest <= activation <= 8,
            f"--activation-bits {activation}: {fewest} to 8 are allowed with --method {method}",
        )
        for layer in self.layers if method in INTEGERS or method in TRAINED else ():
            yield (
                layer.weights is not None and layer.weights < lowest,
                f"--layer {layer.pattern}={layer.weights}: a weight has {lowest} bits or more with --method "
                f"{method}, one of which is the sign",
            )
            yield (
                layer.activations is not None and layer.activations < fewest,
                f"--layer {layer.pattern}: {layer.activations} bit is not enough for activations with "
                f"--method {method}; {fewest} to 16 are allowed",
            )
        if method is QuantizeMethod.APOT and lowest <= self.bits <= 8:
            most = self.bits - 1
            yield (
                terms is not None and not 1 <= terms <= most,
                f"--terms {terms}: {'1 is' if most == 1 else f'1 to {most} are'} allowed with {self.bits} "
                "bits, one of which is the sign",
            )

    @property
    def observes(self) -> bool:
        """Whether ranges of activations are found on images, and not learnt or fixed."""
        return self.activations and self.method not in CLIPPING

    @property
    def looks_at_images(self) -> bool:
        """Whether anything is fitted to training images."""
        return self.activations or self.calibration.bias_correction or self.rounding is Rounding.ADAROUND

    @property
    def searches(self) -> bool:
        """Whether bits are chosen for each layer."""
        return self.target is not None or self.max_drop is not None

    @property
    def bits(self) -> int:
        """Bits of a weight; 8 and 16 of methods that say so by their name."""
        if self.weight_bits is not None:
            return self.weight_bits
        return _DEFAULT_BITS.get(self.method, 16 if self.method in _FLOATS else 8)

    @property
    def activations(self) -> bool:
        """Whether activations are quantized."""
        return not self.weight_only and (self.method is QuantizeMethod.INT8 or self.method in TRAINED)

    @property
    def reduced_range(self) -> bool:
        """Whether weights of 8 bits leave one out: unless told otherwise, where integer kernels take them."""
        given = self.calibration.reduce_range
        return self.activations if given is None else given

    @property
    def bits_of_activations(self) -> int:
        """Bits of an activation."""
        if self.activation_bits is not None:
            return self.activation_bits
        return 8 if self.method in INTEGERS else _DEFAULT_BITS[self.method]

    @property
    def channelwise(self) -> bool:
        """Whether each output channel has a scale."""
        if self.per_channel is not None:
            return self.per_channel
        return self.method in _UNIFORM or self.method is QuantizeMethod.APOT

    @property
    def effective_edges(self) -> Edges:
        """What becomes of the first and the last layer; 8 bits by default where the others have fewer."""
        return self.edges or Edges.EIGHT

    @property
    def epochs(self) -> int:
        """Epochs of training."""
        if self.tuning.epochs is not None:
            return self.tuning.epochs
        return _EPOCHS if self.method in TRAINED else 0

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> QuantizeOptions:
        """Make the options of a call: what is given, then the preset, then the defaults."""
        preset = given.get("preset")
        return assemble(cls, {**(PRESETS[preset] if preset is not None else {}), **given})


PRESETS: Mapping[QuantizePreset, Mapping[str, Any]] = {
    # H.-Y. Lee's ML2020 homework 7: every tensor but single numbers, batch norm's among them, 8-bit min-max
    # over the whole tensor.
    QuantizePreset.LHY_HW7: {"method": QuantizeMethod.UINT8, "per_channel": False, "include_1d": True}
}
"""The options that each preset sets."""
