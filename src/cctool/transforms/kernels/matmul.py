"""Matrices applied along one axis of a tensor, in sufficient precision, and a cache of these matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cctool.base.errors import TransformError

_THIN = 8
_CHUNK = 2**20
"""Values per piece: 4 MB of float32."""


@contextmanager
def full_precision(x: Tensor) -> Iterator[Tensor]:
    """Yield ``x`` in the precision of the transforms, with autocast off.

    float32 and float64 stay as they are; bfloat16 and float16 become float32.

    Raises:
        TransformError: if ``x`` is not floating point.
    """
    if not x.is_floating_point():
        raise TransformError(f"a transform takes floating-point numbers, not {x.dtype}")
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if not torch.is_autocast_enabled(x.device.type):
        yield work
        return
    with torch.autocast(x.device.type, enabled=False):
        yield work


def along(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """Multiply a matrix (n, size of ``dim``) along one dim of ``x``, which gets size n."""
    dim %= x.dim()
    if dim == x.dim() - 1:
        return F.linear(x, matrix)
    if dim == x.dim() - 2:
        return torch.matmul(matrix, x)
    size, line = x.shape[dim], math.prod(x.shape[dim + 1 :])
    if dim and line * _THIN < size:
        # A batch of products with thin matrices is twice as slow as copying and one large product.
        return F.linear(x.movedim(dim, -1), matrix).movedim(-1, dim).contiguous()
    product = torch.matmul(matrix, x.reshape(*x.shape[:dim], size, line))
    return product.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def both_axes(rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    """Products R X C^T of the matrices R (h, H) and C (w, W) with maps X (..., H, W); shape (..., h, w)."""
    if not _in_pieces(x):
        return torch.matmul(rows, F.linear(x, columns))
    maps = x.reshape(-1, *x.shape[-2:])
    # Piece by piece, the intermediate result stays in the cache, and only the result is allocated.
    result = x.new_empty(maps.shape[0], rows.shape[0], columns.shape[0])
    step = max(1, _CHUNK // maps[0].numel())
    for start in range(0, maps.shape[0], step):
        torch.matmul(rows, F.linear(maps[start : start + step], columns), out=result[start : start + step])
    return result.reshape(*x.shape[:-2], *result.shape[1:])


def _in_pieces(x: Tensor) -> bool:
    tracked = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    return not tracked and x.device.type == "cpu" and x.numel() > _CHUNK


def constant(make: Callable[..., NDArray[np.float64]], *arguments: Hashable, like: Tensor) -> Tensor:
    """The matrix ``make(*arguments)``, float64, in the type and on the device of ``like``; cached.

    The tensor is shared and must not be changed.
    """
    # Tensors made during tracing are only valid within it and must not get into the cache.
    if torch.compiler.is_compiling():
        return _made(make, arguments, like.dtype, like.device)
    return _kept(make, arguments, like.dtype, like.device)


def _made(
    make: Callable[..., NDArray[np.float64]],
    arguments: tuple[Hashable, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    # A cached tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return torch.from_numpy(make(*arguments)).to(device, dtype)


_kept = lru_cache(maxsize=128)(_made)
