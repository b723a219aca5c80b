"""Convolutions whose filters are few basis functions: trainable frequencies and a coefficient map a filter.

For output channel o, input channel i and kernel position (a, b), with k rows of a basis (`frequencies`):

    w[o, i, a, b] = s * kc[o, i] * sum over p, q of delta[o, p, q] * kh[p, a] * kw[q, b]

kc has a row an output channel over the input channels of its group, kh and kw have as many rows as the kernel
has positions: the spatial part is the separable inverse transform of a map of coefficients. The thesis has
s = 1 / (kH kW) and delta from N(0, 1), which makes activations vanish. Here delta begins as N(0, 0.1), a size
that training with the usual rates moves along with the other weights, and s is such that the filters have the
squared norm that keeps the variance through the layer and its activation (He et al. 2015, equation 10).
Parameters: Cout + kH + kW + Cout * kH * kW, and Cout of the bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cctool.transforms.basis import BasisArguments, BasisLayer, kept_indices, with_values
from cctool.transforms.frequencies import real_rows
from cctool.transforms.swapped import Cut, SwappedLayer

__all__ = ["BasisConv2d", "BasisConvolution", "conv_geometry"]

_GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)

# Variance of an activation's input over that of its output, for normal values around zero: of the ReLU
# (He et al. 2015, equation 10), and of the cardioid z (1 + cos arg z) / 2, whose E|.|^2 is 3/8 E|z|^2.
_RELU_GAIN = 2.0
_CARDIOID_GAIN = 8 / 3
_DELTA_STD = 0.1


def conv_geometry(layer: nn.Conv2d) -> dict[str, Any]:
    """The attributes that say how a convolution moves over its input."""
    return {name: getattr(layer, name) for name in _GEOMETRY}


class BasisConvolution(BasisLayer, nn.Conv2d):  # type: ignore[misc]
    """What real and complex convolutions share.

    Args:
        geometry: as from `conv_geometry`, as the layer is now.
        bias: whether it has one; it begins as 0.
        arguments: of the edit.
        like: gives device and type.

    Attributes:
        height_offsets: (kH,) trained, what is added to the frequencies 0..kH-1 of the vertical axis.
        width_offsets: (kW,) likewise.
        delta: (Cout, kH, kW) coefficients.
    """

    def __init__(
        self, geometry: Mapping[str, Any], bias: bool, arguments: BasisArguments, like: Tensor
    ) -> None:
        nn.Module.__init__(self)
        for name in _GEOMETRY:
            setattr(self, name, geometry[name])
        self._begin(arguments, self.out_channels, self.in_channels // self.groups, like)
        height, width = self.kernel_size
        made = {"dtype": like.dtype, "device": like.device}
        self.height_offsets = nn.Parameter(torch.zeros(height, **made))
        self.width_offsets = nn.Parameter(torch.zeros(width, **made))
        self.delta = nn.Parameter(torch.empty(self.out_channels, height, width, **made))
        nn.init.normal_(self.delta, std=1.0 if arguments.normalize_gradients else _DELTA_STD)
        self.bias = nn.Parameter(torch.zeros(self.out_channels, **made)) if bias else None

    def _spatial(self, rows: Sequence[Tensor]) -> Tensor:
        """(Cout, kH, kW): the inverse transform of delta, ``rows`` being those of both axes."""
        high, wide = rows
        return self._scale() * (high.T @ self.trained("delta").to(high.dtype) @ wide)

    def _scale(self) -> float:
        positions = math.prod(self.kernel_size)
        if self.arguments.normalize_gradients:
            return 1 / positions
        gain = _CARDIOID_GAIN if self.arguments.kernel == "dft" else _RELU_GAIN
        return math.sqrt(gain / positions) / _DELTA_STD


class BasisConv2d(BasisConvolution):
    """A convolution of DCT or DST basis functions; see the head of this file."""

    def compute_weight(self) -> Tensor:
        """(Cout, Cin / groups, kH, kW)."""
        spatial = self._spatial(
            [
                self._spatial_rows(name, size)
                for name, size in zip(("height_offsets", "width_offsets"), self.kernel_size, strict=True)
            ]
        )
        weight = self.channel_rows()[:, :, None, None] * spatial[:, None]
        return weight.to(self.frequency_offsets.dtype)

    def _spatial_rows(self, name: str, size: int) -> Tensor:
        offsets = self.offsets(name)
        every = torch.arange(size, device=offsets.device)
        return real_rows(self.arguments.kernel, every, offsets, every, size=size, period=size)

    def plain(self) -> nn.Module:
        """See `SwappedLayer`."""
        layer = nn.Conv2d(1, 1, 1, bias=False, device="meta")
        for name, value in conv_geometry(self).items():
            setattr(layer, name, value)
        return with_values(layer, self)

    def taken(self, cuts: Mapping[str, Sequence[Cut]]) -> SwappedLayer:
        """See `SwappedLayer`."""
        kept = kept_indices(cuts)
        geometry = conv_geometry(self)
        samples = len(kept[1]) if 1 in kept else self.in_channels // self.groups
        if 0 in kept:
            geometry["groups"] = _groups_left(kept[0], self.out_channels, self.groups)
            geometry["out_channels"] = len(kept[0])
        geometry["in_channels"] = samples * geometry["groups"]
        arguments = self.arguments.with_cuts(kept)
        layer = BasisConv2d(geometry, self.bias is not None, arguments, self.frequency_offsets)
        layer._take_rows(self, kept)
        layer.take_parameter(self, "delta", kept.get(0))
        for name in ("height_offsets", "width_offsets"):
            layer.take_parameter(self, name, None)
        return layer.train(self.training)


def _groups_left(keep: Tensor, channels: int, groups: int) -> int:
    """Groups of a convolution whose output channels are cut: whole groups go, or as many of each."""
    each = channels // groups
    counts = torch.bincount(keep.cpu() // each, minlength=groups)
    whole = bool(((counts == 0) | (counts == each)).all())
    return int((counts == each).sum()) if whole else groups
