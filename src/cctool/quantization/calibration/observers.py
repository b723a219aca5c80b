"""Observers: find a range from the values seen in calibration.

Each sees every batch once and uses bounded memory. Infinities and NaN are counted and ignored.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from cctool.base.errors import QuantizationError
from cctool.options.quantize.choices import Observer
from cctool.quantization.calibration.histogram import Distribution, Statistics
from cctool.quantization.calibration.thresholds import (
    Bounds,
    aciq_bounds,
    entropy_bounds,
    mse_bounds,
    n_std_bounds,
    percentile_bounds,
)
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.grid import extremes


class RangeObserver:
    """Base of all observers.

    Attributes:
        axis: dimension whose slices have separate ranges; None for one range.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self._nonfinite: Tensor | int = 0

    @property
    def nonfinite(self) -> int:
        """Number of infinities and NaN that were ignored."""
        return int(self._nonfinite)

    def observe(self, x: Tensor) -> None:
        """Take a batch of floating-point values of any shape; it is neither modified nor kept."""
        x = x.detach()
        finite = torch.isfinite(x)
        self._nonfinite = self._nonfinite + (x.numel() - finite.sum())
        if x.numel() or self.axis is not None:
            self._observe(x, finite)

    @abstractmethod
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end, float32, () or (C,); 0 if no finite value was seen."""

    @abstractmethod
    def _observe(self, x: Tensor, finite: Tensor) -> None: ...


class MinMaxObserver(RangeObserver):
    """Smallest and largest value, of the tensor or of each slice along ``axis``."""

    def __init__(self, axis: int | None = None) -> None:
        super().__init__(axis)
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value."""
        if self._low is None or self._high is None:
            return torch.zeros(()), torch.zeros(())
        seen = self._low <= self._high
        return torch.where(seen, self._low, 0.0).float(), torch.where(seen, self._high, 0.0).float()

    def _observe(self, x: Tensor, finite: Tensor) -> None:
        low, high = _finite_extremes(x, finite, self.axis)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)


class MovingAverageObserver(RangeObserver):
    """Exponential moving average of the batches' ranges, with bias correction.

    The result depends on the batches and their order. A batch without finite values is skipped.
    """

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._weight = 0.0

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Averages of the smallest and of the largest values."""
        low, high = (self._sums / self._weight if self._weight else self._sums).float()
        return low, high

    def _observe(self, x: Tensor, finite: Tensor) -> None:
        if bool(finite.any()):
            ends = torch.stack(_finite_extremes(x, finite, None)).double()
            self._sums = self.momentum * self._sums.to(x.device) + (1 - self.momentum) * ends
            self._weight = self.momentum * self._weight + 1 - self.momentum


class DistributionObserver(RangeObserver):
    """A range computed from a histogram and moments; it does not depend on the division into batches."""

    def __init__(
        self, kind: Observer, config: QuantizerConfig, *, percentile: float = 99.99, n_std: float = 3.0
    ) -> None:
        super().__init__()
        self.kind, self.config, self.percentile, self.n_std = kind, config, percentile, n_std
        self._statistics = Statistics()
        self._device = torch.device("cpu")

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The range that is best in the sense of the observer's kind."""
        low, high = self._bounds(self._statistics.distribution()) if self._statistics.number else (0.0, 0.0)
        # Adding 0 turns -0 into 0.
        ends = torch.tensor([low, high], dtype=torch.float64, device=self._device).float() + 0.0
        return ends[0], ends[1]

    def _observe(self, x: Tensor, finite: Tensor) -> None:
        self._device = x.device
        self._statistics.add(x.flatten() if bool(finite.all()) else x[finite])

    def _bounds(self, seen: Distribution) -> Bounds:
        symmetric, limits = self.config.symmetric, self.config.limits
        if self.kind is Observer.PERCENTILE:
            return percentile_bounds(seen, self.percentile, symmetric=symmetric)
        if self.kind is Observer.N_STD:
            return n_std_bounds(seen, self.n_std)
        if self.kind is Observer.MSE:
            return mse_bounds(seen, limits, symmetric=symmetric)
        levels = limits[1] - limits[0] + 1
        one_sided = seen.low >= 0 or seen.high <= 0
        if self.kind is Observer.ENTROPY:
            # Levels on one side of 0.
            half = limits[1] + 1 if symmetric else levels if one_sided else levels // 2
            return entropy_bounds(seen, half)
        return aciq_bounds(
            seen,
            "gauss" if self.kind is Observer.ACIQ_GAUSS else "laplace",
            self.config.bits - self.config.reduce_range,
            signed=self.config.signed,
            symmetric=symmetric,
        )


def make_observer(
    kind: Observer,
    *,
    bits: int = 8,
    signed: bool = True,
    symmetric: bool = True,
    narrow: bool = False,
    reduce_range: bool = False,
    axis: int | None = None,
    percentile: float = 99.99,
    n_std: float = 3.0,
    momentum: float = 0.9,
) -> RangeObserver:
    """Build an observer.

    Args:
        kind: how the range is found.
        bits: of the quantizer that the range is for, as are ``signed``, ``symmetric``, ``narrow`` and
            ``reduce_range``; see `QuantizerConfig`. Kinds that minimise an error depend on them.
        signed: whether integers have a sign.
        symmetric: whether the zero point is 0.
        narrow: whether the lowest integer is not used.
        reduce_range: whether one bit of eight is not used.
        axis: dimension whose slices have separate ranges; min-max only.
        percentile: percent of the values within the range of ``percentile``, above 0 and up to 100.
        n_std: standard deviations on either side of the mean for ``n-std``, positive.
        momentum: weight of the old value in ``moving-average``, from 0 to less than 1.

    Raises:
        QuantizationError: if a number is out of range, or a kind does not support an axis.
    """
    if not 0 < percentile <= 100:
        raise QuantizationError(f"percentile {percentile}: above 0 and up to 100 is allowed")
    if not 0 < n_std < float("inf"):
        raise QuantizationError(f"{n_std} standard deviations: a positive number is needed")
    if not 0 <= momentum < 1:
        raise QuantizationError(f"momentum {momentum}: 0 to less than 1 is allowed")
    if kind is Observer.MIN_MAX:
        return MinMaxObserver(axis)
    if axis is not None:
        raise QuantizationError(f"{kind} has one range for the tensor; min-max has them along an axis")
    if kind is Observer.MOVING_AVERAGE:
        return MovingAverageObserver(momentum)
    config = QuantizerConfig(
        method="uniform",
        bits=bits,
        signed=signed,
        symmetric=symmetric,
        narrow=narrow,
        reduce_range=reduce_range,
    )
    return DistributionObserver(kind, config, percentile=percentile, n_std=n_std)


def _finite_extremes(x: Tensor, finite: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest finite value; infinity and minus infinity if there is none."""
    if not x.numel():
        none = x.new_zeros(() if axis is None else (x.shape[axis],))
        return none + float("inf"), none - float("inf")
    low, _ = extremes(torch.where(finite, x, float("inf")), axis)
    _, high = extremes(torch.where(finite, x, -float("inf")), axis)
    return low, high
