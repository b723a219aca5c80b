"""Weights of calls that are no parameters of the network: computed on the way to the call, or buffers.

Weight normalisation, weight standardisation, slices, sums and masks of parameters give the same weight in
every pass; mixtures that the network's input chooses do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cctool.graph.execution import Event, tensors_in

_TAKE_A_FORM = frozenset({"to", "type_as", "view_as", "reshape_as", "expand_as", "resize_as"})
"""Functions that take type or shape, but no values, from their second argument."""
_FRESH = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like"}
    | {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
)
"""Functions that take type and shape, but no values, from their first argument."""
_CLOSE = 1e-5


@dataclass(frozen=True, eq=False)
class Kernel:
    """A weight, or a bias, that a call takes and that is no parameter.

    Attributes:
        name: of a buffer its qualified name, else made of the first call that takes it, as in
            ``layer1.conv2d#0:weight``.
        value: a copy, as the call took it.
        made_of: qualified names of the parameters and buffers that it is computed from.
        own: name of the parameter that bears its name in the module of the call, if it is computed from this
            and has its shape; None without.
        fed: whether it is computed from the network's input.
    """

    name: str
    value: Tensor
    made_of: tuple[str, ...]
    own: str | None = None
    fed: bool = False


def whole_parameter(tensor: Tensor, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Name of the parameter of which a tensor is a view of all elements in order, rows staying rows."""
    for name, parameter in parameters.items():
        if (
            tensor.data_ptr() == parameter.data_ptr()
            and tensor.dim() > 0
            and parameter.dim() > 0
            and tensor.numel() == parameter.numel() > 0
            and tensor.shape[0] == parameter.shape[0]
            and tensor.dtype == parameter.dtype
            and tensor.is_contiguous()
            and parameter.is_contiguous()
        ):
            return name
    return None


def fed_by(event: Event) -> Sequence[Tensor]:
    """The tensors whose values, not only type and shape, the result of a call may depend on."""
    if event.name in _FRESH:
        return ()
    if event.name in _TAKE_A_FORM:
        return list(tensors_in(event.args))[:1]
    return [*tensors_in(event.args), *tensors_in(event.kwargs)]


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two passes gave one weight, but for the order in which a device adds."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if torch.equal(first, second) or not first.numel():
        return True
    error = (first - second).abs().amax()
    return bool(error <= _CLOSE * first.abs().amax())
