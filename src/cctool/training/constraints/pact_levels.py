"""PACT's penalty on the levels that activations are clipped at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cctool.training.constraints.base import Constraint

__all__ = ["ClippingDecay"]


class ClippingDecay(Constraint):
    """``strength * sum alpha^2`` over clipping levels (Choi et al. 2018, arXiv 1805.06085, section 3.2).

    Args:
        levels: the parameters alpha, each of any shape.
        strength: weight of the sum, from 0 on.
    """

    name = "alpha_decay"

    def __init__(self, levels: Sequence[nn.Parameter], strength: float) -> None:
        self._levels, self._strength = list(levels), strength

    def penalty(self) -> Tensor | None:
        """Give the weighted sum, a scalar; None where there are no levels."""
        if not self._levels or not self._strength:
            return None
        return self._strength * torch.stack([level.square().sum() for level in self._levels]).sum()
