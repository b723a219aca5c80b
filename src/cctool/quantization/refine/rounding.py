"""Learning the rounding of one weight: continuous variables that converge to 0 or 1.

M. Nagel et al. 2020 (arXiv 2004.10568), equations 21 to 25.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cctool.quantization.quantizers.base import Quantizer
from cctool.quantization.quantizers.grid import aligned
from cctool.quantization.refine.im2col import ConvGeometry, weight_rows

_ZETA, _GAMMA = 1.1, -0.1
_WARM_START = 0.2
_BETAS = (20.0, 2.0)
_RATE = 1e-1
_BATCH = 256
_REGULARISER = 10.0
_JUDGES = 8


@dataclass(frozen=True)
class Rows:
    """A layer's inputs and target outputs at places.

    Attributes:
        inputs: (groups, P, inputs of a row).
        outputs: (P, C), of the floating-point network.
        geometry: of the layer.
    """

    inputs: Tensor
    outputs: Tensor
    geometry: ConvGeometry

    def __len__(self) -> int:
        return len(self.outputs)


@dataclass(frozen=True, eq=False)
class Learned:
    """A learned rounding; see `adaround.RoundedLayer`.

    Attributes:
        up: bool in the weight's shape, whether it is rounded up.
    """

    up: Tensor
    nearest: float
    learned: float
    changed: float
    kept: bool
    rows: int


class WeightRounding:
    """The two grid values between which each weight can be rounded."""

    def __init__(
        self, weight: Tensor, quantizer: Quantizer, fold: Tensor | None, mask: Tensor | None
    ) -> None:
        """Compute floor and fraction of each weight on the grid.

        Args:
            weight: finite.
            quantizer: with a grid.
            fold: see `Quantizer.forward`.
            mask: True for kept weights; the others are 0. None is all.
        """
        grid = quantizer.grid()
        assert grid is not None
        self.grid, self.mask, self.dtype = grid, mask, weight.dtype
        folded = quantizer.folded(weight, fold)
        ones = torch.ones_like(weight, dtype=folded.dtype)
        self.factors = quantizer.folded(ones, fold)
        scale, zero = (aligned(state, weight.dim(), grid.axis) for state in (grid.scale, grid.zero_point))
        exact = folded / scale.clamp(min=torch.finfo(torch.float32).tiny) + zero
        # Values beyond the grid are clipped to its end, whichever way they are rounded.
        self.floor = exact.clamp(grid.low - 1.0, grid.high + 1.0).floor()
        self.fraction = (exact - self.floor).clamp(0, 1)
        nearest = grid.integers(folded).to(self.floor.dtype)
        self.nearest = nearest > self.floor

    def values(self, up: Tensor) -> Tensor:
        """The weight, given how far each entry is rounded up, from 0 to 1 (eq. 22); unfolded and masked."""
        n = (self.floor + up).clamp(self.grid.low, self.grid.high)
        found = self.grid.decoded(n) / self.factors
        return found if self.mask is None else found * self.mask

    def chosen(self, up: Tensor) -> Tensor:
        """The weight for a rounding, in its own type."""
        return self.values(up.to(self.floor.dtype)).to(self.dtype)


def learn(
    rounding: WeightRounding,
    rows: Rows,
    bias: Tensor | None,
    after: Callable[[Tensor], Tensor],
    *,
    steps: int,
    generator: torch.Generator,
) -> Learned:
    """Learn a rounding with Adam.

    The loss is the squared error of outputs, summed over channels and divided by that of nearest rounding,
    plus the regulariser (eq. 24), so that their balance does not depend on the scale of the outputs. The
    regulariser is off for the first fifth of the steps; then its exponent goes from 20 to 2 along a half
    cosine.

    Args:
        rounding: of the weight.
        rows: inputs and target outputs.
        bias: of the layer, (C,); None without.
        after: what follows in the network, on (P, C).
        steps: 1 or more.
        generator: for batches.
    """
    # The last rows, which come from the last images, are held out.
    judges = len(rows) // _JUDGES
    used = len(rows) - judges
    judging = slice(used, None) if judges else slice(None)
    wanted = after(rows.outputs)

    def outputs(weight: Tensor, chosen: Tensor | slice) -> Tensor:
        matrix = weight_rows(weight, rows.geometry)
        found = torch.bmm(rows.inputs[:, chosen], matrix.transpose(1, 2)).transpose(0, 1).flatten(1)
        return after(found if bias is None else found + bias)

    def judged(up: Tensor) -> float:
        weight = rounding.chosen(up).to(rows.inputs.dtype)
        return float((outputs(weight, judging) - wanted[judging]).square().mean())

    with torch.no_grad():
        weight = rounding.chosen(rounding.nearest).to(rows.inputs.dtype)
        first = (outputs(weight, slice(0, used)) - wanted[:used]).square().sum(1).mean()
    # Avoids a division by 0 in a layer without error.
    scale = float(first.clamp(min=torch.finfo(torch.float32).tiny))
    # The sigmoid is stretched to [gamma, zeta] and clipped (eq. 23); its inverse makes training begin at the
    # unrounded weight.
    soft = ((rounding.fraction - _GAMMA) / (_ZETA - _GAMMA)).clamp(1e-4, 1 - 1e-4)
    variable = soft.logit().float().requires_grad_()
    optimizer = torch.optim.Adam([variable], lr=_RATE)
    begin = int(_WARM_START * steps)
    for step in range(steps):
        picked = torch.randint(used, (min(_BATCH, used),), generator=generator).to(wanted.device)
        up = (torch.sigmoid(variable) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
        weight = rounding.values(up).to(rows.inputs.dtype)
        loss = (outputs(weight, picked) - wanted[picked]).square().sum(1).mean() / scale
        if step >= begin:
            beta = _beta((step - begin) / max(1, steps - begin))
            loss = loss + _REGULARISER * (1 - (2 * up - 1).abs().pow(beta)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        up = variable > 0
        nearest, learned = judged(rounding.nearest), judged(up)
        changed = rounding.chosen(up) != rounding.chosen(rounding.nearest)
    return Learned(up, nearest, learned, float(changed.float().mean()), learned < nearest, used)


def _beta(progress: float) -> float:
    """The exponent after this share of the steps with a regulariser."""
    first, last = _BETAS
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2
