"""Layers of networks that compute with complex numbers: DFT basis layers, and what stands between them.

Values are tensors of a complex type, whatever their shape; parameters are stored as real tensors. Every module
here takes real inputs too, as the first complex layer of a network does.

- The activation is the cardioid z (1 + cos arg z) / 2 (Virtue et al. 2017, equation 7), which is the ReLU on
  real numbers.
- Max pooling picks the value of the largest |z|.
- Batch norm normalises real and imaginary parts on their own, each to variance 1/2, so that E|z|^2 is the 1
  of real batch norm. (The thesis divides the parts by 2 in place of sqrt(2).)
- The complex part ends with |z|, before a real layer or at the network's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.errors import TransformError
from cctool.transforms.basis import BasisArguments, BasisLayer
from cctool.transforms.basis_conv import BasisConvolution
from cctool.transforms.frequencies import complex_rows
from cctool.transforms.swapped import Cut, SwappedLayer

__all__ = [
    "Cardioid",
    "ComplexAverage",
    "ComplexBasisConv2d",
    "ComplexBasisLinear",
    "ComplexBatchNorm",
    "ComplexDropout",
    "ComplexMaxPool2d",
    "ComplexModule",
    "MagnitudeConv2d",
    "MagnitudeLinear",
    "magnitude",
]

# The square of 1e-12, under which |z| counts as zero; its power -3/2, of the gradient, is still a float32.
_TINY = 1e-24


def magnitude(values: Tensor) -> Tensor:
    """|z| of complex values, whose gradient is 0 at 0 and finite everywhere; real values as they are.

    `torch.abs` gives NaN gradients for values whose square underflows.
    """
    if not values.is_complex():
        return values
    return (values.real.square() + values.imag.square() + _TINY).sqrt()


class ComplexModule(nn.Module):
    """Base of what stands between complex layers.

    Args:
        ends: whether this is the last complex module of its network, which puts out |z|.
    """

    def __init__(self, ends: bool = False) -> None:
        super().__init__()
        self.ends = ends

    def ended(self, values: Tensor) -> Tensor:
        """The module's output for what it computed."""
        return magnitude(values) if self.ends else values


class Cardioid(ComplexModule):
    """z (1 + cos arg z) / 2; on real values, the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map complex or real values of any shape to values of that shape."""
        if not x.is_complex():
            return F.relu(x)
        cosine = x.real * (x.real.square() + x.imag.square() + _TINY).rsqrt()
        return self.ended(x * ((1 + cosine) / 2))


class ComplexMaxPool2d(ComplexModule):
    """Max pooling that picks the value of the largest magnitude.

    Args:
        layer: the real pooling, `nn.MaxPool2d` or `nn.AdaptiveMaxPool2d`.
        ends: see `ComplexModule`.
    """

    def __init__(self, layer: nn.Module, ends: bool = False) -> None:
        super().__init__(ends)
        self.layer = layer
        self.return_indices = layer.return_indices

    def forward(self, x: Tensor) -> Tensor:
        """Pool maps (N, C, H, W) or (C, H, W)."""
        if not x.is_complex():
            return self.layer(x)  # type: ignore[no-any-return]
        _, places = self._largest(magnitude(x.detach()))
        picked = x.flatten(-2).gather(-1, places.flatten(-2)).view(places.shape)
        return self.ended(picked)

    def _largest(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        pool = self.layer
        if isinstance(pool, nn.AdaptiveMaxPool2d):
            return F.adaptive_max_pool2d(sizes, pool.output_size, return_indices=True)
        return F.max_pool2d_with_indices(
            sizes, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        )


class ComplexAverage(ComplexModule):
    """Average pooling of real and imaginary parts; any linear module without parameters will do.

    Args:
        layer: the real module.
        ends: see `ComplexModule`.
    """

    def __init__(self, layer: nn.Module, ends: bool = False) -> None:
        super().__init__(ends)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Pool maps (N, C, H, W) or (C, H, W)."""
        if not x.is_complex():
            return self.layer(x)  # type: ignore[no-any-return]
        return self.ended(torch.complex(self.layer(x.real), self.layer(x.imag)))


class ComplexDropout(ComplexModule):
    """Dropout of whole complex values.

    Args:
        layer: `nn.Dropout` or its kin for whole channels.
        ends: see `ComplexModule`.
    """

    def __init__(self, layer: nn.Module, ends: bool = False) -> None:
        super().__init__(ends)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of any shape that the real layer takes."""
        if not x.is_complex():
            return self.layer(x)  # type: ignore[no-any-return]
        # Written into a tensor of its own: the layer may work in place.
        return self.ended(x * self.layer(torch.ones_like(x.real)))


class ComplexBatchNorm(ComplexModule):
    """Batch norm of real and imaginary parts, each with statistics, scale and shift of its own, over sqrt(2).

    Args:
        real: batch norm of the real parts, the architecture's own.
        imaginary: another one of its kind.
        ends: see `ComplexModule`.
    """

    def __init__(self, real: nn.Module, imaginary: nn.Module, ends: bool = False) -> None:
        super().__init__(ends)
        self.real = real
        self.imaginary = imaginary

    def forward(self, x: Tensor) -> Tensor:
        """Normalise complex maps (N, C, ...)."""
        if not x.is_complex():
            raise TransformError(
                "a batch norm meets complex and real values: it cannot serve both; leave out layers with "
                "patterns of --layers"
            )
        parts = torch.complex(self.real(x.real), self.imaginary(x.imag))
        return self.ended(parts / math.sqrt(2))


class MagnitudeLinear(nn.Linear):
    """A real linear layer that takes |z| of complex inputs."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (..., in_features), complex or real, to real (..., out_features)."""
        return super().forward(magnitude(input))


class MagnitudeConv2d(nn.Conv2d):
    """A real convolution that takes |z| of complex inputs."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map complex or real maps to real ones."""
        return super().forward(magnitude(input))


class ComplexLayer(BasisLayer):
    """What the DFT basis layers share. They have no plain counterpart, and are not cut."""

    def plain(self) -> nn.Module | None:
        """See `SwappedLayer`."""
        return None

    def taken(self, cuts: Mapping[str, Sequence[Cut]]) -> SwappedLayer:
        """See `SwappedLayer`."""
        raise TransformError(
            "a dft basis layer computes with complex numbers: its channels cannot be cut; transform after pruning"
        )

    def _channel_rows(self) -> Tensor:
        return complex_rows(
            self.indices,
            self.offsets("frequency_offsets"),
            self.positions,
            size=self.arguments.inputs,
            period=self.arguments.period,
        )

    def _ended(self, values: Tensor) -> Tensor:
        if self.arguments.magnitude:
            return magnitude(values).to(self.frequency_offsets.dtype)
        return values


class ComplexBasisLinear(ComplexLayer, nn.Linear):  # type: ignore[misc]
    """A linear layer of DFT rows: 3 x out_features parameters, as its bias is complex.

    Args:
        in_features: of the layer.
        out_features: of the layer.
        bias: whether it has one; both parts begin as N(0, 0.5), as in the thesis.
        arguments: kernel ``dft``.
        like: gives device and type of the parameters.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, arguments: BasisArguments, like: Tensor
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._begin(arguments, out_features, in_features, like)
        for name in ("bias", "bias_imaginary"):
            self.register_parameter(
                name, nn.Parameter(torch.zeros_like(self.frequency_offsets)) if bias else None
            )
        if bias:
            nn.init.normal_(self.bias, std=0.5)
            nn.init.normal_(self.bias_imaginary, std=0.5)

    def compute_weight(self) -> Tensor:
        """(out_features, in_features), complex."""
        return self._channel_rows()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (..., in_features), complex or real, to (..., out_features): complex, or |z| at the end."""
        weight = self.weight
        if input.is_complex():
            products = F.linear(input.to(weight.dtype), weight)
        else:
            x = input.to(weight.real.dtype)
            real, imaginary = F.linear(x, weight.real), F.linear(x, weight.imag)
            products = torch.complex(real.to(x.dtype), imaginary.to(x.dtype))
        if self.bias is not None:
            products = products + torch.complex(self.trained("bias"), self.trained("bias_imaginary"))
        return self._ended(products)


class ComplexBasisConv2d(ComplexLayer, BasisConvolution):
    """A convolution of DFT basis functions; the bias is real and counts once.

    The formula is that of `basis_conv`, with complex rows and real coefficients: as many parameters as there.
    """

    def compute_weight(self) -> Tensor:
        """(Cout, Cin / groups, kH, kW), complex."""
        spatial = self._spatial(
            [
                self._spatial_rows(name, size)
                for name, size in zip(("height_offsets", "width_offsets"), self.kernel_size, strict=True)
            ]
        )
        return self._channel_rows()[:, :, None, None] * spatial[:, None]

    def _spatial_rows(self, name: str, size: int) -> Tensor:
        offsets = self.offsets(name)
        every = torch.arange(size, device=offsets.device)
        return complex_rows(every, offsets, every, size=size, period=size)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map complex or real maps to complex ones, or to |z| at the end."""
        weight = self.weight
        bias = None if self.bias is None else self.trained("bias")
        if input.is_complex():
            biased = None if bias is None else torch.complex(bias, torch.zeros_like(bias))
            products = self._conv_forward(input.to(weight.dtype), weight, biased)
        else:
            x = input.to(weight.real.dtype)
            real = self._conv_forward(x, weight.real, bias)
            imaginary = self._conv_forward(x, weight.imag, None)
            products = torch.complex(real.to(x.dtype), imaginary.to(x.dtype))
        return self._ended(products)
