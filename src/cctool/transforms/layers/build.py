"""Building layers of coefficients: from a layer with its weight, or from the edit in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cctool.base.errors import CorruptCheckpointError, SpecError
from cctool.transforms.layers.axes import KLT, count
from cctool.transforms.layers.base import WeightCache, remade
from cctool.transforms.layers.coefficients import (
    PARAMETER,
    CoefficientConv2d,
    CoefficientLayer,
    CoefficientLinear,
    Coefficients,
    basis_name,
    rows_name,
)
from cctool.transforms.layers.klt import klt_bases

_CLASSES: dict[type[nn.Module], type[CoefficientLayer]] = {
    nn.Linear: CoefficientLinear,
    nn.Conv2d: CoefficientConv2d,
}


def coefficient_layer(layer: nn.Module, arguments: Coefficients) -> CoefficientLayer:
    """A layer that computes what ``layer`` does, as closely as the kept coefficients allow.

    Args:
        layer: exactly an `nn.Linear` or `nn.Conv2d`; not changed. If its weight is on the meta device, so are
            the coefficients.
        arguments: how its axes are transformed.

    Returns:
        A layer with its own coefficients; the bias is shared.

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
    made = remade(layer, kind)
    del made._parameters["weight"]
    made.arguments, made.cache = arguments, WeightCache()
    made.coefficients = nn.Parameter(
        torch.empty(shape, dtype=weight.dtype, device=weight.device), requires_grad=weight.requires_grad
    )
    # First in the state dict, as the weight was.
    made._parameters = {PARAMETER: made._parameters.pop(PARAMETER), **made._parameters}
    # Without values, or with values for some places only, the coefficients come from a file.
    known = not weight.is_meta and not any(axis.rows for axis in arguments.axes)
    bases = klt_bases(weight, arguments.axes) if known else {}
    device = torch.device("cpu") if weight.is_meta else weight.device
    for axis in arguments.axes:
        if axis.kernel == KLT:
            basis = bases.get(axis.dim)
            if basis is None:
                basis = torch.zeros(axis.size, axis.kept, dtype=weight.dtype, device=device)
            made.register_buffer(basis_name(axis), basis)
        if axis.rows:
            left = torch.arange(weight.shape[axis.dim], dtype=torch.int32, device=device)
            made.register_buffer(rows_name(axis), left)
    if known:
        made.set_weight(weight.detach())
    return made


def _coefficient_shape(weight: Tensor, arguments: Coefficients) -> list[int]:
    """Shape of the coefficients, after checking that the arguments fit and nothing gets too large."""
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
        # The intermediate shapes may be larger than both ends. On the meta device nothing is allocated, but
        # while a file is loaded the size counts against its budget.
        reached[axis.dim] = axis.size
        torch.empty(reached, device="meta")
        reached[axis.dim] = weight.shape[axis.dim]
    return shape


def build_coefficients(layer: nn.Module, arguments: Mapping[str, Any]) -> CoefficientLayer:
    """The `SwapKind.build` of coefficient layers."""
    try:
        parsed = Coefficients.model_validate(arguments)
    except ValidationError as error:
        problem = error.errors()[0]
        place = "".join(f"{part}." for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise SpecError(f"swap: malformed coefficients: {place} {message}".replace("  ", " ")) from None
    return coefficient_layer(layer, parsed)


def check_coefficients(layer: nn.Module) -> None:
    """Raise CorruptCheckpointError, naming the buffer, if stored rows lie outside their axis."""
    assert isinstance(layer, CoefficientLayer)
    for axis in layer.arguments.axes:
        rows = layer._buffers.get(rows_name(axis))
        if rows is not None and (int(rows.min()) < 0 or int(rows.max()) >= axis.size):
            raise CorruptCheckpointError(
                f"{rows_name(axis)} names places that the axis of {axis.size} does not have"
            )
