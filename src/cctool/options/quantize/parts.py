"""Parts of the options of `cctool quantize`: calibration, bits of single layers, training."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cctool.base.errors import UsageError
from cctool.options.fields import Bounds, Idle, Options, at_least, between, section
from cctool.options.quantize.choices import INTEGERS, Observer, QuantizeMethod
from cctool.options.teacher import (
    TeacherOptions,
    freeze_norm_option,
    lr_option,
    optimizer_option,
    teacher_option,
)

_BITS = range(1, 17)
_weights = section("Weights")
_activations = section("Activations")
_TRAINING = "Training"
_training = section(_TRAINING)

_CALIBRATES_NONE = Idle(
    lambda asked: not asked.observes, lambda asked: f"--method {asked.method} calibrates no activations"
)
_UNTRAINED = Idle(lambda asked: not asked.epochs, "nothing is trained; --epochs says for how long")


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """How ranges of activations are found, and how weights are prepared for few bits."""

    # fmt: off
    images: int = _activations(
        1024, "Training images to calibrate on, without augmentation.", "--calibration", metavar="N",
        bounds=at_least(1),
        idle=Idle(lambda asked: not asked.looks_at_images,
                  lambda asked: f"--method {asked.method} looks at no images"))
    observer: Observer = _activations(
        Observer.MIN_MAX, "How the ranges of activations are found.", idle=_CALIBRATES_NONE)
    percentile: float = _activations(
        99.99, "Percentile of --observer percentile.",
        bounds=Bounds(50, 100, low_open=True, text="above 50 and up to 100 is allowed"),
        idle=(_CALIBRATES_NONE,
              Idle(lambda asked: asked.calibration.observer is not Observer.PERCENTILE,
                   "it is for --observer percentile")))
    deviations: float = _activations(
        3.0, "Standard deviations of --observer n-std.", bounds=between("(0, 1e6]"),
        idle=(_CALIBRATES_NONE,
              Idle(lambda asked: asked.calibration.observer is not Observer.N_STD,
                   "it is for --observer n-std")))
    symmetric: bool = _activations(
        False, "Quantize activations without a zero point.", "--symmetric-activations",
        idle=Idle(lambda asked: not asked.observes or asked.method is QuantizeMethod.LSQ,
                  lambda asked: f"--method {asked.method} has no such choice"))
    reduce_range: bool | None = _weights(
        None, "Use 7 of 8 bits for weights, because CPUs without VNNI saturate otherwise.",
        "--reduce-range/--full-range", unset="--reduce-range where activations are quantized",
        idle=Idle(lambda asked: not (asked.method in INTEGERS or asked.activations),
                  lambda asked: f"--method {asked.method} has no 8-bit integers of weights to reduce"))
    equalize: bool = _weights(
        False, "First equalize channels' ranges across layers (Nagel et al. 2019, section 4.1; intN).")
    bias_correction: bool = _weights(
        False, "Correct biases by the layers' mean output error (Nagel et al. 2019, section 4.2; intN).")
    # fmt: on


@dataclass(frozen=True)
class TuningOptions(Options):
    """Training with quantizers in the loop, or of codebooks."""

    # fmt: off
    epochs: int | None = _training(
        None, "Epochs of training with quantizers in the loop; 0 only calibrates.",
        unset="10 for methods that are trained, else 0", bounds=at_least(0))
    optimizer: str = optimizer_option("sgd", _UNTRAINED, _TRAINING)
    lr: float | None = lr_option(_UNTRAINED, _TRAINING)
    teacher: TeacherOptions | None = teacher_option(_UNTRAINED)
    freeze_norm: bool = freeze_norm_option(_TRAINING, _UNTRAINED)
    alpha_decay: float = _training(
        2e-4, "Weight of pact's penalty on its clipping levels (Choi et al. 2018, section 3.2).",
        bounds=at_least(0),
        idle=Idle(lambda asked: asked.method is not QuantizeMethod.PACT,
                  lambda asked: f"--method {asked.method} learns no clipping levels"))
    # fmt: on


@dataclass(frozen=True)
class LayerBits:
    """Bits of single layers.

    Attributes:
        pattern: glob of the layers' names.
        weights: bits of their weights; None leaves them in floating point.
        activations: bits of their inputs; None is as in other layers.
    """

    pattern: str
    weights: int | None
    activations: int | None = None


def parse_layer_bits(text: str) -> LayerBits:
    """Parse ``GLOB=BITS``, ``GLOB=w4a8`` or ``GLOB=float``.

    Raises:
        UsageError: if the text has another form, or the bits are not 1 to 16.

    >>> parse_layer_bits("layer3.*=4").weights, parse_layer_bits("fc=w8a4").activations
    (4, 4)
    """
    pattern, equals, value = text.rpartition("=")
    found = re.fullmatch(r"(?:w?(\d+)(?:a(\d+))?|float)", value.strip(), re.IGNORECASE)
    if not equals or not pattern or found is None:
        raise UsageError(f"--layer {text}: GLOB=BITS, GLOB=w4a8 or GLOB=float is expected, as in layer3.*=4")
    weights, activations = (int(group) if group else None for group in found.groups())
    for bits in (weights, activations):
        if bits is not None and bits not in _BITS:
            raise UsageError(f"--layer {text}: {bits} bits; 1 to 16 are allowed")
    return LayerBits(pattern.strip(), weights, activations)
