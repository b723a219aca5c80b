"""Uniform quantizers, whose range is calibrated, an exponential moving average, or the weight's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cctool.errors import CorruptCheckpointError
from cctool.quantization.configs import QuantizerConfig
from cctool.quantization.grid import Grid, extremes, fitted
from cctool.quantization.quantizer import Quantizer, straight_through, tracked

__all__ = ["UniformQuantizer"]

_SETTLED_STEPS = 1 << 40
"""Batches that a calibrated range counts for: its average needs no correction of a bias towards 0."""


class UniformQuantizer(Quantizer):
    """x -> (clamp(round(x / scale) + zero_point) - zero_point) * scale.

    The gradient is 1 where the nearest integer is one of the grid's and 0 elsewhere. So a range's own ends
    have a gradient, whatever way the scale was rounded.

    Buffers: ``scale`` float32 and ``zero_point`` int32, both () or (C,). An activation with a momentum has
    ``low`` and ``high``, the averaged range, float32 of this shape, and ``steps_seen``, int64 ().
    """

    has_range = True
    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor
    steps_seen: Tensor

    def __init__(self, config: QuantizerConfig, *, weight: bool, channels: int | None) -> None:
        super().__init__(config, weight=weight, channels=channels)
        shape = () if channels is None else (channels,)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        if config.momentum is not None and not weight:
            self.register_buffer("low", torch.zeros(shape))
            self.register_buffer("high", torch.zeros(shape))
            self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the range from calibration; a moving average goes on from it."""
        self._fit(low, high)
        if self.config.momentum is not None and not self.weight:
            self.low.copy_(low)
            self.high.copy_(high)
            self.steps_seen.fill_(_SETTLED_STEPS)

    def grid(self) -> Grid:
        """The grid of the present range."""
        low, high = self.config.limits
        return Grid(self.scale.float(), self.zero_point, low, high, self.config.axis)

    def check(self) -> None:
        """Refuse scales that are negative or not finite, and zero points outside the integers."""
        super().check()
        low, high = self.config.limits
        if bool((self.scale < 0).any()):
            raise CorruptCheckpointError("a quantizer's scale is negative")
        if bool(((self.zero_point < low) | (self.zero_point > high)).any()):
            raise CorruptCheckpointError(f"a quantizer's zero point lies outside {low}..{high}")
        if self.config.symmetric and bool(self.zero_point.any()):
            raise CorruptCheckpointError("a symmetric quantizer's zero point is not 0")

    def _quantized(self, x: Tensor) -> Tensor:
        if self.training and self.config.momentum is not None:
            self._follow(x.detach(), self.config.momentum)
        grid = self.grid()
        n = grid.rounded(x.detach())
        inside = (n >= grid.low) & (n <= grid.high) if tracked(x) else None
        return straight_through(x, grid.decoded(n.clamp_(grid.low, grid.high)), inside)

    def _initialise(self, x: Tensor) -> None:
        self.set_range(*extremes(x, self.config.axis))

    @torch.no_grad()
    def _follow(self, x: Tensor, momentum: float) -> None:
        low, high = extremes(x, self.config.axis)
        if self.weight:
            self._fit(low, high)
            return
        finite = (torch.isfinite(low) & torch.isfinite(high)).all()
        self.steps_seen += finite
        # The average divided by 1 - momentum^steps, which takes its start at 0 out of it, in one step.
        share = torch.ones_like(self.steps_seen, dtype=torch.float32)
        if momentum:
            steps = self.steps_seen.clamp(min=1)
            share = ((1 - momentum) / -torch.expm1(steps * math.log(momentum))).clamp(max=1)
        for average, seen in ((self.low, low), (self.high, high)):
            average.copy_(torch.where(finite, torch.lerp(average, seen.to(average.dtype), share), average))
        self._fit(self.low, self.high)

    def _fit(self, low: Tensor, high: Tensor) -> None:
        scale, zero_point = fitted(low, high, self.config.limits, symmetric=self.config.symmetric)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
