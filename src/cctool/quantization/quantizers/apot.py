"""A quantizer that learns the scale of sums of powers of two (APoT, Li 2020), those of `apot_levels`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from cctool.quantization.encodings.apot_levels import sums_of_powers
from cctool.quantization.quantizers.base import Quantizer
from cctool.quantization.quantizers.config import QuantizerConfig


class ApotQuantizer(Quantizer):
    """Weights as sums of powers of two times a learned alpha (Li 2020, eq. 3, 5 and 8).

    The gradient of w is 1 for |w| <= alpha and 0 elsewhere; alpha's is w_q / alpha - w / alpha inside and
    sign(w) outside. The paper normalises weights and starts alpha at 3 standard deviations. Here
    weights are not normalised, and alpha starts at the lesser of max|w| and 3 times the root mean square.

    Parameter: ``alpha`` float32 (), 3 at first.
    """

    has_range = True

    def __init__(self, config: QuantizerConfig, *, weight: bool, channels: int | None) -> None:
        super().__init__(config, weight=weight, channels=channels)
        self.alpha = nn.Parameter(torch.tensor(3.0))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set alpha to the largest magnitude."""
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
    return unit_levels(term_bits).to(device)


def unit_levels(term_bits: tuple[int, ...]) -> Tensor:
    """Levels of `sums_of_powers`, float64, ascending, from -1 to 1.

    >>> unit_levels((1, 1)).tolist()
    [-1.0, -0.6666666666666666, -0.3333333333333333, 0.0, 0.3333333333333333, 0.6666666666666666, 1.0]
    """
    levels = sums_of_powers(term_bits)
    # Without the negative zero.
    return torch.from_numpy(levels / levels[-1] + 0.0)
