"""Block transforms of feature maps, with smaller blocks where a side is not a multiple of the block size.

Blocks of ``block`` x ``block`` start at the top left corner. The remainder at the right and at the bottom is
transformed by the same kernel of its own size: a 20 x 7 map in blocks of 8 has blocks 8, 8 and 4 high and 7
wide. The transform of a block is separable, and so is that of a map: along each axis it is one matrix with
the blocks' matrices on its diagonal. Coefficients stay in the place of their block, ordered by frequency
within it; `block_positions` gives encoder and decoder the frequency of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import block_diag
from torch import Tensor

from cctool.transforms.kernels.by_name import kernel_matrix
from cctool.transforms.kernels.matmul import along, both_axes, constant, full_precision

_DENSE = 64
"""Largest side that is transformed by one block-diagonal matrix."""


@dataclass(frozen=True)
class BlockPositions:
    """The frequency and block size of each coefficient of a map; int64 tensors (H, W) on the CPU.

    Attributes:
        row: vertical frequency, 0 to the block's height less 1.
        column: horizontal frequency, 0 to the block's width less 1.
        height: of the block; smaller than the nominal one in the bottom strip.
        width: of the block; smaller than the nominal one in the right strip.
    """

    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor


def block_forward(x: Tensor, kernel: str, block: int = 8, *, levels: int = 1) -> Tensor:
    """Transform maps (N, C, H, W) block by block; differentiable.

    Args:
        x: the maps, floating point.
        kernel: one of `cctool.transforms.kernels.by_name.KERNELS`; wavelets use their square matrices.
        block: nominal side of a block, at least 1.
        levels: of a wavelet within a block.

    Returns:
        Coefficients in the shape of ``x``; TransformError is raised if that is not floating point.
    """
    return _transformed(x, kernel, block, levels, False)


def block_inverse(c: Tensor, kernel: str, block: int = 8, *, levels: int = 1) -> Tensor:
    """Inverse of `block_forward`."""
    return _transformed(c, kernel, block, levels, True)


def block_positions(height: int, width: int, block: int = 8) -> BlockPositions:
    """Frequency and block of each coefficient of a map.

    >>> block_positions(3, 3, block=2).column.tolist()
    [[0, 1, 0], [0, 1, 0], [0, 1, 0]]
    """
    (row, tall), (column, wide) = _axis(height, block), _axis(width, block)
    shape = (height, width)
    return BlockPositions(
        row[:, None].expand(shape), column.expand(shape), tall[:, None].expand(shape), wide.expand(shape)
    )


def norm_scale(height: int, width: int, kernel: str) -> Tensor:
    """Ratio of a block's unnormalised to its orthonormal coefficients, float64 (height, width).

    The convention is scipy's ``norm=None``: the DCT and the DST carry a factor 2 along each axis, the DFT
    none. In an 8 x 8 DCT the factors are 16, with one zero frequency 22.63, with two 32. Other kernels have
    factors of 1.
    """
    return torch.outer(_axis_scale(height, kernel), _axis_scale(width, kernel))


def _axis(size: int, block: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(size)
    whole = size - size % block
    return index % block, torch.where(index < whole, block, size - whole)


def _axis_scale(size: int, kernel: str) -> Tensor:
    if kernel not in ("dct", "dst", "dft"):
        return torch.ones(size, dtype=torch.float64)
    scale = torch.full((size,), math.sqrt(size / 2 if kernel == "dft" else 2 * size), dtype=torch.float64)
    # The basis functions that are constant (first of DCT and DFT) or alternate in sign (last of DST, and of
    # DFT if even) have twice the energy of the others.
    if kernel != "dst":
        scale[0] *= math.sqrt(2)
    if kernel == "dst" or (kernel == "dft" and size % 2 == 0):
        scale[-1] *= math.sqrt(2)
    return scale


def _transformed(x: Tensor, kernel: str, block: int, levels: int, synthesis: bool) -> Tensor:
    if kernel == "identity":
        # Like the result of every other kernel, it may be modified in place.
        return x.clone()
    height, width = x.shape[2:]
    with full_precision(x) as work:

        def matrix(size: int) -> Tensor:
            return constant(block_diagonal, kernel, size, block, levels, synthesis, like=work)

        if max(height, width) <= _DENSE:
            return both_axes(matrix(height), matrix(width), work).to(x.dtype)
        for dim, size in ((3, width), (2, height)):
            whole = size - size % block
            parts = []
            if whole:
                # One block-diagonal matrix of a long side would be mostly zeros.
                side = _piece(whole, block)
                pieces = torch.unflatten(work.narrow(dim, 0, whole), dim, (-1, side))
                parts.append(along(matrix(side), pieces, dim + 1).flatten(dim, dim + 1))
            if whole < size:
                parts.append(along(matrix(size - whole), work.narrow(dim, whole, size - whole), dim))
            work = torch.cat(parts, dim)
    return work.to(x.dtype)


def _piece(whole: int, block: int) -> int:
    """Largest divisor of ``whole`` that is a multiple of ``block`` and at most `_DENSE`, or ``block``."""
    blocks = whole // block
    fitting = [part for part in range(1, blocks + 1) if blocks % part == 0 and part * block <= _DENSE]
    return max(fitting, default=1) * block


def block_diagonal(kernel: str, size: int, block: int, levels: int, synthesis: bool) -> NDArray[np.float64]:
    """The transform of a whole axis, (size, size): the matrices of its blocks on the diagonal."""
    sides = [block] * (size // block) + [size % block] * (size % block > 0)
    parts = {side: kernel_matrix(kernel, side, levels, True, synthesis) for side in set(sides)}
    result: NDArray[np.float64] = block_diag(*(parts[side] for side in sides))
    return result
