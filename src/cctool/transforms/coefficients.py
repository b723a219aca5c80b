"""Linear and convolution layers whose parameters are transform coefficients of their weight.

    W = S x_1 B_1 x_2 B_2 ...

S are the coefficients, ``x_d`` multiplies along axis d, and the columns of B_d are basis functions
(`axes.py`); for a linear layer W = B_out S B_in^T. The layers stay `nn.Linear` and `nn.Conv2d` to whoever
asks; their ``weight`` is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from cctool.checkpoint.masks import drop_masks, mask_name, masks_of
from cctool.checkpoint.spec import Record
from cctool.errors import CorruptCheckpointError, SpecError, TransformError, UsageError
from cctool.transforms import kernels
from cctool.transforms.axes import KLT, TransformedAxis, analysed, count, klt_basis, synthesised
from cctool.transforms.swapped import Cut, Swap, SwappedLayer
from cctool.transforms.weight_cache import WeightCache

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "COEFFICIENT",
    "CoefficientConv2d",
    "CoefficientLayer",
    "CoefficientLinear",
    "Coefficients",
    "build_coefficients",
    "check_coefficients",
    "coefficient_layer",
]

COEFFICIENT = "coefficient"
"""Name of these layers in the table of swaps."""

_NAME = "coefficients"


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
            if axis.kept > axis.length:
                raise ValueError(f"dim {axis.dim} keeps {axis.kept} coefficients of {axis.length}")
        return self


class CoefficientLayer(SwappedLayer):
    """What both kinds of layer share.

    Attributes:
        coefficients: the parameter; along a transformed axis as many as it has coefficients, along the others
            the size of the weight.
        arguments: how the axes are transformed.

    Buffers ``basis_D`` hold the basis of a KLT, of shape (size, kept), and ``rows_D`` the places of axis D
    that are left after channels were cut, int32.
    """

    ordinary: type[nn.Module]
    coefficients: nn.Parameter
    bias: nn.Parameter | None
    arguments: Coefficients
    cache: WeightCache

    @property
    def weight(self) -> Tensor:
        """The weight, of the ordinary layer's shape; computed anew wherever gradients are recorded."""
        beside = (tensor for axis in self.arguments.axes for tensor in self._beside(axis))
        sources = [self.coefficients, *(tensor for tensor in beside if tensor is not None)]
        return self.cache.get(self._synthesised, sources)

    def _beside(self, axis: TransformedAxis) -> tuple[Tensor | None, Tensor | None]:
        """Basis and rows of an axis."""
        return self._buffers.get(_basis(axis)), self._buffers.get(_rows(axis))

    def _synthesised(self) -> Tensor:
        stored = self.coefficients
        half = stored.dtype not in (torch.float32, torch.float64)
        weight = stored.float() if half else stored
        # Under autocast the product would lose what the coefficients hold.
        with torch.autocast(stored.device.type, enabled=False):
            for axis in self.arguments.axes:
                weight = synthesised(weight, axis, *self._beside(axis))
        return weight.to(stored.dtype) if half else weight

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Make coefficients of a weight; what masks took away stays zero, and a KLT keeps its basis.

        Args:
            weight: of this layer's shape before channels were cut, or of its present shape where none were.
        """
        found = weight
        for axis in self.arguments.axes:
            found = analysed(found, axis, self._buffers.get(_basis(axis)))
        self.coefficients.copy_(found)
        mask = self._buffers.get(mask_name(_NAME))
        if mask is not None:
            self.coefficients.masked_fill_(mask.logical_not(), 0)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget the weight that was computed last."""
        self.cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.cache.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def reset_parameters(self) -> None:
        """Initialise as the ordinary layer does."""
        fresh = self.plain()
        cast(Any, fresh).reset_parameters()
        if any(axis.rows for axis in self.arguments.axes):
            raise TransformError(
                "a layer whose channels were cut cannot be initialised in its transform domain"
            )
        self.set_weight(cast(Tensor, fresh.weight))

    def swap(self, module: str) -> Swap:
        """The edit that makes this layer out of the architecture's."""
        return Swap(module=module, layer=COEFFICIENT, arguments=self.arguments.model_dump(mode="json"))

    def plain(self) -> nn.Module:
        """The ordinary layer with the present weight as its parameter; the bias is shared."""
        layer = _remade(self, self.ordinary)
        held = vars(layer)
        del held["arguments"], held["cache"]
        if _NAME in masks_of(layer):
            drop_masks(layer, [_NAME])
        del layer._parameters[_NAME]
        for axis in self.arguments.axes:
            for name in (_basis(axis), _rows(axis)):
                layer._buffers.pop(name, None)
        weight = nn.Parameter(self.weight.detach().clone(), requires_grad=self.coefficients.requires_grad)
        # In the order of the ordinary layer, whose state dict begins with the weight.
        layer._parameters = {"weight": weight, **layer._parameters}
        return layer

    def taken(self, cuts: Mapping[str, Sequence[Cut]]) -> CoefficientLayer:
        """What is left once channels are cut.

        Axes that are not transformed lose coefficients; of the transformed ones all stay, and a buffer says
        which places are left, or the basis of a KLT loses them.
        """
        layer = _remade(self, type(self))
        layer.cache = WeightCache()
        for cut in cuts.get("weight", ()):
            layer._take(cut)
        for cut in cuts.get("bias", ()):
            assert layer.bias is not None
            kept = layer.bias.detach().index_select(cut.dim, cut.keep.to(layer.bias.device))
            layer.bias = nn.Parameter(kept, requires_grad=layer.bias.requires_grad)
            mask = layer._buffers.get(mask_name("bias"))
            if mask is not None:
                layer._buffers[mask_name("bias")] = mask.index_select(cut.dim, cut.keep.to(mask.device))
        layer._fit_attributes(cuts.get("weight", ()))
        return layer

    def _take(self, cut: Cut) -> None:
        axis = next((axis for axis in self.arguments.axes if axis.dim == cut.dim), None)
        keep = cut.keep.to(self.coefficients.device)
        if axis is None:
            kept = self.coefficients.detach().index_select(cut.dim, keep)
            self.coefficients = nn.Parameter(kept, requires_grad=self.coefficients.requires_grad)
            mask = self._buffers.get(mask_name(_NAME))
            if mask is not None:
                self._buffers[mask_name(_NAME)] = mask.index_select(cut.dim, keep.to(mask.device))
            return
        basis, rows = self._beside(axis)
        if basis is not None and axis.block is None:
            self._buffers[_basis(axis)] = basis.index_select(0, keep)
            changed = axis.model_copy(update={"size": len(keep)})
        else:
            places = torch.arange(axis.size, device=keep.device) if rows is None else rows
            self._buffers[_rows(axis)] = places[keep].to(torch.int32)
            changed = axis.model_copy(update={"rows": True})
        axes = tuple(changed if item is axis else item for item in self.arguments.axes)
        self.arguments = Coefficients.model_construct(axes=axes)

    def _fit_attributes(self, cuts: Sequence[Cut]) -> None:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The ordinary layer's, and how many coefficients of which kernels there are."""
        parts = (f"{axis.dim}: {axis.kernel} {count(axis)} of {axis.size}" for axis in self.arguments.axes)
        return f"{super().extra_repr()}, coefficients=({', '.join(parts)})"


class CoefficientLinear(CoefficientLayer, nn.Linear):  # type: ignore[misc,override]
    """A linear layer, W = B_out S B_in^T."""

    ordinary = nn.Linear

    def _fit_attributes(self, cuts: Sequence[Cut]) -> None:
        for cut in cuts:
            setattr(self, ("out_features", "in_features")[cut.dim], len(cut.keep))


class CoefficientConv2d(CoefficientLayer, nn.Conv2d):  # type: ignore[misc,override]
    """A convolution; its weight's axes are (out, in / groups, height, width)."""

    ordinary = nn.Conv2d

    def _fit_attributes(self, cuts: Sequence[Cut]) -> None:
        width = self.in_channels // self.groups
        for cut in cuts:
            if cut.dim == 0:
                # A group whose outputs are all gone is gone with its inputs.
                per_group = self.out_channels // self.groups
                self.groups = len(torch.unique(cut.keep // per_group))
                self.out_channels = len(cut.keep)
            elif cut.dim == 1:
                width = len(cut.keep)
        self.in_channels = width * self.groups


_CLASSES: dict[type[nn.Module], type[CoefficientLayer]] = {
    nn.Linear: CoefficientLinear,
    nn.Conv2d: CoefficientConv2d,
}

_Kind = TypeVar("_Kind", bound=nn.Module)


def _basis(axis: TransformedAxis) -> str:
    return f"basis_{axis.dim}"


def _rows(axis: TransformedAxis) -> str:
    return f"rows_{axis.dim}"


def _remade(layer: nn.Module, kind: type[_Kind]) -> _Kind:
    """A module of another class with all that a layer holds: hooks, buffers, marks of masks."""
    made = kind.__new__(kind)
    held = dict(vars(layer))
    containers = {
        key: value.copy()
        for key, value in held.items()
        if key.startswith("_") and isinstance(value, (dict, set))
    }
    vars(made).update(held | containers)
    return made


def coefficient_layer(layer: nn.Module, arguments: Coefficients) -> CoefficientLayer:
    """A layer that computes what ``layer`` does, as far as the kept coefficients allow.

    Args:
        layer: exactly an `nn.Linear` or `nn.Conv2d`; it stays as it is. Where its weight is on the meta
            device, so are the coefficients.
        arguments: how its axes are transformed.

    Returns:
        A layer with coefficients of its own; the bias is shared.

    Raises:
        SpecError: if the arguments do not fit the layer.
    """
    kind = _CLASSES.get(type(layer))
    if kind is None:
        raise SpecError(
            f"swap: coefficients take the place of Linear and Conv2d, not of {type(layer).__name__}"
        )
    weight = cast(Tensor, layer.weight)
    shape = _coefficient_shape(weight, arguments)
    made = _remade(layer, kind)
    del made._parameters["weight"]
    made.arguments, made.cache = arguments, WeightCache()
    made.coefficients = nn.Parameter(
        torch.empty(shape, dtype=weight.dtype, device=weight.device), requires_grad=weight.requires_grad
    )
    made._parameters = {_NAME: made._parameters.pop(_NAME), **made._parameters}
    for axis in arguments.axes:
        _register_beside(made, axis, weight)
    if not weight.is_meta and not any(axis.rows for axis in arguments.axes):
        made.set_weight(weight.detach())
    return made


def _coefficient_shape(weight: Tensor, arguments: Coefficients) -> list[int]:
    """Shape of the coefficients, once the arguments are seen to fit and nothing of them is too large."""
    shape = list(weight.shape)
    for axis in arguments.axes:
        if axis.dim >= weight.dim():
            raise SpecError(f"swap: a weight of shape {list(weight.shape)} has no dim {axis.dim}")
        there = weight.shape[axis.dim]
        if axis.size < there or (axis.size > there and not axis.rows):
            raise SpecError(f"swap: dim {axis.dim} of the weight is {there}, the edit says {axis.size}")
        shape[axis.dim] = count(axis)
    reached = list(shape)
    for axis in arguments.axes:
        # Nothing is allocated on the meta device; while a file is loaded, this asks its budget.
        reached[axis.dim] = axis.size
        torch.empty(reached, device="meta")
        reached[axis.dim] = weight.shape[axis.dim]
    return shape


def _register_beside(layer: CoefficientLayer, axis: TransformedAxis, weight: Tensor) -> None:
    device = torch.device("cpu") if weight.is_meta else weight.device
    if axis.kernel == KLT:
        # Where there are no values yet, a file brings the basis.
        basis = torch.zeros(axis.size, axis.kept, dtype=weight.dtype, device=device)
        if not weight.is_meta and not axis.rows:
            basis = klt_basis(weight, axis)
        layer.register_buffer(_basis(axis), basis)
    if axis.rows:
        left = weight.shape[axis.dim]
        layer.register_buffer(_rows(axis), torch.arange(left, dtype=torch.int32, device=device))


def build_coefficients(layer: nn.Module, arguments: Mapping[str, Any]) -> CoefficientLayer:
    """What the swap edit builds; see `SwapKind`."""
    try:
        parsed = Coefficients.model_validate(arguments)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise SpecError(f"swap: malformed coefficients: {place}: {problem['msg']}") from None
    return coefficient_layer(layer, parsed)


def check_coefficients(layer: nn.Module) -> None:
    """Refuse stored rows that lie outside their axis.

    Raises:
        CorruptCheckpointError: naming the buffer.
    """
    assert isinstance(layer, CoefficientLayer)
    for axis in layer.arguments.axes:
        rows = layer._buffers.get(_rows(axis))
        if rows is not None and (int(rows.min()) < 0 or int(rows.max()) >= axis.size):
            raise CorruptCheckpointError(
                f"{_rows(axis)} names places that the axis of {axis.size} does not have"
            )
