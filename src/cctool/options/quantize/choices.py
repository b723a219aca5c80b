"""Choices of `cctool quantize`: methods, observers, roundings, presets."""

from __future__ import annotations

from cctool.options.fields import Choice


class QuantizeMethod(Choice):
    """How the network is quantized.

    Weights alone are stored in few bits, and decoded to floats, by ``fp16``, ``bf16``, ``uint8``, ``int2`` to
    ``int7``, ``codebook`` and ``apot``. ``int8`` is for integer runtimes, activations included. ``qat``,
    ``lsq``, ``pact``, ``dorefa`` and ``wrpn`` train with quantizers.
    """

    FP16 = "fp16"
    BF16 = "bf16"
    UINT8 = "uint8"
    INT2 = "int2"
    INT3 = "int3"
    INT4 = "int4"
    INT5 = "int5"
    INT6 = "int6"
    INT7 = "int7"
    INT8 = "int8"
    CODEBOOK = "codebook"
    APOT = "apot"
    QAT = "qat"
    LSQ = "lsq"
    PACT = "pact"
    DOREFA = "dorefa"
    WRPN = "wrpn"


INTEGERS: dict[QuantizeMethod, int] = {
    QuantizeMethod.INT2: 2,
    QuantizeMethod.INT3: 3,
    QuantizeMethod.INT4: 4,
    QuantizeMethod.INT5: 5,
    QuantizeMethod.INT6: 6,
    QuantizeMethod.INT7: 7,
    QuantizeMethod.INT8: 8,
}
"""Methods that are named after the bits of their integers."""

CLIPPING = frozenset({QuantizeMethod.PACT, QuantizeMethod.DOREFA, QuantizeMethod.WRPN})
"""Methods that quantize the outputs of clipping activation functions."""

TRAINED = CLIPPING | {QuantizeMethod.QAT, QuantizeMethod.LSQ}
"""Methods that are trained."""


class Observer(Choice):
    """How the range of activations is found.

    ``aciq-gauss`` and ``aciq-laplace`` are Banner et al. 2019's analytical clipping; ``entropy`` is the
    smallest Kullback-Leibler divergence; ``n-std`` is n standard deviations around the mean.
    """

    MIN_MAX = "min-max"
    MOVING_AVERAGE = "moving-average"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"
    ACIQ_GAUSS = "aciq-gauss"
    ACIQ_LAPLACE = "aciq-laplace"
    N_STD = "n-std"


class Rounding(Choice):
    """How weights are rounded: to the nearest level, or as AdaRound learns it for each layer's output."""

    NEAREST = "nearest"
    ADAROUND = "adaround"


class CodebookInit(Choice):
    """Where k-means begins (Han et al. 2016, section 3.2)."""

    LINEAR = "linear"
    DENSITY = "density"
    RANDOM = "random"


class Edges(Choice):
    """What becomes of the first and the last layer: 8 bits, as the others, or floating point."""

    EIGHT = "8"
    SAME = "same"
    FLOAT = "float"


class QuantizePreset(Choice):
    """A published procedure, reproduced formula by formula."""

    LHY_HW7 = "lhy-hw7"
