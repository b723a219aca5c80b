"""Choices of `cctool quantize`: how ranges are calibrated."""

from __future__ import annotations

from cctool.options.common import Choice

__all__ = ["Observer"]


class Observer(Choice):
    """How a range is found from values that pass by.

    ``min-max`` is all of it, ``moving-average`` the average of the batches' ranges. ``percentile`` leaves a
    share of the values out, ``n-std`` what lies further from the mean than some standard deviations. ``mse``
    and ``entropy`` (TensorRT's) search a histogram for the range that loses least; ``aciq-gauss`` and
    ``aciq-laplace`` calculate it for a normal and a Laplace distribution.
    """

    MIN_MAX = "min-max"
    MOVING_AVERAGE = "moving-average"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"
    ACIQ_GAUSS = "aciq-gauss"
    ACIQ_LAPLACE = "aciq-laplace"
    N_STD = "n-std"
