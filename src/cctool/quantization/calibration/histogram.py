"""What calibration keeps of the values it has seen: a histogram that widens, moments, extremes.

The histogram's width is the next power of two above the largest magnitude, and it widens by merging
neighbouring bins. Both are exact, so the counts do not depend on how the values are divided into batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BIN_BITS = 12
BINS = 1 << _BIN_BITS
"""Bins on either side of 0; the largest magnitude is in the upper half of one side."""

_PIECE = 1 << 22
"""Elements processed at a time, in float64."""
_LEAST_EXPONENT = -1000


@dataclass(frozen=True)
class Distribution:
    """The histogram in ascending order, without empty bins; all on the CPU.

    Attributes:
        lower: float64 (M,), lower ends of the bins. Zeros are in a bin of width 0.
        upper: float64 (M,), upper ends.
        counts: float64 (M,), number of values in each.
        width: of the other bins.
        low: smallest value.
        high: largest value.
        mean: of all values.
        square: mean of all squares.
        std: standard deviation of the population.
    """

    lower: Tensor
    upper: Tensor
    counts: Tensor
    width: float
    low: float
    high: float
    mean: float
    square: float
    std: float

    @property
    def centers(self) -> Tensor:
        """Centers of the bins, clamped to the smallest and the largest value."""
        return ((self.lower + self.upper) / 2).clamp(self.low, self.high)


class Statistics:
    """Counts of finite values, batch by batch.

    Attributes:
        number: how many values were counted.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._zeros = 0
        self._exponent = _LEAST_EXPONENT
        self._low, self._high = math.inf, -math.inf
        self.number, self._mean, self._spread = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        """Count ``values`` (N,), finite, of any floating-point type."""
        for piece in torch.split(values, _PIECE):
            if piece.numel():
                self._add(piece.double())

    def distribution(self) -> Distribution:
        """The histogram of at least one value."""
        assert self._counts is not None, "nothing was counted"
        width = self._width
        negative, positive = self._counts.cpu()
        edges = torch.arange(BINS + 1, dtype=torch.float64) * width
        zero = torch.zeros(1, dtype=torch.float64)
        lower = torch.cat((-edges[1:].flip(0), zero, edges[:-1]))
        upper = torch.cat((-edges[:-1].flip(0), zero, edges[1:]))
        counts = torch.cat((negative.flip(0), torch.tensor([self._zeros]), positive))
        kept = counts > 0
        variance = self._spread / self.number
        return Distribution(
            lower[kept],
            upper[kept],
            counts[kept].double(),
            width,
            self._low,
            self._high,
            self._mean,
            variance + self._mean**2,
            math.sqrt(variance),
        )

    @property
    def _width(self) -> float:
        return math.ldexp(1.0, self._exponent - _BIN_BITS)

    def _add(self, x: Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(x))
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._add_moments(x)
        if low < 0 or high > 0:
            self._widen(math.frexp(max(-low, high))[1])
        if self._counts is None:
            self._counts = torch.zeros((2, BINS), dtype=torch.int64, device=x.device)
        # Dividing by a power of two is exact, so merged bins count what wider bins would have counted.
        index = x.abs().div_(self._width).long().add_((x >= 0) * BINS)
        zeros = int((x == 0).sum())
        self._counts += torch.bincount(index, minlength=2 * BINS).view(2, BINS).to(self._counts.device)
        # Zeros were counted in the first positive bin, but have one to themselves.
        self._counts[1, 0] -= zeros
        self._zeros += zeros

    def _add_moments(self, x: Tensor) -> None:
        """Merge mean and sum of squared deviations (Chan, Golub and LeVeque 1979)."""
        number, mean = x.numel(), float(x.mean())
        total, apart = self.number + number, mean - self._mean
        self._spread += float((x - mean).square().sum()) + apart**2 * self.number * number / total
        self._mean += apart * number / total
        self.number = total

    def _widen(self, exponent: int) -> None:
        doublings = exponent - self._exponent
        if doublings <= 0:
            return
        if self._counts is not None:
            merged = min(2**doublings, BINS)
            sums = self._counts.view(2, BINS // merged, merged).sum(-1)
            self._counts = torch.zeros_like(self._counts)
            self._counts[:, : sums.shape[1]] = sums
        self._exponent = exponent
