"""Choices of `cctool transform`: what is transformed, how coefficients are chosen, how maps are coded."""

from __future__ import annotations

from cctool.options.fields import Choice


class TransformTarget(Choice):
    """What is put into a transform domain."""

    WEIGHTS = "weights"
    FEATURES = "features"


class Mode(Choice):
    """How a layer is put into a transform domain.

    ``coefficient`` transforms the present weights. ``basis`` replaces them by basis functions of trainable
    frequency, to be trained from scratch.
    """

    COEFFICIENT = "coefficient"
    BASIS = "basis"


class Axes(Choice):
    """Which axes of a convolution's weight are transformed; linear layers have channel axes only."""

    SPATIAL = "spatial"
    CHANNEL = "channel"
    BOTH = "both"


class Select(Choice):
    """Which coefficients are kept: those of most energy, or a corner of low frequencies."""

    ENERGY = "energy"
    CORNER = "corner"


class Norm(Choice):
    """Scale of a DCT or DST that the quantizer's steps refer to; ``none`` is scipy's ``norm=None``."""

    ORTHO = "ortho"
    NONE = "none"


class Prequantizer(Choice):
    """How a tap's values become integers before the transform.

    ``unsigned`` takes 0 to the maximum, ``offset`` the minimum to the maximum, ``signed`` is symmetric
    about 0. ``auto`` is unsigned if the calibrated minimum is not negative, else offset.
    """

    AUTO = "auto"
    UNSIGNED = "unsigned"
    OFFSET = "offset"
    SIGNED = "signed"


class TransformPreset(Choice):
    """A published procedure, reproduced formula by formula."""

    FEATURE_COMPRESSION_DCT = "feature-compression-dct"
    FEATURE_COMPRESSION_DCT_RETRAIN = "feature-compression-dct-retrain"
    FEATURE_COMPRESSION_DWT = "feature-compression-dwt"
    THESIS_BASIS = "thesis-basis"
