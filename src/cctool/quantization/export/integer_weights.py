"""Weights as the integers, scales and zero points of an integer runtime: w = (n - z) * s.

They come from a quantizer, or from the form in which a checkpoint stores a weight. A batch norm that follows
is folded into the scales alone (Jacob et al. 2018, section 3.2, but after rounding): the integers stay those
of training and calibration, except where a factor is negative, which flips their signs, or zero.
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


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight on a uniform grid of 8 bits or fewer.

    Attributes:
        name: qualified name of the weight.
        integers: int32 in its shape, on the CPU, from ``low`` to ``high``.
        scale: float32 () or (C,), 0 or more.
        zero_point: int32, in the shape of ``scale``.
        axis: dimension of the C slices; None if the scale is one number.
        low: lowest integer of the grid; below 0 if integers are signed.
        high: highest one.
        reduced: whether the grid does not use one of 8 bits, so that sums of two products cannot saturate.
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
        """The fewest bits that hold the grid's integers, in two's complement if some are negative."""
        if self.low < 0:
            return max((-self.low - 1).bit_length(), self.high.bit_length()) + 1
        return max(self.high.bit_length(), 1)

    def values(self) -> Tensor:
        """The float32 values, bit for bit those of DequantizeLinear."""
        dims = self.integers.dim()
        scale, zero = (aligned(state, dims, self.axis) for state in (self.scale, self.zero_point))
        return (self.integers - zero).float() * scale

    def shaped(self, shape: tuple[int, ...]) -> IntegerWeight:
        """The same values in another shape, whose first dimension is the same."""
        return replace(self, integers=self.integers.reshape(shape))

    def finer(self, bits: int) -> IntegerWeight:
        """The same values on a grid of ``bits``, whose integers are multiples of a power of two.

        Returns the same grid if it has as many bits already.
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
        """The weight times a factor per slice; integers are kept wherever that is possible.

        Slices with a negative factor are mirrored within the grid. If a symmetric grid has one more negative
        integer than positive ones, that one is clipped, by one step.

        Args:
            factor: float32 or float64 (C,).
            axis: dimension of these slices.

        Returns:
            None if the weight has scales along another dimension.
        """
        if bool((factor == 1).all()):
            return self
        if self.axis not in (None, axis):
            return None
        if self.axis is None and bool(((factor == 0) | (factor == 1)).all()):
            # Zeros need no other scale: their integers become the zero point.
            gone = aligned(factor == 0, self.integers.dim(), axis)
            return replace(self, integers=torch.where(gone, self.zero_point, self.integers))
        # -(n - z) s = ((m - n) - (m - z)) s, with m = low + high: mirrored integers stay on the grid.
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
        made: the quantized weight, times the weight's mask.
        fold: factors that it was quantized with, none of them 0, (C,) along dimension 0; None without.

    Returns:
        None if there is no uniform grid of 8 bits.
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
    """The integers of a weight that a checkpoint stores as integers, masked or not; None for other encodings.

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
    # A file may hold the integer -2^(b-1), which our symmetric encoding never writes.
    return (
        replace(weight, low=min(weight.low, int(weight.integers.amin()))) if weight.integers.numel() else None
    )


def fits_byte(low: int, high: int) -> bool:
    """Whether signed or unsigned bytes hold all integers from ``low`` to ``high``."""
    return (low >= 0 and high <= 255) or (low >= -128 and high <= 127)
