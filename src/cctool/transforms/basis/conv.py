"""Convolutions built from few basis functions: trainable frequencies, and a coefficient map per filter.

For output channel o, input channel i and kernel position (a, b), with k rows of a basis (`frequencies`):

    w[o, i, a, b] = s * kc[o, i] * sum over p, q of delta[o, p, q] * kh[p, a] * kw[q, b]

kc has a row per output channel over the input channels of its group; kh and kw have as many rows as the
kernel has positions, so the spatial part is the separable inverse transform of a map of coefficients. The
thesis has s = 1 / (kH kW) and delta from N(0, 1), which makes activations vanish. Here delta is initialised
with N(0, 0.1), a scale at which the usual learning rates train it like other weights, and s gives filters the
squared norm that keeps the variance through the layer and its activation (He et al. 2015, equation 10).
Parameters: Cout + kH + kW + Cout * kH * kW, and Cout for the bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cctool.transforms.basis.frequencies import real_rows
from cctool.transforms.basis.linear import BasisLayer, init_normal

# Variance of an activation's input divided by that of its output, for zero-mean normal values: of the ReLU,
# and of the cardioid z (1 + cos arg z) / 2, whose output has 3/8 of E|z|^2.
_RELU_GAIN = 2.0
_CARDIOID_GAIN = 8 / 3
_DELTA_STD = 0.1


class ConvolutionBasis(BasisLayer):
    """What real and complex convolutions share.

    Attributes:
        height_offsets: (kH,) trained: how far the frequencies 0..kH-1 of the vertical axis moved.
        width_offsets: (kW,) likewise.
        delta: (Cout, kH, kW) coefficients.
    """

    own = ("frequency_offsets", "delta", "height_offsets", "width_offsets")
    per_row = ("frequency_offsets", "delta")
    height_offsets: nn.Parameter
    width_offsets: nn.Parameter
    delta: nn.Parameter
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, int]

    def _register(self, weight: Tensor) -> None:
        super()._register(weight)
        rows, _, height, width = weight.shape
        self.height_offsets = nn.Parameter(weight.new_zeros(height))
        self.width_offsets = nn.Parameter(weight.new_zeros(width))
        self.delta = nn.Parameter(weight.new_empty(rows, height, width))
        init_normal(self.delta, 1.0 if self.arguments.normalize_gradients else _DELTA_STD)

    @property
    def samples(self) -> int:
        """Length of a row: the input channels of a group."""
        return self.in_channels // self.groups

    def compute_weight(self) -> Tensor:
        """(Cout, Cin / groups, kH, kW)."""
        high, wide = (
            self.spatial_rows(self.offsets(name), size)
            for name, size in zip(("height_offsets", "width_offsets"), self.kernel_size, strict=True)
        )
        # The coefficients are real, the rows maybe complex.
        spatial = self._scale() * (high.T @ self.trained("delta").to(high.dtype) @ wide)
        return self.channel_rows()[:, :, None, None] * spatial[:, None]

    def spatial_rows(self, offsets: Tensor, size: int) -> Tensor:
        """(size, size): the rows of one axis of the kernel."""
        every = torch.arange(size, device=offsets.device)
        return real_rows(self.arguments.kernel, every, offsets, every, size=size, period=size)

    def _scale(self) -> float:
        positions = math.prod(self.kernel_size)
        if self.arguments.normalize_gradients:
            return 1 / positions
        gain = _CARDIOID_GAIN if self.arguments.kernel == "dft" else _RELU_GAIN
        return math.sqrt(gain / positions) / _DELTA_STD


class BasisConv2d(ConvolutionBasis, nn.Conv2d):  # type: ignore[misc,override]
    """A convolution of DCT or DST basis functions; see the module docstring. The bias begins at 0."""

    ordinary = nn.Conv2d
