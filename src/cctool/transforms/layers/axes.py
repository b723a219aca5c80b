"""One axis of a weight in a transform domain: its description, the transform and its inverse.

A weight is transformed axis by axis. Of an axis with ``size`` places (indices along the axis), the ``kept``
coefficients of the lowest frequencies are stored, or ``kept`` of each block with ``block``. For the fixed
kernels (DCT, DST, DFT, wavelets) the basis follows from name and size. That of the KLT is computed from the
weight: the eigenvectors of the Gram matrix of its unfolding, axis by axis, which is the higher-order SVD (De
Lathauwer et al. 2000, "A Multilinear Singular Value Decomposition", section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import pywt
import torch
from pydantic import Field
from torch import Tensor

from cctool.checkpoint.spec import Dimension, Record
from cctool.transforms.kernels import by_name as kernels

KLT = "klt"
"""The kernel without a fixed matrix: Karhunen-Loeve, computed from the weight."""

MAX_KLT_LENGTH = 8192
"""Longest axis, or block of one, of a KLT: the time for eigenvectors grows with the third power."""

_CHUNK = 256


class TransformedAxis(Record):
    """How one axis of a weight is transformed.

    Attributes:
        dim: of the weight.
        kernel: name of the transform.
        size: places of the axis before any channels were cut.
        kept: coefficients of each block, lowest frequencies first; a smaller last block keeps the same share.
        block: places that are transformed together; None is all.
        levels: of a wavelet.
        rows: whether a buffer lists the places that remain after channels were cut.
    """

    dim: Annotated[int, Field(ge=0, le=3, strict=True)]
    kernel: Annotated[str, Field(min_length=1, max_length=64)]
    size: Dimension
    kept: Dimension
    block: Annotated[int, Field(ge=2, le=2**31 - 1, strict=True)] | None = None
    levels: Annotated[int, Field(ge=1, le=31, strict=True)] | None = None
    rows: bool = False

    @property
    def length(self) -> int:
        """Number of places that are transformed together."""
        return self.size if self.block is None else min(self.block, self.size)


@dataclass(frozen=True)
class Segment:
    """``blocks`` adjacent blocks of ``length`` places, with ``kept`` coefficients each."""

    blocks: int
    length: int
    kept: int


def segments(axis: TransformedAxis) -> tuple[Segment, ...]:
    """The blocks of an axis: the whole ones, and the smaller remainder."""
    whole, rest = divmod(axis.size, axis.length)
    found = [Segment(whole, axis.length, axis.kept)]
    if rest:
        found.append(Segment(1, rest, -(-axis.kept * rest // axis.length)))
    return tuple(found)


def count(axis: TransformedAxis) -> int:
    """Number of coefficients along an axis."""
    return sum(segment.blocks * segment.kept for segment in segments(axis))


def pieces(axis: TransformedAxis) -> Iterator[tuple[Segment, int, int]]:
    """Segments, with the place and the coefficient at which each begins."""
    place = coefficient = 0
    for segment in segments(axis):
        yield segment, place, coefficient
        place += segment.blocks * segment.length
        coefficient += segment.blocks * segment.kept


def analysed(x: Tensor, axis: TransformedAxis, basis: Tensor | None = None) -> Tensor:
    """Transform along an axis: ``axis.size`` places of ``x`` along ``axis.dim`` become `count` coefficients.

    ``basis`` is that of the KLT, shape (size, kept), see `klt.klt_bases`.
    """
    dim, parts = axis.dim, []
    for segment, place, _ in pieces(axis):
        part = x.narrow(dim, place, segment.blocks * segment.length)
        part = torch.unflatten(part, dim, (segment.blocks, segment.length))
        if basis is not None:
            part = _multiplied(part, dim, _block_bases(basis, segment, place).transpose(1, 2))
        else:
            part = kernels.forward(part, axis.kernel, dim + 1, levels=_levels(axis, segment))
            part = part.narrow(dim + 1, 0, segment.kept)
        parts.append(part.flatten(dim, dim + 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def synthesised(
    c: Tensor, axis: TransformedAxis, basis: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """Inverse of `analysed`; differentiable.

    ``rows`` lists the places that remain, shape (remaining,), int32; None is all. Only these are returned.
    """
    dim, parts = axis.dim, []
    for segment, place, coefficient in pieces(axis):
        part = c.narrow(dim, coefficient, segment.blocks * segment.kept)
        part = torch.unflatten(part, dim, (segment.blocks, segment.kept))
        if basis is not None:
            part = _multiplied(part, dim, _block_bases(basis, segment, place))
        else:
            levels = _levels(axis, segment)
            part = kernels.inverse(part, axis.kernel, dim + 1, size=segment.length, levels=levels)
        parts.append(part.flatten(dim, dim + 1))
    x = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return x if rows is None else x.index_select(dim, rows)


def _levels(axis: TransformedAxis, segment: Segment) -> int:
    if axis.levels is None or not kernels.is_wavelet(axis.kernel):
        return 1
    return max(1, min(axis.levels, kernels.max_levels(axis.kernel, segment.length)))


def _block_bases(basis: Tensor, segment: Segment, place: int) -> Tensor:
    """Bases of a segment's blocks, shape (blocks, length, kept)."""
    rows = basis.narrow(0, place, segment.blocks * segment.length)
    return torch.unflatten(rows, 0, (segment.blocks, segment.length))[..., : segment.kept]


def _multiplied(part: Tensor, dim: int, matrices: Tensor) -> Tensor:
    """Multiply block b along ``dim`` + 1 by matrix b; (..., blocks, m, ...) and (blocks, n, m)."""
    moved = part.movedim((dim, dim + 1), (0, 1))
    product = matrices.to(part.dtype) @ moved.flatten(2)
    return product.reshape(*product.shape[:2], *moved.shape[2:]).movedim((0, 1), (dim, dim + 1))


def narrowed(c: Tensor, axis: TransformedAxis, kept: int) -> tuple[Tensor, TransformedAxis]:
    """Keep only the ``kept`` coefficients of lowest frequency in each block, at most ``axis.kept``.

    ``c`` has `count` coefficients along ``axis.dim``.
    """
    smaller = axis.model_copy(update={"kept": kept})
    parts = []
    for (segment, _, coefficient), (left, _, _) in zip(pieces(axis), pieces(smaller), strict=True):
        part = c.narrow(axis.dim, coefficient, segment.blocks * segment.kept)
        part = torch.unflatten(part, axis.dim, (segment.blocks, segment.kept)).narrow(
            axis.dim + 1, 0, left.kept
        )
        parts.append(part.flatten(axis.dim, axis.dim + 1))
    return torch.cat(parts, axis.dim), smaller


def basis_matrix(
    axis: TransformedAxis, like: Tensor, basis: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """The basis functions of an axis as columns, shape (places, `count`), in the type and device of ``like``.

    ``basis`` and ``rows`` as in `synthesised`.
    """
    units = torch.eye(count(axis), dtype=like.dtype, device=like.device)
    return synthesised(units, axis.model_copy(update={"dim": 0}), basis, rows)


def is_orthonormal(axis: TransformedAxis) -> bool:
    """Whether the basis functions are orthogonal and have norm 1."""
    name = kernels.wavelet_name(axis.kernel)
    return not kernels.is_wavelet(axis.kernel) or bool(pywt.Wavelet(name).orthogonal)


def coefficient_norms(axis: TransformedAxis) -> Tensor | None:
    """Norms of the basis functions along an axis: the size of the weight that a coefficient of 1 makes.

    Returns:
        Shape (`count`,), float64, on the CPU; None if all are 1.
    """
    if is_orthonormal(axis):
        return None
    return torch.cat([_segment_norms(axis, segment).repeat(segment.blocks) for segment in segments(axis)])


def _segment_norms(axis: TransformedAxis, segment: Segment) -> Tensor:
    levels, norms = _levels(axis, segment), []
    # In chunks: the whole matrix of a long axis would be large.
    for start in range(0, segment.kept, _CHUNK):
        stop = min(start + _CHUNK, segment.kept)
        units = torch.zeros(stop - start, segment.kept, dtype=torch.float64)
        units.diagonal(start).fill_(1)
        functions = kernels.inverse(units, axis.kernel, size=segment.length, levels=levels)
        norms.append(torch.linalg.vector_norm(functions, dim=1))
    return torch.cat(norms)
