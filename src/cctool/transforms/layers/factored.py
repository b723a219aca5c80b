"""Linear layers computed with coefficients, without making the weight.

    y = B_out S B_in^T x + b

transforms x, multiplies by the coefficients, and transforms back. In training the weight would have to be
computed for every batch, which for large layers costs more than the batch itself.
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

Beside = tuple[Tensor | None, Tensor | None]
"""Basis of a KLT, and the remaining places of an axis."""

_FAST_FACTOR = 16
"""Multiplications of a fast transform of N places, divided by N log2 N; found by timing."""


def projection_pays(axes: tuple[TransformedAxis, ...], shape: tuple[int, int], batch: int) -> bool:
    """Whether transforming ``batch`` input vectors takes fewer multiplications than making the weight.

    ``shape`` is that of the weight, (out, in), ``axes`` are its transformed axes.
    """
    by_dim = {axis.dim: axis for axis in axes}
    kept = [count(by_dim[dim]) if dim in by_dim else shape[dim] for dim in (0, 1)]
    costs = [_cost(by_dim[dim]) if dim in by_dim else 0 for dim in (0, 1)]
    through = batch * (sum(costs) + kept[0] * kept[1])
    # The weight is made axis by axis: dim 0 of all kept columns first, then dim 1 of all rows.
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
    """The output (..., out) of the linear layer with these coefficients for ``x`` (..., in).

    Args:
        x: the input.
        coefficients: shape (coefficients out, coefficients in).
        axes: of the weight.
        beside: basis and remaining places, by dim of an axis.
        bias: shape (out,).
    """
    by_dim = {axis.dim: axis for axis in axes}
    last = x.dim() - 1
    if 1 in by_dim:
        axis = by_dim[1].model_copy(update={"dim": last})
        basis, rows = beside[1]
        if rows is not None:
            # Inputs that were cut count as zero.
            x = x.new_zeros(*x.shape[:-1], axis.size).index_copy(last, rows.long(), x)
        x = analysed(x, axis, basis) if is_orthonormal(axis) else cast(Tensor, _Adjoint.apply(x, axis))
    x = F.linear(x, coefficients)
    if 0 in by_dim:
        axis = by_dim[0].model_copy(update={"dim": last})
        x = synthesised(x, axis, *beside[0])
    return x if bias is None else x + bias.to(x.dtype)


class _Adjoint(torch.autograd.Function):
    """Multiply by the transpose of a synthesis; for biorthogonal bases that is not the analysis."""

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
    """Consecutive linear layers that compute the same with fewer numbers and multiplications.

    Arguments as in `projected`, with the ``shape`` (out, in) of the weight. None if the weight itself has the
    fewest numbers.
    """
    bases = {axis.dim: basis_matrix(axis, coefficients, *beside[axis.dim]) for axis in axes}
    chain = [*([bases[1].T] if 1 in bases else []), coefficients, *([bases[0]] if 0 in bases else [])]
    # Candidates: all factors apart, or the coefficients multiplied with either basis.
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
        # On the meta device, so that no weight is initialised only to be replaced.
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=last, device="meta")
        layer.weight = nn.Parameter(weight.detach().clone())
        if last and bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        layers.append(layer)
    return nn.Sequential(*layers)


def _numbers(chain: list[Tensor]) -> int:
    return sum(weight.numel() for weight in chain)
