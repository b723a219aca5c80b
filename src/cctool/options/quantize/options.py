"""What `cctool quantize` can be asked: the options of one run, with their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cctool.base.errors import UsageError
from cctool.options.common import DataOptions
from cctool.options.prune.parts import Quantity, Target
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
from cctool.options.quantize.parts import CalibrationOptions, LayerBits, TuningOptions

__all__ = ["PRESETS", "QuantizeMethod", "QuantizeOptions", "QuantizePreset", "preset_options"]

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
_UNIFORM = frozenset({*INTEGERS, QuantizeMethod.QAT})
_EPOCHS = 10


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of one quantization. None means that the default depends on the method.

    Attributes:
        method: see `QuantizeMethod`.
        weight_bits: bits of a weight.
        activation_bits: bits of an activation, of methods that quantize these.
        weight_only: leave activations in floating point.
        per_channel: a scale for each output channel instead of one for the tensor.
        group: a scale for so many neighbouring weights of a channel; stored integers only.
        asymmetric: integers with a zero point for weights; else 0 is in the middle.
        rounding: see `Rounding`.
        rounding_steps: steps of AdaRound for each layer.
        init: where k-means begins.
        terms: powers of two that are added up, of ``apot``.
        edges: what becomes of the first and the last layer.
        layers: bits of single layers; the first that matches holds.
        include_1d: take 1-D tensors too: biases, batch norm's scales and running statistics; stored only.
        include: glob patterns; where given, only tensors or layers that match one are taken. A pattern that
            is a tensor's whole name takes it whatever it is.
        exclude: glob patterns of tensors or layers that are left as they are; they win over `include`.
        calibration: how ranges of activations are found.
        tuning: training with quantizers in the loop.
        target: bytes that the weights may take; bits are chosen for each layer.
        max_drop: percentage points of validation accuracy that may be lost; bits are chosen for each layer.
        choices: bits to choose from.
        preset: the published method that these options were taken from; see `preset_options`.
        data: what the network is calibrated, trained and measured on.
    """

    method: QuantizeMethod = QuantizeMethod.UINT8
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_only: bool = False
    per_channel: bool | None = None
    group: int | None = None
    asymmetric: bool = False
    rounding: Rounding = Rounding.NEAREST
    rounding_steps: int = 1000
    init: CodebookInit = CodebookInit.LINEAR
    terms: int | None = None
    edges: Edges | None = None
    layers: tuple[LayerBits, ...] = ()
    include_1d: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    tuning: TuningOptions = field(default_factory=TuningOptions)
    target: Target | None = None
    max_drop: float | None = None
    choices: tuple[int, ...] = (2, 4, 8)
    preset: QuantizePreset | None = None
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        self._check_weights()
        self._check_activations()
        self._check_search()
        if self.rounding_steps < 1:
            raise UsageError(f"--rounding-steps {self.rounding_steps}: at least one is needed")
        self._check_idle()
        trains = self.method in TRAINED or self.method is QuantizeMethod.CODEBOOK
        if self.epochs and not trains:
            raise UsageError(
                f"--epochs: --method {self.method} trains nothing; codebook, qat, lsq, pact, dorefa, wrpn do"
            )

    def _check_idle(self) -> None:
        """Refuse what the method would not look at."""
        by_layer = self.method in {*INTEGERS, *TRAINED} and self.group is None
        if self.layers and not by_layer:
            raise UsageError("--layer is for --method intN without --group-size, and for the trained methods")
        if not self.activations and any(given.activations is not None for given in self.layers):
            raise UsageError("--layer GLOB=wNaM: activations stay in floating point here; GLOB=N is expected")
        fitted = self.calibration.equalize or self.calibration.bias_correction
        if self.group is not None and fitted:
            raise UsageError("--group-size cannot be combined with --equalize or --bias-correction")
        eights = {*self.choices} if self.searches else {self.bits, *(given.weights for given in self.layers)}
        edges = self.activations and self.effective_edges is Edges.EIGHT
        if self.calibration.reduce_range is not None and not (edges or 8 in eights):
            raise UsageError("--reduce-range and --full-range are for weights of 8 bits, and there are none")

    def _check_weights(self) -> None:
        if self.weight_bits is not None:
            allowed = range(1, 9) if self.method in {*CLIPPING, QuantizeMethod.CODEBOOK} else range(2, 9)
            if self.method in _FLOATS or self.method is QuantizeMethod.UINT8:
                raise UsageError(f"--weight-bits: --method {self.method} says how many bits there are")
            named = INTEGERS.get(self.method)
            if named not in (None, 8, self.weight_bits):
                raise UsageError(f"--weight-bits {self.weight_bits}: --method {self.method} says {named}")
            if self.weight_bits not in allowed:
                raise UsageError(
                    f"--weight-bits {self.weight_bits}: {allowed.start} to {allowed.stop - 1} are allowed "
                    f"with --method {self.method}"
                )
        ranged = self.method in {*_UNIFORM, QuantizeMethod.UINT8, QuantizeMethod.LSQ, QuantizeMethod.APOT}
        if self.per_channel and not ranged:
            raise UsageError(
                f"--per-channel sets ranges, which {self.method} does not have for each channel; use it with "
                "--method uint8, intN, qat, lsq or apot"
            )
        if self.group is not None:
            if self.group < 1:
                raise UsageError(f"--group-size {self.group}: at least one weight is needed")
            if self.activations or self.method not in INTEGERS:
                raise UsageError(
                    "--group-size is for stored integers: --method intN, with int8 --weight-only"
                )
        if self.asymmetric and self.method not in _UNIFORM:
            raise UsageError(f"--asymmetric: --method {self.method} has no such choice; intN and qat have")
        if self.rounding is Rounding.ADAROUND and self.method not in INTEGERS:
            raise UsageError("--rounding adaround is for --method intN")
        if self.rounding is Rounding.ADAROUND and self.group is not None:
            raise UsageError("--rounding adaround learns with one scale a channel: leave --group-size out")
        if self.terms is not None and self.method is not QuantizeMethod.APOT:
            raise UsageError("--terms is for --method apot")

    def _check_activations(self) -> None:
        if self.weight_only and self.method not in {*INTEGERS, *TRAINED}:
            raise UsageError(f"--weight-only: --method {self.method} leaves activations anyway")
        if self.activation_bits is not None:
            if not self.activations:
                raise UsageError(f"--activation-bits: --method {self.method} leaves activations in float")
            if self.activation_bits not in range(1, 9) or (
                self.activation_bits == 1 and self.method not in CLIPPING
            ):
                raise UsageError(f"--activation-bits {self.activation_bits}: 2 to 8 are allowed")
        corrected = self.calibration.equalize or self.calibration.bias_correction
        if corrected and self.method not in INTEGERS:
            raise UsageError("--equalize and --bias-correction are for --method intN")

    def _check_search(self) -> None:
        if self.target is not None and self.max_drop is not None:
            raise UsageError("--target and --max-drop both choose the bits: give one of them")
        if not self.searches:
            return
        if self.method not in INTEGERS:
            raise UsageError("--target and --max-drop choose bits for --method intN")
        if self.target is not None and self.target.quantity is not Quantity.BYTES:
            raise UsageError(f"--target {self.target}: quantizing saves bytes; bytes=VALUE is expected")
        if self.max_drop is not None and not self.max_drop > 0:
            raise UsageError(
                f"--max-drop {self.max_drop:g}: a positive number of percentage points is needed"
            )
        if not self.choices or any(bits not in range(2, 9) for bits in self.choices):
            raise UsageError("--choices: bits from 2 to 8 are expected, as in 2,4,8")
        if self.group is not None:
            raise UsageError("--group-size cannot be combined with --target or --max-drop")

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


PRESETS: dict[QuantizePreset, dict[str, Any]] = {
    # H.-Y. Lee's ML2020 homework 7: every tensor but single numbers, batch norm's among them, 8-bit min-max
    # over the whole tensor.
    QuantizePreset.LHY_HW7: {"method": QuantizeMethod.UINT8, "per_channel": False, "include_1d": True},
}
"""The options that each preset sets."""


def preset_options(preset: QuantizePreset | None, **given: Any) -> QuantizeOptions:
    """Make options as a preset sets them, except for those that are given."""
    chosen = PRESETS[preset] if preset is not None else {}
    return QuantizeOptions(**(chosen | given), preset=preset)
