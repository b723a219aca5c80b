"""Matrices applied along one axis of a tensor: precision, devices, and which matrices are kept."""

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

__all__ = ["along", "both_axes", "constant", "full_precision"]

_THIN = 8
_CHUNK = 2**20
"""Numbers in a piece of work: 4 MB of float32."""


@contextmanager
def full_precision(x: Tensor) -> Iterator[Tensor]:
    """Give a tensor in the precision that transforms are computed in, with autocast off meanwhile.

    float32 and float64 stay what they are; bfloat16 and float16 become float32.

    Raises:
        TransformError: if ``x`` holds no floating-point numbers.
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
    """Product of a matrix with every line of a tensor along one dim.

    Args:
        matrix: shape (n, size of ``dim``).
        x: any shape.
        dim: along which.

    Returns:
        The shape of ``x`` with n in the place of ``dim``.
    """
    dim %= x.dim()
    if dim == x.dim() - 1:
        return F.linear(x, matrix)
    if dim == x.dim() - 2:
        return torch.matmul(matrix, x)
    size, line = x.shape[dim], math.prod(x.shape[dim + 1 :])
    if dim and line * _THIN < size:
        # A batch of products with thin matrices takes twice the time of one product with a copy.
        return F.linear(x.movedim(dim, -1), matrix).movedim(-1, dim).contiguous()
    product = torch.matmul(matrix, x.reshape(*x.shape[:dim], size, line))
    return product.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def both_axes(rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    """Product of one matrix with every column and another with every row of maps: R X C^T.

    Args:
        rows: R, shape (h, H).
        columns: C, shape (w, W).
        x: X, shape (..., H, W).

    Returns:
        Shape (..., h, w).
    """
    if not _in_pieces(x):
        return torch.matmul(rows, F.linear(x, columns))
    maps = x.reshape(-1, *x.shape[-2:])
    # What lies between the two products stays in the cache, and large memory is asked for once.
    result = x.new_empty(maps.shape[0], rows.shape[0], columns.shape[0])
    step = max(1, _CHUNK // maps[0].numel())
    for start in range(0, maps.shape[0], step):
        torch.matmul(rows, F.linear(maps[start : start + step], columns), out=result[start : start + step])
    return result.reshape(*x.shape[:-2], *result.shape[1:])


def _in_pieces(x: Tensor) -> bool:
    tracked = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    return not tracked and x.device.type == "cpu" and x.numel() > _CHUNK


def constant(make: Callable[..., NDArray[np.float64]], *arguments: Hashable, like: Tensor) -> Tensor:
    """A matrix in the type and on the device of a tensor, kept for the next time.

    Args:
        make: makes it, in float64.
        arguments: of ``make``.
        like: whose dtype and device it gets.

    Returns:
        A tensor that others hold, too: it must not be changed.
    """
    # What is made while a network is traced is no tensor that may outlive the tracing.
    if torch.compiler.is_compiling():
        return _made(make, arguments, like.dtype, like.device)
    return _kept(make, arguments, like.dtype, like.device)


def _made(
    make: Callable[..., NDArray[np.float64]],
    arguments: tuple[Hashable, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    # A tensor of inference mode could not be used in training later.
    with torch.inference_mode(False):
        return torch.from_numpy(make(*arguments)).to(device, dtype)


_kept = lru_cache(maxsize=128)(_made)
