"""The data-driven kernel: bases computed from the weight, and which of their coefficients are worth storing.

The basis of an axis are the eigenvectors of the Gram matrix of the weight's unfolding along it (the
higher-order
SVD: De Lathauwer et al. 2000, section 3). The file stores the bases too, so they count in what is kept: the
coefficients of a linear layer are its singular values, few but useless without their vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cctool.transforms.layers.axes import KLT, TransformedAxis, pieces


def klt_bases(weight: Tensor, axes: tuple[TransformedAxis, ...]) -> dict[int, Tensor]:
    """Orthonormal columns for each block of each axis, in order of decreasing energy.

    Args:
        weight: of the axes' sizes.
        axes: how it is transformed; each basis has ``kept`` columns. Axes with other kernels are skipped.

    Returns:
        By dim, shape (size, kept), of the weight's type; columns that a smaller last block lacks are zero.
        A weight that is not finite has no eigenvectors and gets unit vectors.
    """
    weight = weight.detach()
    values = weight.double() if bool(weight.isfinite().all()) else torch.eye(
        weight.shape[0], weight[0].numel(), dtype=torch.float64, device=weight.device
    ).view(weight.shape)  # fmt: skip
    bases: dict[int, Tensor] = {}
    # The singular vectors of a matrix's short side give those of the long one: so the short side comes first.
    for axis in sorted((axis for axis in axes if axis.kernel == KLT), key=lambda axis: axis.length):
        flat = values.movedim(axis.dim, 0).flatten(1)
        other = bases.get(1 - axis.dim) if values.dim() == 2 else None
        if other is not None and axis.block is None and other.shape[0] == other.shape[1] == flat.shape[1]:
            # The images of the right singular vectors are orthogonal; QR adds the missing left ones.
            vectors, _ = torch.linalg.qr(flat @ other, mode="complete")
            bases[axis.dim] = _signed(vectors)[:, : axis.kept]
        else:
            bases[axis.dim] = _eigenvectors(flat, axis)
    return {dim: basis.to(weight.dtype) for dim, basis in bases.items()}


def _eigenvectors(x: Tensor, axis: TransformedAxis) -> Tensor:
    """Eigenvectors of each block's Gram matrix; x is the unfolding, of shape (size, rest)."""
    basis = x.new_zeros(axis.size, axis.kept)
    for segment, place, _ in pieces(axis):
        stop = place + segment.blocks * segment.length
        blocks = torch.unflatten(x[place:stop], 0, (segment.blocks, segment.length))
        vectors = torch.linalg.eigh(blocks @ blocks.transpose(1, 2)).eigenvectors.flip(2)[..., : segment.kept]
        basis[place:stop, : vectors.shape[2]] = _signed(vectors).flatten(0, 1)
    return basis


def _signed(vectors: Tensor) -> Tensor:
    """Fix the sign of each eigenvector, which is arbitrary: its largest entry becomes positive."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


@dataclass(frozen=True)
class KltChoice:
    """What one layer keeps.

    Attributes:
        kept: for each axis, coefficients per block, that is, columns of the basis.
        mask: of the coefficients before they are narrowed, True is kept; None if the whole box is.
    """

    kept: tuple[int, ...]
    mask: Tensor | None


def _indices(shape: torch.Size, axes: tuple[TransformedAxis, ...]) -> list[Tensor]:
    """For each axis, the index within its block of each coefficient; flat."""
    found = []
    for axis in axes:
        parts = [torch.arange(s.kept).repeat(s.blocks) for s, _, _ in pieces(axis)]
        sizes = [-1 if dim == axis.dim else 1 for dim in range(len(shape))]
        found.append(torch.cat(parts).view(sizes).expand(shape).flatten())
    return found


def klt_choice(
    layers: Mapping[str, tuple[Tensor, tuple[TransformedAxis, ...]]], keep: float, *, box: bool
) -> dict[str, KltChoice]:
    """The largest coefficients that, together with their bases, fit into a share of the weights' numbers.

    Args:
        layers: magnitudes of all coefficients, on the CPU, and their axes, by layer; layers compete.
        keep: share of the numbers of all weights, in (0, 1).
        box: keep, and count, the whole box of coefficients that the largest ones span.

    Returns:
        By layer. Each keeps at least one coefficient, whatever it costs.
    """
    flat = torch.cat([sizes.flatten() for sizes, _ in layers.values()])
    places, start = {}, 0
    for name, (sizes, _) in layers.items():
        places[name] = slice(start, start + sizes.numel())
        flat[start + int(sizes.argmax())] = math.inf
        start += sizes.numel()
    order = flat.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    cost = torch.zeros(len(order), dtype=torch.float64)
    for name, (sizes, axes) in layers.items():
        ranks = rank[places[name]]
        cost[ranks.sort().values] = _increments(sizes.shape, axes, ranks.argsort(), box)
    # The first in the order are the layers' largest coefficients, so that each layer keeps one.
    limit = max(int((cost.cumsum(0) <= keep * len(flat)).sum()), len(layers))
    choices = {}
    for name, (sizes, axes) in layers.items():
        mask = (rank[places[name]] < limit).view(sizes.shape)
        choices[name] = KltChoice(used(mask, axes), None if box else mask)
    return choices


def _increments(shape: torch.Size, axes: tuple[TransformedAxis, ...], order: Tensor, box: bool) -> Tensor:
    """How many stored numbers each coefficient adds when they are taken in this order."""
    columns = [index[order].cummax(0).values.double() + 1 for index in _indices(shape, axes)]
    total = sum((c * axis.size for c, axis in zip(columns, axes, strict=True)), torch.zeros(()))
    if box:
        other = shape.numel() / math.prod(shape[axis.dim] for axis in axes)
        blocks = math.prod(shape[axis.dim] / axis.kept for axis in axes)
        total = total + torch.stack(columns).prod(0) * blocks * other
    else:
        total = total + torch.arange(1, len(order) + 1)
    return torch.diff(total, prepend=total.new_zeros(1))


def used(mask: Tensor, axes: tuple[TransformedAxis, ...]) -> tuple[int, ...]:
    """For each axis, how many columns of the basis the coefficients of a mask use."""
    return tuple(int(index[mask.flatten()].max()) + 1 for index in _indices(mask.shape, axes))
