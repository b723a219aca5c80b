"""Quantizers with learned scales: LSQ (Esser 2020) and PACT (Choi 2018)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cctool.quantization.quantizers.base import Quantizer
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.grid import Grid, aligned, fitted


class LsqQuantizer(Quantizer):
    """x -> round(clip(x / step, low, high)) * step, with a learned step (Esser 2020, eq. 1 to 5).

    The step's gradient is round(x / step) - x / step inside the range and the limit outside, times
    1 / sqrt(N * high) for the N elements of a weight, or features of a sample, that share a step. A step that
    training moves to 0 or below acts as a tiny positive one: everything becomes 0, and its gradient leads
    back.

    Parameter: ``step`` float32, () or (C,).
    """

    has_range = True

    def __init__(self, config: QuantizerConfig, *, weight: bool, channels: int | None) -> None:
        super().__init__(config, weight=weight, channels=channels)
        self.step = nn.Parameter(torch.ones(() if channels is None else (channels,)))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the smallest step that covers the range."""
        self.step.copy_(fitted(low, high, self.config.limits, symmetric=True)[0])

    def grid(self) -> Grid:
        """The integers times the step."""
        scale = self.step.detach().float().clamp(min=0)
        return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), *self.config.limits, self.config.axis)

    def _initialise(self, x: Tensor) -> None:
        rest = [dim for dim in range(x.dim()) if dim != self.config.axis]
        mean = x.abs().double()
        # An empty list of dimensions would make torch reduce all of them.
        mean = mean.mean(rest) if rest else mean
        self.step.copy_(2 * mean / math.sqrt(self.config.limits[1]))

    def _quantized(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.grid().nearest(x)
        # The paper's N; for activations without the batch, whose size should not matter.
        share = x.numel() // (self.channels or 1)
        if not self.weight and x.dim():
            share //= x.shape[0]
        factor = 1 / math.sqrt(max(share, 1) * self.config.limits[1])
        found: Tensor = _LearnedStep.apply(x, self.step, self.grid(), factor)
        return found


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, grid: Grid, factor: float) -> Tensor:
        ctx.save_for_backward(x, grid.scale)
        ctx.limits, ctx.axis, ctx.factor, ctx.dtype = (grid.low, grid.high), grid.axis, factor, step.dtype
        return grid.nearest(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale = ctx.saved_tensors
        low, high = ctx.limits
        scale = aligned(scale.to(x.dtype), x.dim(), ctx.axis)
        ratio = x / torch.where(scale > 0, scale, torch.finfo(x.dtype).tiny)
        inside = (ratio > low) & (ratio < high)
        slope = ratio.round().clamp_(low, high).sub_(torch.where(inside, ratio, 0))
        towards = gradient * slope
        if ctx.axis is None:
            towards = towards.sum()
        else:
            rest = [dim for dim in range(x.dim()) if dim != ctx.axis]
            towards = towards.sum(rest) if rest else towards
        return gradient * inside, (towards * ctx.factor).to(ctx.dtype), None, None


class PactQuantizer(Quantizer):
    """Activations clipped to [0, alpha] with a learned alpha, then uniformly quantized (Choi 2018).

    The gradient of x is 1 for 0 <= x < alpha; that of alpha is the sum of gradients where x >= alpha (eq. 3).

    Parameter: ``alpha`` float32 (), initially 8.
    """

    has_range = True

    def __init__(self, config: QuantizerConfig, *, weight: bool, channels: int | None) -> None:
        super().__init__(config, weight=weight, channels=channels)
        self.alpha = nn.Parameter(torch.tensor(8.0))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set alpha to the largest value."""
        self.alpha.copy_(high.clamp(min=0))

    def grid(self) -> Grid:
        """0 to 2^bits - 1, with a scale of alpha / (2^bits - 1)."""
        low, high = self.config.limits
        scale = self.alpha.detach().float().clamp(min=0) / high
        return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), low, high)

    def _quantized(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.grid().nearest(x)
        found: Tensor = _LearnedClip.apply(x, self.alpha, self.grid())
        return found


class _LearnedClip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward((x >= 0) & (x < alpha), x >= alpha)
        ctx.dtype = alpha.dtype
        return grid.nearest(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        inside, above = ctx.saved_tensors
        return gradient * inside, (gradient * above).sum().to(ctx.dtype), None
