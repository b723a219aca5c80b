"""Quantizers with fixed ranges: DoReFa (Zhou 2016) and WRPN (Mishra 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError
from cctool.quantization.quantizers.base import Quantizer, straight_through, tracked
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.grid import Grid

_TINY = 2.0**-100
"""If max|tanh(w)| is not above this, weights count as zeros: level times maximum would underflow."""
_BELOW_ONE = 1 - 2.0**-24


class FixedQuantizer(Quantizer):
    """Evenly spaced levels from 0 or -1 to 1: WRPN, and the activations of DoReFa.

    Values are clamped and rounded to the nearest level; the gradient is that of the clamp. It has no state.
    """

    def grid(self) -> Grid:
        """The levels; on the CPU, because there is no state that has a device."""
        return self._grid(torch.device("cpu"))

    def _quantized(self, x: Tensor) -> Tensor:
        grid = self._grid(x.device)
        inside = (x >= (-1 if grid.low else 0)) & (x <= 1) if tracked(x) else None
        return straight_through(x, grid.nearest(x.detach()), inside)

    def _levels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        grid = self._grid(x.device)
        return grid.integers(x) - grid.low, grid.table()

    def _grid(self, device: torch.device) -> Grid:
        low, high = self.config.limits
        return _unit_grid(low, high, device)


class DorefaWeightQuantizer(Quantizer):
    """DoReFa's weights, which PACT uses too.

    With k bits, n = 2^k - 1 and a rounding gradient of 1 (Zhou 2016, eq. 9)::

        w_q = 2 / n * round(n * (tanh(w) / (2 max|tanh(w)|) + 1/2)) - 1

    tanh and, in training, the maximum have their gradients. One bit is sign(w) * mean|w|, with sign(0) = 1
    and the gradient of w (eq. 7 and 8).

    Buffer: ``maximum`` float32 (), max|tanh(w)| or mean|w|.
    """

    maximum: Tensor

    def __init__(self, config: QuantizerConfig, *, weight: bool, channels: int | None) -> None:
        super().__init__(config, weight=weight, channels=channels)
        self.register_buffer("maximum", torch.ones(()))

    def grid(self) -> Grid | None:
        """Odd integers from -(2^k - 1) to 2^k - 1; None from 8 bits on, where they need more than 8."""
        if self.config.bits == 1:
            zero = torch.zeros_like(self.maximum, dtype=torch.int32)
            return Grid(self.maximum.float(), zero, -1, 1)
        return _unit_grid(*self.config.limits, self.maximum.device) if self.config.bits < 8 else None

    def check(self) -> None:
        """Raise CorruptCheckpointError for a maximum that is negative or not finite."""
        super().check()
        if bool(self.maximum < 0):
            raise CorruptCheckpointError("a quantizer's maximum is negative")

    def _initialise(self, x: Tensor) -> None:
        self.maximum.copy_(self._statistic(x))

    def _quantized(self, x: Tensor) -> Tensor:
        maximum = self.maximum.to(x.dtype)
        if self.training:
            maximum = self._statistic(x)
            self.maximum.copy_(maximum.detach())
        if self.config.bits == 1:
            size = maximum.detach()
            # Adding 0 turns -0 into 0.
            return straight_through(x, torch.where(x >= 0, size, -size) + 0.0)
        ratio = torch.tanh(x) / _nonzero(maximum)
        top = self.config.limits[1]
        odd = _number(ratio.detach(), top).mul_(2).sub_(top)
        return straight_through(ratio, _unit_grid(-top, top, x.device).decoded(odd))

    def _levels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maximum = self.maximum.float()
        if self.config.bits == 1:
            return (x >= 0).to(torch.int32), torch.stack((-maximum, maximum)) + 0.0
        top = self.config.limits[1]
        size = _nonzero(maximum)
        numbers = _number(torch.tanh(x) / size.to(x.dtype), top).to(torch.int32)
        levels = torch.arange(-top, top + 1, 2, device=x.device, dtype=torch.float64) / top
        # The quantizer applies tanh again to what is stored, so the table holds its inverse; atanh(1) is
        # infinite.
        table = torch.atanh((size * levels).clamp(-_BELOW_ONE, _BELOW_ONE))
        # A weight that is all 0 stays 0: otherwise its stored values would have another maximum than before.
        middle = _number(torch.zeros_like(size), top).long()
        zero = (maximum <= _TINY) & (torch.arange(top + 1, device=x.device) == middle)
        return numbers, table.masked_fill(zero, 0.0).float()

    def _statistic(self, x: Tensor) -> Tensor:
        if self.config.bits == 1:
            return x.abs().mean(dtype=torch.float64).to(x.dtype)
        return torch.tanh(x).abs().amax()


def _nonzero(maximum: Tensor) -> Tensor:
    return torch.where(maximum > _TINY, maximum, torch.ones_like(maximum))


def _number(ratio: Tensor, top: int) -> Tensor:
    """Index of the nearest of ``top`` + 1 levels from -1 to 1, as floating point."""
    return (ratio / 2 + 0.5).mul_(top).round_().clamp_(0, top)


def _unit_grid(low: int, high: int, device: torch.device) -> Grid:
    scale = torch.full((), 1 / high, dtype=torch.float32, device=device)
    return Grid(scale, torch.zeros((), dtype=torch.int32, device=device), low, high)
