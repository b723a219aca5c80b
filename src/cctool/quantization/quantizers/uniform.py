"""Uniform quantizers; the range is calibrated, an exponential moving average, or the weight's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cctool.base.cache import Cache
from cctool.base.errors import CorruptCheckpointError
from cctool.quantization.quantizers.base import Quantizer, straight_through, tracked
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.grid import Grid, extremes, fitted

_SETTLED_STEPS = 2.0**40
"""Batches that a calibrated range counts as: so many that its average has no bias towards 0 left."""
_INVERTED = 1e-5
"""Relative amount by which low may exceed high: averages of equal ends are rounded separately."""


class UniformQuantizer(Quantizer):
    """x -> (clamp(round(x / scale) + zero_point) - zero_point) * scale.

    The gradient is 1 where the nearest integer belongs to the grid, and 0 elsewhere. So the ends of the range
    have a gradient, however the scale was rounded.

    Buffers: ``scale`` float32 and ``zero_point`` int32, both () or (C,). Files omit ``zero_point`` if the
        config is
    symmetric, because it is 0.
    """

    has_range = True
    scale: Tensor
    zero_point: Tensor

    def __init__(self, config: QuantizerConfig, *, weight: bool, channels: int | None) -> None:
        super().__init__(config, weight=weight, channels=channels)
        self._register_state(() if channels is None else (channels,))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the range found by calibration."""
        scale, zero_point = fitted(low, high, self.config.limits, symmetric=self.config.symmetric)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def grid(self) -> Grid:
        """The grid of the present range."""
        return Grid(self.scale.float(), self.zero_point, *self.config.limits, self.config.axis)

    def check(self) -> None:
        """Raise CorruptCheckpointError for scales negative or not finite, and zero points out of range."""
        super().check()
        low, high = self.config.limits
        if bool((self.scale < 0).any()):
            raise CorruptCheckpointError("a quantizer's scale is negative")
        if bool(((self.zero_point < low) | (self.zero_point > high)).any()):
            raise CorruptCheckpointError(f"a quantizer's zero point lies outside {low}..{high}")

    def _register_state(self, shape: tuple[int, ...]) -> None:
        self.register_buffer("scale", torch.ones(shape))
        zero_point = torch.zeros(shape, dtype=torch.int32)
        self.register_buffer("zero_point", zero_point, persistent=not self.config.symmetric)

    def _quantized(self, x: Tensor) -> Tensor:
        if self.training and self.config.momentum is not None:
            self._follow(x.detach(), self.config.momentum)
        grid = self.grid()
        n = grid.rounded(x.detach())
        inside = (n >= grid.low) & (n <= grid.high) if tracked(x) else None
        return straight_through(x, grid.decoded(n.clamp_(grid.low, grid.high)), inside)

    def _initialise(self, x: Tensor) -> None:
        self.set_range(*extremes(x, self.config.axis))

    def _follow(self, x: Tensor, momentum: float) -> None:
        """In training, take the range of a weight itself."""
        self.set_range(*extremes(x, self.config.axis))


class MovingUniformQuantizer(UniformQuantizer):
    """A uniform quantizer of activations whose range is an exponential moving average in training.

    Buffer: ``range`` float32 (3,) or (C, 3): averages of the smallest and of the largest value, and their
        number of
    batches; a calibrated range counts as 2^40. Scale and zero point are computed from it.
    """

    range: Tensor

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the range found by calibration; the moving average continues from it."""
        ends = torch.stack((low, high), -1).to(self.range).nan_to_num(0.0)
        self.range[..., :2] = ends
        self.range[..., 2] = _SETTLED_STEPS

    def grid(self) -> Grid:
        """The grid of the present range."""
        return self._cache.get(self._fitted, [self.range])

    def check(self) -> None:
        """Raise CorruptCheckpointError for ranges not finite or reversed, and invalid batch counts."""
        Quantizer.check(self)
        low, high, steps = self.range.double().unbind(-1)
        if bool((low - high > _INVERTED * torch.maximum(low.abs(), high.abs())).any()):
            raise CorruptCheckpointError("a quantizer's range ends below its start")
        if bool(((steps < 0) | (steps != steps.round())).any()):
            raise CorruptCheckpointError(
                "a quantizer's range is the average of an impossible number of batches"
            )

    def train(self, mode: bool = True) -> MovingUniformQuantizer:
        """Set training or evaluation mode."""
        self._cache.clear()
        super().train(mode)
        return self

    def _register_state(self, shape: tuple[int, ...]) -> None:
        self._cache: Cache[Grid] = Cache()
        self.register_buffer("range", torch.zeros((*shape, 3)))

    def _fitted(self) -> Grid:
        low, high, _ = self.range.detach().unbind(-1)
        scale, zero_point = fitted(low, high, self.config.limits, symmetric=self.config.symmetric)
        return Grid(scale, zero_point, *self.config.limits, self.config.axis)

    @torch.no_grad()
    def _follow(self, x: Tensor, momentum: float) -> None:
        seen = torch.stack(extremes(x, self.config.axis), -1)
        # One batch with NaN or infinity must not spoil the average.
        finite = torch.isfinite(seen).all()
        averages, steps = self.range[..., :2], self.range[..., 2:]
        # float32 stops counting at 2^24, and stays at `_SETTLED_STEPS`; both are beyond any bias correction.
        steps += finite
        # Moving average with bias correction (division by 1 - momentum^steps), in a single interpolation.
        share = torch.ones_like(steps)
        if momentum:
            share = ((1 - momentum) / -torch.expm1(steps.clamp(min=1) * math.log(momentum))).clamp(max=1)
        moved = torch.lerp(averages, seen.to(averages.dtype), share)
        averages.copy_(torch.where(finite, moved, averages))
