"""Weights as the integers, scales and zero points that an integer runtime takes: w = (n - z) * s.

They come from a quantizer, or from the form in which a checkpoint stores a weight. A batch norm that follows
is folded into the scales alone (Jacob et al. 2018, section 3.2, after the rounding): the integers stay what
training and calibration have seen, but where a factor is negative, which turns their signs, or zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cctool.checkpoint.encoding import EncodedTensor
from cctool.quantization.encodings.bitmask import unpack_bits
from cctool.quantization.encodings.intn import INTN, integers_of
from cctool.quantization.encodings.masked import MASKED, inner_form
from cctool.quantization.quantizers.base import Quantizer
from cctool.quantization.quantizers.grid import aligned

__all__ = ["IntegerWeight", "fits_byte", "from_quantizer", "from_stored"]


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight on a uniform grid of 8 bits or fewer.

    Attributes:
        name: qualified name of the weight.
        integers: int32 of its shape, on the CPU, from ``low`` to ``high``.
        scale: float32 () or (C,), 0 or more.
        zero_point: int32, of the shape of ``scale``.
        axis: dimension of the C slices; None where the scale is one number.
        low: lowest integer of the grid; below 0 where integers are signed.
        high: highest one.
        reduced: whether the grid leaves out one of 8 bits, so that no sum of two products saturates.
    """

    name: str
    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    low: int
    high: int
    reduced: bool = False

    @property
    def bits(self) -> int:
        """The fewest bits that hold the grid's integers, as signed ones where some are negative."""
        if self.low < 0:
            return max((-self.low - 1).bit_length(), self.high.bit_length()) + 1
        return max(self.high.bit_length(), 1)

    def values(self) -> Tensor:
        """What they stand for, float32: bit for bit what DequantizeLinear gives."""
        dims = self.integers.dim()
        scale, zero = (aligned(state, dims, self.axis) for state in (self.scale, self.zero_point))
        return (self.integers - zero).float() * scale

    def finer(self, bits: int) -> IntegerWeight:
        """The same values on a grid of more bits, whose integers are multiples of a power of two.

        Args:
            bits: of the grid; the weight itself where it has as many.
        """
        times = 1 << max(bits - self.bits, 0)
        return replace(
            self,
            integers=self.integers * times,
            scale=self.scale / times,
            zero_point=self.zero_point * times,
            low=self.low * times,
            high=self.high * times,
        )

    def scaled(self, factor: Tensor, axis: int) -> IntegerWeight | None:
        """The weight times a factor for each slice, the integers as they are wherever that can be.

        Slices whose factor is negative are mirrored within the grid. Where a symmetric grid has one more
        negative integer than positive ones, that one is clipped, by one step.

        Args:
            factor: float32 or float64 (C,).
            axis: dimension of these slices.

        Returns:
            None where the weight has scales along another dimension.
        """
        if bool((factor == 1).all()):
            return self
        if self.axis not in (None, axis):
            return None
        if self.axis is None and bool(((factor == 0) | (factor == 1)).all()):
            gone = aligned(factor == 0, self.integers.dim(), axis)
            return replace(self, integers=torch.where(gone, self.zero_point, self.integers))
        count = self.integers.shape[axis]
        zero = self.zero_point.expand(count)
        symmetric = not bool(self.zero_point.any()) and self.low < 0
        turned, dims = factor < 0, self.integers.dim()
        mirror = torch.zeros_like(zero) if symmetric else torch.full_like(zero, self.low + self.high)
        zero = torch.where(turned, mirror - zero, zero)
        mirrored = (aligned(mirror, dims, axis) - self.integers).clamp(self.low, self.high)
        integers = torch.where(aligned(turned, dims, axis), mirrored, self.integers)
        integers = torch.where(aligned(factor == 0, dims, axis), aligned(zero, dims, axis), integers)
        scale = (self.scale.double().expand(count) * factor.double().abs()).float()
        return replace(self, integers=integers.int(), scale=scale, zero_point=zero.contiguous(), axis=axis)


def from_quantizer(
    name: str, quantizer: Quantizer, made: Tensor, fold: Tensor | None
) -> IntegerWeight | None:
    """The integers of a quantized weight, times the fold that it was quantized with.

    Args:
        name: qualified name of the weight.
        quantizer: in evaluation mode.
        made: what it makes of the weight, times the weight's mask.
        fold: factors that it was quantized with, none of them 0, (C,) along dimension 0; None without.

    Returns:
        None where there is no uniform grid of 8 bits.
    """
    grid = quantizer.grid()
    if grid is None or not fits_byte(grid.low, grid.high):
        return None
    made = made.detach().cpu().float()
    grid = replace(grid, scale=grid.scale.detach().cpu(), zero_point=grid.zero_point.detach().cpu())
    if fold is not None:
        made = made * aligned(fold.detach().cpu().float(), made.dim(), 0)
    return IntegerWeight(
        name=name,
        integers=grid.integers(made),
        scale=grid.scale,
        zero_point=grid.zero_point.int(),
        axis=grid.axis,
        low=grid.low,
        high=grid.high,
        reduced=quantizer.config.reduce_range or grid.high - grid.low < 128,
    )


def from_stored(name: str, encoded: EncodedTensor) -> IntegerWeight | None:
    """The integers of a weight that a checkpoint stores as such, masked or not; None where it stores others.

    Raises:
        CorruptCheckpointError: if the parts contradict the shape.
    """
    mask = None
    if encoded.encoding == MASKED.name:
        form = inner_form(encoded)
        if form is None:
            return None
        encoded, mask = form, unpack_bits(encoded)
    axis, group = encoded.parameters.get("axis"), encoded.parameters.get("group")
    if encoded.encoding != INTN.name or group is not None or encoded.dtype != "float32":
        return None
    found = integers_of(encoded, mask)
    bits = encoded.parameters["bits"]
    assert isinstance(bits, int)
    signed = found.zero_point is None
    zero = torch.zeros_like(found.scale, dtype=torch.int32) if signed else found.zero_point
    assert zero is not None
    weight = IntegerWeight(
        name=name,
        integers=found.integers.int(),
        scale=found.scale,
        zero_point=zero.int(),
        axis=axis if isinstance(axis, int) else None,
        low=-(1 << (bits - 1)) + 1 if signed else 0,
        high=(1 << (bits - 1)) - 1 if signed else (1 << bits) - 1,
        reduced=bits < 8,
    )
    # A file may hold the one negative integer that the encoding itself never writes.
    return (
        replace(weight, low=min(weight.low, int(weight.integers.amin()))) if weight.integers.numel() else None
    )


def fits_byte(low: int, high: int) -> bool:
    """Whether a byte, signed or not, holds all integers from ``low`` to ``high``."""
    return (low >= 0 and high <= 255) or (low >= -128 and high <= 127)
