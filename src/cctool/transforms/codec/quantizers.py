"""The codec's two quantizers: values to integers before the transform, coefficients to symbols behind it.

Both compute in float64, so that CPU and CUDA give the same integers, and round half to even. A coefficient is
rounded to float32 before it is rounded to an integer: sums that are exact ties at one half then are ties here
too, whatever the order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOAT_BITS = 24


@dataclass(frozen=True)
class Rounded:
    """Result of a quantizer.

    Attributes:
        values: the integers, clamped.
        inside: bool, True where nothing was clamped; None if not requested.
    """

    values: Tensor
    inside: Tensor | None

    def clamped(self) -> Tensor:
        """Number of clamped values, a scalar int64 on their device."""
        assert self.inside is not None
        return self.inside.numel() - self.inside.sum()


@dataclass(frozen=True)
class PrequantizerLevels:
    """Evenly spaced levels: x = offset + step * v for integers v from ``bottom`` to ``top``.

    Attributes:
        offset: scalar float64; None is 0.
        step: scalar float64, positive.
        bottom: smallest integer.
        top: largest integer.
    """

    offset: Tensor | None
    step: Tensor
    bottom: int
    top: int

    def to_integers(self, x: Tensor, *, look: bool = False) -> Rounded:
        """The nearest integers, as float64 in the shape of ``x``, which is not modified; NaN becomes 0.

        ``look`` also finds out what was clamped.
        """
        v = x.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        if self.offset is not None:
            v.sub_(self.offset)
        v.div_(self.step).round_().nan_to_num_(nan=0.0)
        inside = (v >= self.bottom).logical_and_(v <= self.top) if look else None
        return Rounded(v.clamp_(self.bottom, self.top), inside)

    def to_values(self, v: Tensor) -> Tensor:
        """The values of integers, or of numbers between them: float64 in, float64 out."""
        x = v * self.step
        return x if self.offset is None else x.add_(self.offset)


def prequantizer_levels(bounds: Tensor, prequantizer: str, bits: int) -> PrequantizerLevels:
    """The levels of the quantizer before the transform, for calibrated (minimum, maximum) ``bounds`` (2,).

    ``unsigned`` maps 0 to the maximum to 0..2^bits - 1; ``offset`` maps the minimum to the maximum to the
    same; ``signed`` has -(2^(bits-1) - 1)..2^(bits-1) - 1, symmetric about 0. There are at least 2 bits.
    """
    low, high = bounds.double().unbind()
    top = 2**bits - 1
    if prequantizer == "signed":
        top = 2 ** (bits - 1) - 1
        return PrequantizerLevels(None, _positive(torch.maximum(low.abs(), high.abs()) / top), -top, top)
    if prequantizer == "offset":
        return PrequantizerLevels(low, _positive((high - low) / top), 0, top)
    return PrequantizerLevels(None, _positive(high / top), 0, top)


def _positive(step: Tensor) -> Tensor:
    """A map that is zero everywhere has no range; any step codes it."""
    return torch.where(step > 0, step, torch.ones_like(step))


def symbol_bounds(bits: int | None) -> tuple[float, float]:
    """Smallest and largest symbol of ``bits`` bits; None is 32.

    >>> symbol_bounds(8)
    (-128.0, 127.0)
    """
    bits = bits or 32
    # Symbols are clamped as float32. Above 25 bits it cannot hold 2^(bits-1) - 1; this is the largest value
    # below 2^(bits-1) that it can.
    return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 2.0 ** max(0, bits - 1 - _FLOAT_BITS)


def to_symbols(y: Tensor, bits: int | None, dead_zone: float = 0.0, *, look: bool = False) -> Rounded:
    """Round coefficients, in units of their steps, to int32 symbols.

    Args:
        y: float64, any shape.
        bits: that symbols are clamped to; None is 32.
        dead_zone: levels begin at n + 0.5 + dead_zone steps, in [0, 0.5); 0 rounds half to even.
        look: also find out what was clamped.
    """
    z = y.float()
    z = z.abs().sub_(0.5 + dead_zone).ceil_().clamp_(min=0).copysign_(z) if dead_zone else z.round_()
    low, high = symbol_bounds(bits)
    inside = (z >= low).logical_and_(z <= high) if look else None
    return Rounded(z.clamp_(low, high).to(torch.int32), inside)
