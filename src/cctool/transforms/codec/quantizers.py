"""The codec's two quantizers: values to integers before the transform, coefficients to symbols behind it.

Both compute in float64, so that CPU and CUDA come to the same integers, and round half to even. A
coefficient is rounded to float32 before it is rounded to an integer: sums of halves that are ties in exact
arithmetic then are ties here, whatever the order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PrequantizerLevels", "Rounded", "prequantizer_levels", "symbol_bounds", "to_symbols"]

_FLOAT_BITS = 24


@dataclass(frozen=True)
class Rounded:
    """What a quantizer made of a tensor.

    Attributes:
        values: the integers, clamped.
        inside: bool, True where nothing was clamped; None where nobody asked.
    """

    values: Tensor
    inside: Tensor | None

    def clamped(self) -> Tensor:
        """How many values were clamped, int64 of no dims, on their device."""
        assert self.inside is not None
        return self.inside.numel() - self.inside.sum()


@dataclass(frozen=True)
class PrequantizerLevels:
    """Evenly spaced levels: x = offset + step * v for integers v from ``bottom`` to ``top``.

    Attributes:
        offset: float64 of no dims; None is 0.
        step: float64 of no dims, positive.
        bottom: smallest integer.
        top: largest integer.
    """

    offset: Tensor | None
    step: Tensor
    bottom: int
    top: int

    def to_integers(self, x: Tensor, *, look: bool = False) -> Rounded:
        """The nearest integers of ``x``, as float64 of its shape; NaN becomes 0.

        Args:
            x: floating point, of any shape; it is not written to.
            look: also tell what was clamped.
        """
        v = x.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        if self.offset is not None:
            v.sub_(self.offset)
        v.div_(self.step).round_().nan_to_num_(nan=0.0)
        inside = (v >= self.bottom).logical_and_(v <= self.top) if look else None
        return Rounded(v.clamp_(self.bottom, self.top), inside)

    def to_values(self, v: Tensor) -> Tensor:
        """The values of integers, or of what lies between them: float64 in, float64 out."""
        x = v * self.step
        return x if self.offset is None else x.add_(self.offset)


def prequantizer_levels(bounds: Tensor, prequantizer: str, bits: int) -> PrequantizerLevels:
    """The levels of the quantizer before the transform.

    ``unsigned`` has 0 to 2^bits - 1 for 0 to the maximum; ``offset`` as many for the minimum to the maximum;
    ``signed`` has -(2^(bits-1) - 1) to 2^(bits-1) - 1, symmetric about 0.

    Args:
        bounds: (2,) calibrated minimum and maximum.
        prequantizer: one of these three.
        bits: at least 2.
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
    """A map that was never anything but zero has no range; any step codes it."""
    return torch.where(step > 0, step, torch.ones_like(step))


def symbol_bounds(bits: int | None) -> tuple[float, float]:
    """Smallest and largest symbol of so many bits; None is as many as an int32 has.

    >>> symbol_bounds(8)
    (-128.0, 127.0)
    """
    bits = bits or 32
    # Above 24 bits, float32 reaches the largest one below 2^(bits-1).
    return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 2.0 ** max(0, bits - 1 - _FLOAT_BITS)


def to_symbols(y: Tensor, bits: int | None, dead_zone: float = 0.0, *, look: bool = False) -> Rounded:
    """Round coefficients in units of their steps to symbols.

    Args:
        y: float64, any shape.
        bits: that symbols are clamped to; None is 32.
        dead_zone: levels begin at n + 0.5 + dead_zone steps, in [0, 0.5); 0 rounds half to even.
        look: also tell what was clamped.

    Returns:
        int32 symbols of the shape of ``y``.
    """
    z = y.float()
    z = z.abs().sub_(0.5 + dead_zone).ceil_().clamp_(min=0).copysign_(z) if dead_zone else z.round_()
    low, high = symbol_bounds(bits)
    inside = (z >= low).logical_and_(z <= high) if look else None
    return Rounded(z.clamp_(low, high).to(torch.int32), inside)
