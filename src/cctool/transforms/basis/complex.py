"""Networks that compute with complex numbers: DFT basis layers, and the modules between them.

Values are complex tensors of any shape; parameters are stored as real tensors. Every module here accepts real
inputs too, because the first complex layer of a network gets them.

- The activation is the cardioid z (1 + cos arg z) / 2 (Virtue et al. 2017, equation 7), which is the ReLU on
  real numbers.
- Max pooling picks the value of the largest |z|.
- Batch norm normalises real and imaginary parts separately, each to variance 1/2, so that E|z|^2 is 1 as with
  real batch norm. (The thesis divides the parts by 2 instead of sqrt(2).)
- The complex part ends with |z|, before a real layer or at the network's outputs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.base.errors import TransformError
from cctool.checkpoint.edits.thin import Cut
from cctool.transforms.basis.conv import ConvolutionBasis
from cctool.transforms.basis.frequencies import complex_rows
from cctool.transforms.basis.linear import BIAS_STD, BasisArguments, BasisLayer, LinearBasis, init_normal
from cctool.transforms.layers.base import SwappedLayer, remade

# The square of 1e-12, below which |z| counts as zero. Gradients need its power -3/2, which float32 still
# holds.
_TINY = 1e-24


def magnitude(values: Tensor) -> Tensor:
    """|z| of complex values, with a gradient that is 0 at 0 and finite everywhere; real values unchanged.

    `torch.abs` has NaN gradients for values whose square underflows.
    """
    if not values.is_complex():
        return values
    return (values.real.square() + values.imag.square() + _TINY).sqrt()


class ComplexModule(nn.Module):
    """Base of the modules between complex layers.

    Args:
        ends: whether this is the network's last complex module, which outputs |z|.
    """

    def __init__(self, ends: bool = False) -> None:
        super().__init__()
        self.ends = ends

    def ended(self, values: Tensor) -> Tensor:
        """The output for what the module computed: |z| at the end of the complex part."""
        return magnitude(values) if self.ends else values


class Cardioid(ComplexModule):
    """z (1 + cos arg z) / 2; on real values, the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map complex or real values elementwise."""
        if not x.is_complex():
            return F.relu(x)
        cosine = x.real * (x.real.square() + x.imag.square() + _TINY).rsqrt()
        return self.ended(x * ((1 + cosine) / 2))


class _AroundLayer(ComplexModule):
    """A module for complex values that passes real ones to an ordinary layer."""

    def __init__(self, layer: nn.Module, ends: bool = False) -> None:
        super().__init__(ends)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map complex or real values of any shape that the layer takes."""
        if not x.is_complex():
            return self.layer(x)  # type: ignore[no-any-return]
        return self.ended(self._of_complex(x))

    @abstractmethod
    def _of_complex(self, x: Tensor) -> Tensor: ...


class ComplexMaxPool2d(_AroundLayer):
    """`nn.MaxPool2d` or `nn.AdaptiveMaxPool2d` that picks the value of the largest magnitude."""

    def __init__(self, layer: nn.Module, ends: bool = False) -> None:
        super().__init__(layer, ends)
        # A copy that returns the places of the maxima; the layer itself serves real inputs.
        self.indexing = remade(layer, type(layer))
        self.indexing.return_indices = True  # type: ignore[assignment]

    def _of_complex(self, x: Tensor) -> Tensor:
        # Only the places come from the magnitudes; the gradient passes through the picked values.
        _, places = self.indexing(magnitude(x.detach()))
        return x.flatten(-2).gather(-1, places.flatten(-2)).view(places.shape)


class ComplexAverage(_AroundLayer):
    """Average pooling of real and imaginary parts; correct for any linear module without parameters."""

    def _of_complex(self, x: Tensor) -> Tensor:
        return torch.complex(self.layer(x.real), self.layer(x.imag))


class ComplexDropout(_AroundLayer):
    """Dropout of whole complex values, by `nn.Dropout` or its variants for whole channels."""

    def _of_complex(self, x: Tensor) -> Tensor:
        # The layer gets a new tensor, because it may work in place.
        kept: Tensor = self.layer(torch.ones_like(x.real))
        return x * kept


class ComplexBatchNorm(ComplexModule):
    """Separate batch norms of real and imaginary parts, divided by sqrt(2).

    Args:
        real: batch norm of the real parts, the architecture's own.
        imaginary: one of the same kind for the imaginary parts.
        ends: see `ComplexModule`.
    """

    def __init__(self, real: nn.Module, imaginary: nn.Module, ends: bool = False) -> None:
        super().__init__(ends)
        self.real = real
        self.imaginary = imaginary

    def forward(self, x: Tensor) -> Tensor:
        """Normalise complex values (N, C, ...); real ones like real parts."""
        if not x.is_complex():
            return self.real(x)  # type: ignore[no-any-return]
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
    """What the DFT basis layers share. They have no plain counterpart and cannot be cut."""

    def channel_rows(self) -> Tensor:
        """(rows, samples), complex, each row of norm 1."""
        offsets, size, period = (
            self.offsets("frequency_offsets"),
            self.arguments.inputs,
            self.arguments.period,
        )
        return complex_rows(self.indices, offsets, self.positions, size=size, period=period)

    def plain(self) -> nn.Module | None:
        """See `SwappedLayer`."""
        return None

    def taken(self, cuts: Mapping[str, Sequence[Cut]]) -> SwappedLayer:
        """See `SwappedLayer`."""
        raise TransformError(
            "a dft basis layer computes with complex numbers and cannot be cut; prune before the transform"
        )

    def ended(self, values: Tensor) -> Tensor:
        """The output for what the layer computed: |z| at the end of the complex part."""
        return magnitude(values).to(self.frequency_offsets.dtype) if self.arguments.ends else values


class ComplexBasisLinear(ComplexLayer, LinearBasis, nn.Linear):  # type: ignore[misc,override]
    """A linear layer of DFT rows with 3 x out_features parameters, because its bias is complex.

    Both parts of the bias are initialised with N(0, 0.5), as in the thesis.
    """

    ordinary = nn.Linear
    bias_imaginary: nn.Parameter | None

    def begin(self, arguments: BasisArguments) -> None:
        """See `BasisLayer`."""
        super().begin(arguments)
        # The attribute exists without a bias, too.
        self.register_parameter("bias_imaginary", None)
        if self.bias is not None:
            self.bias_imaginary = nn.Parameter(torch.zeros_like(self.bias))
            init_normal(self.bias, BIAS_STD)
            init_normal(self.bias_imaginary, BIAS_STD)

    def compute_weight(self) -> Tensor:
        """(out_features, in_features), complex."""
        return self.channel_rows()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (..., in_features), complex or real, to (..., out_features): complex, or |z| at the end."""
        weight = self.weight
        if input.is_complex():
            products = F.linear(input.to(weight.dtype), weight)
        else:
            x = input.to(weight.real.dtype)
            # Autocast gives half-precision products, for which there is no complex type.
            parts = [F.linear(x, part).to(x.dtype) for part in (weight.real, weight.imag)]
            products = torch.complex(*parts)
        if self.bias is not None and self.bias_imaginary is not None:
            parts = [part.to(weight.real.dtype) for part in (self.bias, self.bias_imaginary)]
            products = products + torch.complex(*parts)
        return self.ended(products)


class ComplexBasisConv2d(ComplexLayer, ConvolutionBasis, nn.Conv2d):  # type: ignore[misc,override]
    """A convolution of DFT basis functions.

    The formula and the number of parameters are those of `conv.py`, with complex rows: coefficients and bias
    are real, and the bias is added to the real part.
    """

    ordinary = nn.Conv2d

    def spatial_rows(self, offsets: Tensor, size: int) -> Tensor:
        """(size, size), complex: the rows of one axis of the kernel."""
        every = torch.arange(size, device=offsets.device)
        return complex_rows(every, offsets, every, size=size, period=size)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map complex or real maps (N, Cin, H, W) to complex ones, or to |z| at the end."""
        weight = self.weight
        bias = None if self.bias is None else self.bias.to(weight.real.dtype)
        if input.is_complex():
            biased = None if bias is None else torch.complex(bias, torch.zeros_like(bias))
            return self.ended(self._conv_forward(input.to(weight.dtype), weight, biased))
        x = input.to(weight.real.dtype)
        real = self._conv_forward(x, weight.real, bias).to(x.dtype)
        imaginary = self._conv_forward(x, weight.imag, None).to(x.dtype)
        return self.ended(torch.complex(real, imaginary))
