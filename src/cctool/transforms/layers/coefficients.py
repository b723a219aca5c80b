"""Linear and convolution layers whose parameters are transform coefficients of their weight.

    W = S x_1 B_1 x_2 B_2 ...

S are the coefficients, ``x_d`` multiplies along axis d, and the columns of B_d are basis functions
(`axes.py`); for a linear layer W = B_out S B_in^T. The layers are still instances of `nn.Linear` and
`nn.Conv2d`; their ``weight`` is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from cctool.base.errors import TransformError, UsageError
from cctool.checkpoint.edits.mask import mask_name
from cctool.checkpoint.edits.thin import Cut
from cctool.checkpoint.spec import Record
from cctool.transforms.kernels import by_name as kernels
from cctool.transforms.layers.axes import (
    KLT,
    MAX_KLT_LENGTH,
    TransformedAxis,
    analysed,
    count,
    narrowed,
    synthesised,
)
from cctool.transforms.layers.base import ComputedLayer, WeightCache, remade
from cctool.transforms.layers.factored import Beside, factored, projected, projection_pays

COEFFICIENT = "coefficient"
"""Name of these layers in the table of swaps."""

PARAMETER = "coefficients"
"""Name of their parameter."""


class Coefficients(Record):
    """Which axes of a weight are transformed, and how; the arguments of the swap."""

    axes: Annotated[tuple[TransformedAxis, ...], Field(min_length=1, max_length=4)]

    @model_validator(mode="after")
    def _consistent(self) -> Coefficients:
        dims = [axis.dim for axis in self.axes]
        if len(set(dims)) != len(dims):
            raise ValueError("an axis is transformed once")
        for axis in self.axes:
            try:
                kernels.check_kernel(axis.kernel, klt=True)
            except UsageError as error:
                raise ValueError(str(error)) from None
            longest = max(axis.length, axis.kept)
            if axis.kernel == KLT and longest > MAX_KLT_LENGTH:
                raise ValueError(f"dim {axis.dim}: klt of {longest} places, at most {MAX_KLT_LENGTH}")
            # After a cut, the basis of a KLT has fewer rows and all its columns, so more may be kept than
            # there are places.
            if axis.kept > axis.length and (axis.kernel != KLT or axis.block is not None):
                raise ValueError(f"dim {axis.dim} keeps {axis.kept} coefficients of {axis.length}")
        return self


class CoefficientLayer(ComputedLayer):
    """What the linear layer and the convolution share.

    Attributes:
        coefficients: the parameter; along a transformed axis it has `count` places, along others as many as
            the weight.
        arguments: how the axes are transformed.

    Buffers ``basis_D`` hold the basis of a KLT, shape (size, kept), and ``rows_D`` the places of axis D that
    remain after channels were cut, int32.
    """

    kind = COEFFICIENT
    coefficients: nn.Parameter
    bias: nn.Parameter | None
    arguments: Coefficients

    @property
    def weight(self) -> Tensor:
        """The weight, in the ordinary layer's shape; computed anew whenever gradients are recorded."""
        return self.cache.get(self._synthesised, self._sources())

    def _sources(self) -> list[Tensor]:
        """The tensors that the weight is computed from."""
        beside = (tensor for axis in self.arguments.axes for tensor in self._beside(axis))
        return [self.coefficients, *(tensor for tensor in beside if tensor is not None)]

    def _beside(self, axis: TransformedAxis) -> Beside:
        """Basis and rows of an axis."""
        return self._buffers.get(basis_name(axis)), self._buffers.get(rows_name(axis))

    def _synthesised(self) -> Tensor:
        stored = self.coefficients
        half = stored.dtype not in (torch.float32, torch.float64)
        weight = stored.float() if half else stored
        # Autocast would round the product to half precision.
        with torch.autocast(stored.device.type, enabled=False):
            for axis in self.arguments.axes:
                weight = synthesised(weight, axis, *self._beside(axis))
        # Gives the strides of a fresh tensor. The contiguous memory of a 1x1 kernel can pass for channels
        # last, and oneDNN's gradient of strided convolutions then writes past its memory (`training.fit`).
        weight = weight.flatten().view(weight.shape)
        return weight.to(stored.dtype) if half else weight

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Set the coefficients from a weight; masked ones stay zero, and a KLT keeps its basis.

        Args:
            weight: of this layer's shape before channels were cut.
        """
        found = weight if weight.dtype == torch.float64 else weight.float()
        for axis in self.arguments.axes:
            found = analysed(found, axis, self._buffers.get(basis_name(axis)))
        self.coefficients.copy_(found)
        mask = self._buffers.get(mask_name(PARAMETER))
        if mask is not None:
            self.coefficients.masked_fill_(mask.logical_not(), 0)

    def reset_parameters(self) -> None:
        """Initialise as the ordinary layer does."""
        if any(axis.rows for axis in self.arguments.axes):
            raise TransformError(
                "a layer whose channels were cut cannot be initialised in its transform domain"
            )
        fresh = self.plain()
        cast(Any, fresh).reset_parameters()
        self.set_weight(cast(Tensor, fresh.weight))

    def narrow(self, kept: Sequence[int]) -> None:
        """Keep fewer coefficients of each block of an axis: the lowest frequencies, or the most energy (KLT).

        Args:
            kept: for each axis in turn, at most its present number.
        """
        values, mask = self.coefficients.detach(), self._buffers.get(mask_name(PARAMETER))
        axes = []
        for axis, fewer in zip(self.arguments.axes, kept, strict=True):
            values, smaller = narrowed(values, axis, fewer)
            axes.append(smaller)
            if mask is not None:
                mask = self._buffers[mask_name(PARAMETER)] = narrowed(mask, axis, fewer)[0]
            basis = self._buffers.get(basis_name(axis))
            if basis is not None:
                self._buffers[basis_name(axis)] = basis[:, :fewer].clone()
        # A view would keep, and save, the memory of all former coefficients.
        self.coefficients = nn.Parameter(values.clone(), requires_grad=self.coefficients.requires_grad)
        self.arguments = Coefficients(axes=tuple(axes))
        self.cache.clear()

    def plain(self) -> nn.Module:
        """The ordinary layer with the present weight as its parameter; the bias is shared."""
        names = [name for axis in self.arguments.axes for name in (basis_name(axis), rows_name(axis))]
        return self.made_ordinary([PARAMETER], names)

    def taken(self, cuts: Mapping[str, Sequence[Cut]]) -> CoefficientLayer:
        """This layer after channels were cut.

        Axes that are not transformed lose coefficients. Transformed ones keep all: a buffer lists the places
        that remain, or the rows of a KLT basis are cut.
        """
        layer = remade(self, type(self))
        layer.cache = WeightCache()
        for cut in cuts.get("weight", ()):
            layer._take(cut)
        for cut in cuts.get("bias", ()):
            layer.keep_rows("bias", cut.keep)
        layer.fit_attributes(cuts.get("weight", ()))
        return layer

    def _take(self, cut: Cut) -> None:
        axis = next((axis for axis in self.arguments.axes if axis.dim == cut.dim), None)
        keep = cut.keep.to(self.coefficients.device)
        if axis is None:
            self.keep_rows(PARAMETER, keep, cut.dim)
            return
        basis, rows = self._beside(axis)
        if basis is not None and axis.block is None:
            self._buffers[basis_name(axis)] = basis.index_select(0, keep)
            changed = axis.model_copy(update={"size": len(keep)})
        else:
            places = torch.arange(axis.size, device=keep.device) if rows is None else rows
            self._buffers[rows_name(axis)] = places[keep].to(torch.int32)
            changed = axis.model_copy(update={"rows": True})
        axes = tuple(changed if item is axis else item for item in self.arguments.axes)
        self.arguments = Coefficients.model_construct(axes=axes)

    def extra_repr(self) -> str:
        """The ordinary layer's, with kernels and numbers of coefficients."""
        parts = (f"{axis.dim}: {axis.kernel} {count(axis)} of {axis.size}" for axis in self.arguments.axes)
        return f"{super().extra_repr()}, coefficients=({', '.join(parts)})"


class CoefficientLinear(CoefficientLayer, nn.Linear):  # type: ignore[misc,override]
    """A linear layer, W = B_out S B_in^T."""

    ordinary = nn.Linear

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (..., in_features) to (..., out_features)."""
        shape, axes = (self.out_features, self.in_features), self.arguments.axes
        batch = input.numel() // self.in_features
        # The factored form saves time only in training, where the weight would be computed in every step.
        recorded = torch.is_grad_enabled() and self.coefficients.requires_grad
        if not recorded or torch.compiler.is_compiling() or not projection_pays(axes, shape, batch):
            return F.linear(input, self.weight, self.bias)
        return projected(input, self.coefficients, axes, self._all_beside(), self.bias)

    def factored(self) -> nn.Sequential | None:
        """Consecutive linear layers that compute the same with fewer numbers; None if there are none."""
        stored, shape = self.coefficients.detach(), (self.out_features, self.in_features)
        return factored(stored, self.arguments.axes, self._all_beside(), self.bias, shape)

    def _all_beside(self) -> dict[int, Beside]:
        return {axis.dim: self._beside(axis) for axis in self.arguments.axes}


class CoefficientConv2d(CoefficientLayer, nn.Conv2d):  # type: ignore[misc,override]
    """A convolution; its weight's axes are (out, in / groups, height, width)."""

    ordinary = nn.Conv2d


def basis_name(axis: TransformedAxis) -> str:
    """Name of the buffer that holds the basis of a KLT."""
    return f"basis_{axis.dim}"


def rows_name(axis: TransformedAxis) -> str:
    """Name of the buffer that lists the remaining places of an axis."""
    return f"rows_{axis.dim}"
