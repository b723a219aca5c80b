"""Linear layers computed with coefficients instead of with the weight that these make.

    y = B_out S B_in^T x + b

is x transformed, a product with the coefficients, and a transform back. In training the weight would have to
be made anew for each batch, which costs more than the batch itself where layers are large.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cctool.transforms.layers.axes import (
    TransformedAxis,
    analysed,
    basis_matrix,
    count,
    is_orthonormal,
    synthesised,
)

__all__ = ["Beside", "factored", "projected", "projection_pays"]

Beside = tuple[Tensor | None, Tensor | None]
"""Basis of a KLT, and the places of an axis that are left."""

_FAST_FACTOR = 16
"""Multiplications of a fast transform of N places, over N log2 N; found by timing."""


def projection_pays(axes: tuple[TransformedAxis, ...], shape: tuple[int, int], batch: int) -> bool:
    """Whether a batch is transformed with fewer multiplications than the weight is made.

    Args:
        axes: of the weight.
        shape: of the weight, (out, in).
        batch: vectors to be multiplied.
    """
    by_dim = {axis.dim: axis for axis in axes}
    kept = [count(by_dim[dim]) if dim in by_dim else shape[dim] for dim in (0, 1)]
    costs = [_cost(by_dim[dim]) if dim in by_dim else 0 for dim in (0, 1)]
    through = batch * (sum(costs) + kept[0] * kept[1])
    # In the order in which the weight is made: first its rows' axis, then its columns'.
    making = kept[1] * costs[0] + shape[0] * costs[1] + batch * shape[0] * shape[1]
    return through < making


def _cost(axis: TransformedAxis) -> float:
    """Multiplications of one transform."""
    return axis.size * min(axis.kept, _FAST_FACTOR * math.log2(axis.length))


def projected(
    x: Tensor,
    coefficients: Tensor,
    axes: tuple[TransformedAxis, ...],
    beside: dict[int, Beside],
    bias: Tensor | None,
) -> Tensor:
    """What the linear layer of these coefficients makes of ``x``.

    Args:
        x: of shape (..., in).
        coefficients: of shape (coefficients out, coefficients in).
        axes: of the weight.
        beside: by dim of an axis.
        bias: of shape (out,).

    Returns:
        Of shape (..., out).
    """
    by_dim = {axis.dim: axis for axis in axes}
    last = x.dim() - 1
    if 1 in by_dim:
        axis = by_dim[1].model_copy(update={"dim": last})
        basis, rows = beside[1]
        if rows is not None:
            # Places that were cut are zero to what is left.
            x = x.new_zeros(*x.shape[:-1], axis.size).index_copy(last, rows.long(), x)
        x = analysed(x, axis, basis) if is_orthonormal(axis) else cast(Tensor, _Adjoint.apply(x, axis))
    x = F.linear(x, coefficients)
    if 0 in by_dim:
        axis = by_dim[0].model_copy(update={"dim": last})
        x = synthesised(x, axis, *beside[0])
    return x if bias is None else x + bias.to(x.dtype)


class _Adjoint(torch.autograd.Function):
    """Multiply by the transpose of a synthesis, which for biorthogonal bases is not their analysis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: TransformedAxis) -> Tensor:
        ctx.axis = axis
        with torch.enable_grad():
            shape = (*x.shape[: axis.dim], count(axis), *x.shape[axis.dim + 1 :])
            c = x.new_zeros(shape, requires_grad=True)
            return torch.autograd.grad(synthesised(c, axis), c, x)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return synthesised(gradients[0], ctx.axis), None


@torch.no_grad()
def factored(
    coefficients: Tensor,
    axes: tuple[TransformedAxis, ...],
    beside: dict[int, Beside],
    bias: Tensor | None,
    shape: tuple[int, int],
) -> nn.Sequential | None:
    """Linear layers one after the other that compute the same with fewer numbers and multiplications.

    Args:
        coefficients: of shape (coefficients out, coefficients in).
        axes: of the weight.
        beside: by dim of an axis.
        bias: of shape (out,).
        shape: of the weight, (out, in).

    Returns:
        None where the weight itself has the fewest.
    """
    bases = {axis.dim: basis_matrix(axis, coefficients, *beside[axis.dim]) for axis in axes}
    chain = [*([bases[1].T] if 1 in bases else []), coefficients, *([bases[0]] if 0 in bases else [])]
    chains = [chain]
    if 0 in bases:
        chains.append([*chain[:-2], bases[0] @ coefficients])
    if 1 in bases:
        chains.append([coefficients @ bases[1].T, *chain[2:]])
    best = min(chains, key=_numbers)
    if _numbers(best) >= shape[0] * shape[1]:
        return None
    layers = []
    for weight in best:
        last = weight is best[-1] and bias is not None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=last, device="meta")
        layer.weight = nn.Parameter(weight.detach().clone())
        if last and bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        layers.append(layer)
    return nn.Sequential(*layers)


def _numbers(chain: list[Tensor]) -> int:
    return sum(weight.numel() for weight in chain)
