"""Parts of the options of `cctool quantize`: calibration, bits of single layers, training."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cctool.base.errors import UsageError
from cctool.options.prune.parts import TeacherOptions
from cctool.options.quantize.choices import Observer

__all__ = ["CalibrationOptions", "LayerBits", "TuningOptions", "parse_layer_bits"]

_BITS = range(1, 17)


@dataclass(frozen=True)
class CalibrationOptions:
    """How ranges of activations are found, and weights are made fit for few bits.

    Attributes:
        images: training images to look at, un-augmented.
        observer: see `Observer`.
        percentile: of `Observer.PERCENTILE`, above 50 and up to 100.
        deviations: of `Observer.N_STD`.
        symmetric: integers without a zero point for activations, too.
        reduce_range: 7 of 8 bits for weights, without which CPUs without VNNI saturate; None where
            activations are quantized, too.
        equalize: equalize the ranges of channels across layers before (Nagel et al. 2019, section 4.1).
        bias_correction: take the mean error of each layer's output out of its bias (section 4.2).
    """

    images: int = 1024
    observer: Observer = Observer.MIN_MAX
    percentile: float = 99.99
    deviations: float = 3.0
    symmetric: bool = False
    reduce_range: bool | None = None
    equalize: bool = False
    bias_correction: bool = False

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UsageError(f"--calibration {self.images}: at least one image is needed")
        if not 50 < self.percentile <= 100:
            raise UsageError(f"--percentile {self.percentile:g}: above 50 and up to 100 is allowed")
        if not self.deviations > 0:
            raise UsageError(f"--deviations {self.deviations:g}: a positive number is needed")


@dataclass(frozen=True)
class TuningOptions:
    """Training with quantizers in the loop, or of codebooks.

    Attributes:
        epochs: of it; None is 10 for methods that are trained, else 0.
        optimizer: ``sgd``, ``adam``, ``adamw`` or the user's ``my.py:factory``.
        lr: learning rate; None takes the optimizer's default for trained networks.
        teacher: a network to follow; None learns from labels.
        freeze_norm: leave batch norm's running statistics, and normalise by them.
        alpha_decay: weight of PACT's penalty on its clipping levels (Choi et al. 2018, section 3.2).
    """

    epochs: int | None = None
    optimizer: str = "sgd"
    lr: float | None = None
    teacher: TeacherOptions | None = None
    freeze_norm: bool = False
    alpha_decay: float = 2e-4

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 0:
            raise UsageError(f"--epochs {self.epochs}: a whole number from 0 on is needed")
        if self.lr is not None and not self.lr > 0:
            raise UsageError(f"--lr {self.lr:g}: a positive number is needed")
        if not self.alpha_decay >= 0:
            raise UsageError(f"--alpha-decay {self.alpha_decay:g}: a number from 0 on is needed")


@dataclass(frozen=True)
class LayerBits:
    """Bits of layers that are not treated as the others.

    Attributes:
        pattern: glob of the layers' names.
        weights: bits of their weights; None leaves them in floating point.
        activations: bits of what they take in; None is as elsewhere.
    """

    pattern: str
    weights: int | None
    activations: int | None = None


def parse_layer_bits(text: str) -> LayerBits:
    """Parse ``GLOB=BITS``, ``GLOB=w4a8`` or ``GLOB=float``.

    Raises:
        UsageError: where it is none of these, or the bits are not 1 to 16.

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
