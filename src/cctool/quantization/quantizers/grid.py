"""Evenly spaced levels: x = (n - zero_point) * scale for integers n from ``low`` to ``high``.

This is what ONNX's QuantizeLinear and DequantizeLinear compute: the quotient is rounded half to even before
the zero point is added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """A uniform grid, for the whole tensor or for each slice along a dimension.

    Attributes:
        scale: float32 () or (C,), 0 or more. If it is 0, 0 is the only value.
        zero_point: int32 of the same shape, from ``low`` to ``high``.
        low: lowest integer.
        high: highest integer.
        axis: dimension of the C slices; None if the scale is one number.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    axis: int | None = None

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` (float32 or float64) over scale, rounded half to even, plus the zero point; not clamped."""
        scale, zero = self._aligned(x)
        # Scale 0: dividing by the largest number gives the zero point, and infinities do not become NaN.
        scale = torch.where(scale > 0, scale, torch.finfo(x.dtype).max)
        return torch.div(x, scale).round_().add_(zero)

    def integers(self, x: Tensor) -> Tensor:
        """The nearest integers, int32 in the shape of ``x``; NaN becomes the zero point."""
        x = _wide(x)
        zero = self._aligned(x)[1]
        n = self.rounded(x).clamp_(self.low, self.high)
        return torch.where(torch.isnan(n), zero, n).to(torch.int32)

    def values(self, n: Tensor) -> Tensor:
        """The values of integers, float32 in the shape of ``n``."""
        return self.decoded(n.to(torch.float32, copy=True))

    def decoded(self, n: Tensor) -> Tensor:
        """The values of integers given as float32 or float64; ``n`` is overwritten."""
        scale, zero = self._aligned(n)
        return n.sub_(zero).mul_(scale)

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest values, in the shape and type of ``x``; NaN stays.

        float64 is computed in float64, all other floating-point types in float32.
        """
        return self.decoded(self.rounded(_wide(x)).clamp_(self.low, self.high)).to(x.dtype)

    def table(self) -> Tensor:
        """The values of all integers from ``low`` up: float32 (L,), or (C, L) with a scale per slice."""
        n = torch.arange(self.low, self.high + 1, device=self.scale.device, dtype=torch.float32)
        return (n - self.zero_point[..., None]) * self.scale[..., None]

    def _aligned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = self.scale.to(x.device, x.dtype), self.zero_point.to(x.device, x.dtype)
        return aligned(scale, x.dim(), self.axis), aligned(zero, x.dim(), self.axis)


def aligned(value: Tensor, dims: int, axis: int | None) -> Tensor:
    """Reshape (C,) so that it broadcasts along ``axis`` of a tensor with ``dims`` dimensions; () stays."""
    return value if axis is None else value.view([-1 if dim == axis else 1 for dim in range(dims)])


def extremes(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, () or one per slice along ``axis``; 0 if empty."""
    if not x.numel():
        none = x.new_zeros(() if axis is None else (x.shape[axis],))
        return none, none
    if axis is None:
        low, high = torch.aminmax(x)
        return low, high
    rest = [dim for dim in range(x.dim()) if dim != axis]
    return (x.amin(rest), x.amax(rest)) if rest else (x, x)


def fitted(low: Tensor, high: Tensor, limits: tuple[int, int], *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The smallest scale, and its zero point, whose grid covers a range widened to contain 0.

    Args:
        low: () or (C,), smallest values.
        high: of the same shape, largest values. NaN counts as 0, an infinity as the largest finite number.
        limits: lowest and highest integer.
        symmetric: keep the zero point at 0. If the lowest integer is 0, negative values are then clipped.

    Returns:
        float32 scale and int32 zero point, in the shape of ``low``. The scale is 0 if the range is.
        Rounding the zero point may clip half a step off one end, and ranges near the largest float32 number
        are clipped, so that no value of the grid overflows.
    """
    bottom, top = limits
    least, most = low.double().nan_to_num(0.0).clamp(max=0), high.double().nan_to_num(0.0).clamp(min=0)
    # Divided before they are subtracted, because the difference of the ends may overflow.
    if symmetric:
        scale = most / top if not bottom else torch.maximum(least / bottom, most / top)
    else:
        scale = most / (top - bottom) - least / (top - bottom)
    largest = torch.finfo(torch.float32).max / (2 * max(top, -bottom, top - bottom))
    scale = scale.clamp(max=largest).float()
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    wide = torch.where(scale > 0, scale, torch.ones_like(scale)).double()
    zero = (bottom - (least / wide).round()).clamp(bottom, top)
    return scale, zero.to(torch.int32)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
