"""Quantizers that learn their scale: LSQ (Esser 2020), PACT (Choi 2018) and APoT (Li 2020)."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from cctool.quantization.quantizers.base import Quantizer
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.grid import Grid, aligned, fitted

__all__ = ["ApotQuantizer", "LsqQuantizer", "PactQuantizer", "apot_levels"]


class LsqQuantizer(Quantizer):
    """x -> round(clip(x / step, low, high)) * step, with a learned step (Esser 2020, eq. 1 to 5).

    The step's gradient is round(x / step) - x / step inside the range and the limit outside, times
    1 / sqrt(N * high) for the N elements of a weight, or features of a sample, that share a step. A step that
    training drove to 0 or below counts as one next to 0: everything becomes 0, and its gradient leads back.

    Parameter: ``step`` float32, () or (C,).
    """

    has_range = True

    def __init__(self, config: QuantizerConfig, *, weight: bool, channels: int | None) -> None:
        super().__init__(config, weight=weight, channels=channels)
        self.step = nn.Parameter(torch.ones(() if channels is None else (channels,)))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the smallest step that holds the range."""
        self.step.copy_(fitted(low, high, self.config.limits, symmetric=True)[0])

    def grid(self) -> Grid:
        """The integers times the step."""
        scale = self.step.detach().float().clamp(min=0)
        return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), *self.config.limits, self.config.axis)

    def _initialise(self, x: Tensor) -> None:
        rest = [dim for dim in range(x.dim()) if dim != self.config.axis]
        mean = x.abs().double()
        # Without dimensions to reduce, torch would take all of them.
        mean = mean.mean(rest) if rest else mean
        self.step.copy_(2 * mean / math.sqrt(self.config.limits[1]))

    def _quantized(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.grid().nearest(x)
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
    """Activations clipped to [0, alpha] with a learned alpha, then evenly quantized (Choi 2018).

    The gradient of x is 1 for 0 <= x < alpha; alpha's is the sum of gradients where x >= alpha (eq. 3).

    Parameter: ``alpha`` float32 (), 8 at first.
    """

    has_range = True

    def __init__(self, config: QuantizerConfig, *, weight: bool, channels: int | None) -> None:
        super().__init__(config, weight=weight, channels=channels)
        self.alpha = nn.Parameter(torch.tensor(8.0))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the largest value for alpha."""
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


class ApotQuantizer(Quantizer):
    """Weights as sums of powers of two times a learned alpha (Li 2020, eq. 3, 5 and 8).

    The gradient of w is 1 for |w| <= alpha and 0 elsewhere; alpha's is w_q / alpha - w / alpha inside and
    sign(w) outside. The paper's normalisation of weights is left out; so alpha, which starts at 3 standard
    deviations there, starts at 3 times the root mean square, or at max|w| where that is less.

    Parameter: ``alpha`` float32 (), 3 at first.
    """

    has_range = True

    def __init__(self, config: QuantizerConfig, *, weight: bool, channels: int | None) -> None:
        super().__init__(config, weight=weight, channels=channels)
        self.alpha = nn.Parameter(torch.tensor(3.0))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the largest magnitude for alpha."""
        self.alpha.copy_(torch.maximum(-low, high).clamp(min=0))

    def grid(self) -> None:
        """None: the levels are not evenly spaced."""
        return None

    def _initialise(self, x: Tensor) -> None:
        self.alpha.copy_(torch.minimum(3 * x.double().square().mean().sqrt(), x.abs().amax()))

    def _quantized(self, x: Tensor) -> Tensor:
        indices, table = self._levels(x.detach())
        values = table[indices].to(x.dtype)
        if not torch.is_grad_enabled():
            return values
        found: Tensor = _LearnedPowers.apply(x, self.alpha, values)
        return found

    def _levels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        units = _levels_on(self.config.term_bits, str(self.alpha.device))
        table = (units * self.alpha.detach().double().clamp(min=0)).float() + 0.0
        # Between float32's levels there is room in float64: a level itself is nearest to no other.
        wide = table.double()
        return torch.bucketize(x.double(), (wide[1:] + wide[:-1]) / 2), table


class _LearnedPowers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha, values)
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, alpha, values = ctx.saved_tensors
        inside = x.abs() <= alpha
        wide = torch.where(alpha > 0, alpha, torch.ones_like(alpha)).to(x.dtype)
        slope = torch.where(inside, (values - x) / wide, x.sign())
        return gradient * inside, (gradient * slope).sum().to(alpha.dtype), None


@lru_cache(maxsize=64)
def _levels_on(term_bits: tuple[int, ...], device: str) -> Tensor:
    # No buffer of the module, for that would be cast with the rest of a network.
    return apot_levels(term_bits).to(device)


def apot_levels(term_bits: tuple[int, ...]) -> Tensor:
    """Levels of additive powers of two (Li 2020, eq. 3), float64, ascending, from -1 to 1.

    n terms of k bits each are 0 or one of 2^-i, 2^-(i+n), ..., 2^-(i+(2^k-2)n) for the i-th. Where terms
    have different widths, which the paper does not define, they take turns with the exponents just the same.

    >>> apot_levels((1, 1)).tolist()
    [-1.0, -0.6666666666666666, -0.3333333333333333, 0.0, 0.3333333333333333, 0.6666666666666666, 1.0]
    """
    choices, exponent = [[0.0] for _ in term_bits], 0
    for turn in range(max(2**width - 1 for width in term_bits)):
        for term, width in zip(choices, term_bits, strict=True):
            if turn < 2**width - 1:
                term.append(2.0**-exponent)
                exponent += 1
    half = torch.tensor(sorted(map(math.fsum, product(*choices))), dtype=torch.float64, device="cpu")
    return torch.cat((-half[1:].flip(0), half)) / half[-1]
