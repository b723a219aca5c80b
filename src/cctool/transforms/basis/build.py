"""Building basis layers, and complex modules around them: for a new network, or from a file's edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, TypeVar, cast

from pydantic import StrictBool, ValidationError
from torch import Tensor, nn

from cctool.base.errors import SpecError
from cctool.checkpoint.spec import Record
from cctool.transforms.basis.complex import (
    Cardioid,
    ComplexAverage,
    ComplexBasisConv2d,
    ComplexBasisLinear,
    ComplexBatchNorm,
    ComplexDropout,
    ComplexMaxPool2d,
    MagnitudeConv2d,
    MagnitudeLinear,
)
from cctool.transforms.basis.conv import BasisConv2d
from cctool.transforms.basis.linear import BASIS, BasisArguments, BasisLayer, BasisLinear
from cctool.transforms.layers.base import SwapKind, remade

COMPLEX = "complex"
"""Name, in the table of swaps, of the modules between complex layers."""

_LAYERS: dict[tuple[type[nn.Module], bool], type[BasisLayer]] = {
    (nn.Linear, False): BasisLinear,
    (nn.Conv2d, False): BasisConv2d,
    (nn.Linear, True): ComplexBasisLinear,
    (nn.Conv2d, True): ComplexBasisConv2d,
}


class ComplexArguments(Record):
    """Arguments of a module between complex layers.

    Attributes:
        ends: whether it is the network's last complex module, which outputs |z|.
    """

    ends: StrictBool = False


def basis_layer(layer: nn.Module, arguments: BasisArguments) -> BasisLayer:
    """A new layer of basis functions in place of ``layer``, whose weight and bias are ignored.

    Args:
        layer: exactly an `nn.Linear` or `nn.Conv2d`; not changed. If its weight is on the meta device, so are
            the new parameters.
        arguments: of the new layer.

    Raises:
        SpecError: if the arguments do not fit the layer.
    """
    kind = _LAYERS.get((type(layer), arguments.kernel == "dft"))
    if kind is None:
        raise SpecError(
            f"swap: basis functions take the place of Linear and Conv2d, not of {type(layer).__name__}"
        )
    shape = cast(Tensor, layer.weight).shape
    rows = shape[0] // cast(int, getattr(layer, "groups", 1))
    for dim, present, whole in ((0, rows, arguments.outputs), (1, shape[1], arguments.inputs)):
        if present > whole or (present < whole and dim not in arguments.cut):
            raise SpecError(f"swap: dim {dim} of the weight has {present} places, the edit says {whole}")
    made = remade(layer, kind)
    made.begin(arguments)
    return made


def counterpart(layer: nn.Module, *, ends: bool = False) -> nn.Module | None:
    """The module that replaces one whose inputs are complex.

    Args:
        layer: of the architecture; it is used inside, or its parameters are shared, where they are needed.
        ends: whether the output is |z|.

    Returns:
        None for kinds without a counterpart.
    """
    make = _COUNTERPARTS.get(type(layer))
    if make is None or getattr(layer, "return_indices", False):
        return None
    return make(layer, ends)


_SMOOTH = (nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus)
_COUNTERPARTS: dict[type[nn.Module], Callable[[nn.Module, bool], nn.Module]] = {
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, *_SMOOTH),
        lambda layer, ends: Cardioid(ends),
    ),
    **dict.fromkeys((nn.MaxPool2d, nn.AdaptiveMaxPool2d), ComplexMaxPool2d),
    **dict.fromkeys((nn.AvgPool2d, nn.AdaptiveAvgPool2d), ComplexAverage),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d), ComplexDropout),
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d), lambda layer, ends: ComplexBatchNorm(layer, deepcopy(layer), ends)
    ),
    # Their output is real, whether or not the complex part ends here.
    nn.Linear: lambda layer, ends: remade(layer, MagnitudeLinear),
    nn.Conv2d: lambda layer, ends: remade(layer, MagnitudeConv2d),
}


def _build_basis(layer: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    return basis_layer(layer, _parsed(BasisArguments, arguments))


def _build_complex(layer: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    made = counterpart(layer, ends=_parsed(ComplexArguments, arguments).ends)
    if made is None:
        raise SpecError(f"swap: {type(layer).__name__} has no counterpart for complex numbers")
    return made


_Arguments = TypeVar("_Arguments", bound=Record)


def _parsed(kind: type[_Arguments], arguments: Mapping[str, Any]) -> _Arguments:
    try:
        return kind.model_validate(arguments)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise SpecError(f"swap: malformed arguments: {place}: {problem['msg']}") from None


BASIS_SWAPS: Mapping[str, SwapKind] = {BASIS: SwapKind(_build_basis), COMPLEX: SwapKind(_build_complex)}
"""Kinds of swap by name; see `swap.SWAPS`."""
