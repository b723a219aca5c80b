"""Dyadic wavelet decomposition of feature maps, as `pywt.wavedec2` with mode "periodization".

Each level transforms both axes. A side of odd length has its last row or column replicated first, which gives
``ceil(H / 2) x ceil(W / 2)`` coefficients in each of four bands; the inverse crops it again. Bands are named
by their filters along the width, then the height:

    LH = PyWavelets' cH (horizontal detail), HL = cV, HH = cD
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cctool.transforms.kernels.by_name import max_levels, wavelet_name
from cctool.transforms.kernels.filter_banks import wavelet_matrix
from cctool.transforms.kernels.matmul import both_axes, constant, full_precision


@dataclass(frozen=True)
class Pyramid:
    """The bands of a batch of maps.

    Attributes:
        approximation: LL of the coarsest level, shape (N, C, h, w).
        details: finest level first, each of shape (N, C, 3, h_j, w_j), the bands LH, HL, HH.
    """

    approximation: Tensor
    details: Sequence[Tensor]


def pyramid_levels(name: str, height: int, width: int, levels: int) -> int:
    """Number of levels that `wavedec2` makes: as asked for, but no more than reduce the map to one sample.

    >>> pyramid_levels("haar", 7, 4, levels=5)
    3
    """
    return min(levels, max_levels(name, max(height, width)))


def wavedec2(x: Tensor, name: str, levels: int) -> Pyramid:
    """Decompose maps (N, C, H, W), floating point, by a wavelet; ``dwt`` is haar.

    At least 0 levels; see `pyramid_levels`. Raises TransformError if ``x`` is not floating point.
    """
    details = []
    with full_precision(x) as low:
        for _ in range(pyramid_levels(name, x.shape[2], x.shape[3], levels)):
            height, width = low.shape[2:]
            both = both_axes(_step(name, height, False, low), _step(name, width, False, low), low)
            # Quadrants: LL and HL above, LH and HH below.
            top, bottom = both.chunk(2, 2)
            low, vertical = top.chunk(2, 3)
            horizontal, diagonal = bottom.chunk(2, 3)
            details.append(torch.stack((horizontal, vertical, diagonal), 2).to(x.dtype))
    return Pyramid(low.to(x.dtype), details)


def waverec2(pyramid: Pyramid, name: str, size: tuple[int, int]) -> Tensor:
    """Inverse of `wavedec2` for maps of ``size`` (H, W); returns shape (N, C, H, W)."""
    sizes = [size]
    # Sides of odd length were rounded up at each level, so the sizes follow from the first one.
    for _ in pyramid.details:
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    with full_precision(pyramid.approximation) as low:
        for detail, (height, width) in zip(reversed(pyramid.details), reversed(sizes[:-1]), strict=True):
            horizontal, vertical, diagonal = detail.to(low.dtype).unbind(2)
            top = torch.cat((low, vertical), 3)
            both = torch.cat((top, torch.cat((horizontal, diagonal), 3)), 2)
            low = both_axes(_step(name, height, True, both), _step(name, width, True, both), both)
    return low.to(pyramid.approximation.dtype)


def _step(name: str, size: int, synthesis: bool, like: Tensor) -> Tensor:
    return constant(_one_level, wavelet_name(name), size, synthesis, like=like)


def _one_level(name: str, size: int, synthesis: bool) -> NDArray[np.float64]:
    return wavelet_matrix(name, size, 1, square=False, synthesis=synthesis)
