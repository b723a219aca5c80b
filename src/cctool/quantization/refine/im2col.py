"""Layers as matrix products: a layer's inputs at given places of its output, as rows.

A convolution's output at one place is the product of its weight, as a matrix, with the patch of the input
under the kernel. So a sample of places is enough to measure how well a weight reproduces outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cctool.quantization.network.calls import FlowCall


@dataclass(frozen=True)
class ConvGeometry:
    """How a layer's kernel moves; for linear layers there is no kernel and ``dims`` is 0.

    Attributes:
        dims: number of spatial dimensions.
        groups: of channels.
        kernel: its size in each dimension.
        stride: of the equivalent convolution that is not transposed.
        dilation: in each dimension.
        padding: zeros before and after, in each dimension; negative numbers crop.
        stuffing: stride of a transposed convolution: zeros are put between the input's values at this
            distance.
        transposed: whether the weight is (in, out / groups, ...) and flipped.
    """

    dims: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    stuffing: tuple[int, ...] = ()
    transposed: bool = False


def geometry_of(call: FlowCall) -> ConvGeometry:
    """The geometry of a layer's call."""
    if call.place.function == "linear":
        return ConvGeometry(0)
    given, dims = call.settings, int(call.place.function[-2])
    kernel = call.weight_shape[2:]
    stride, dilation = (_each(given.get(name, 1), dims) for name in ("stride", "dilation"))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    ones = (1,) * dims
    groups = int(given.get("groups", 1))
    padding = given.get("padding", 0)
    if call.place.function.startswith("conv_transpose"):
        # A transposed convolution is an ordinary one with a flipped kernel on an input stuffed with zeros.
        before = [r - p for r, p in zip(reach, _each(padding, dims), strict=True)]
        extra = _each(given.get("output_padding", 0), dims)
        sides = tuple((b, b + e) for b, e in zip(before, extra, strict=True))
        return ConvGeometry(dims, groups, kernel, ones, dilation, sides, stride, transposed=True)
    # As in torch, the larger half comes last.
    if padding == "same":
        sides = tuple((r // 2, r - r // 2) for r in reach)
    else:
        sides = tuple((p, p) for p in _each(0 if padding == "valid" else padding, dims))
    return ConvGeometry(dims, groups, kernel, stride, dilation, sides, ones)


def weight_rows(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """A weight as (groups, outputs of a group, inputs of a row)."""
    if not geometry.dims:
        return weight[None]
    seen = torch.unflatten(weight, 0, (geometry.groups, -1))
    if geometry.transposed:
        seen = seen.transpose(1, 2).flip(list(range(3, seen.dim())))
    return seen.flatten(2)


def rows_at(x: Tensor, geometry: ConvGeometry, images: Tensor, places: Tensor) -> Tensor:
    """The inputs of a layer for places of its output.

    Args:
        x: (N, C, ...) images; for linear layers (N, ..., C).
        geometry: of the layer.
        images: int64 (P,), numbers of images.
        places: int64 (P,), numbers of places in the output of an image, in C order.

    Returns:
        (groups, P, inputs of a row); its product with `weight_rows` is the output without a bias.
    """
    if not geometry.dims:
        return x.reshape(len(x), -1, x.shape[-1])[images, places][None]
    x = F.pad(_stuffed(x, geometry), [side for pair in reversed(geometry.padding) for side in pair])
    sizes = x.shape[2:]
    reach = [d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel, strict=True)]
    counts = [(n - r - 1) // s + 1 for n, r, s in zip(sizes, reach, geometry.stride, strict=True)]
    # Flat index of the first input under the kernel at each place; the taps are offsets from it.
    corner = torch.zeros_like(places)
    left = places
    for dim in reversed(range(geometry.dims)):
        corner = corner + left % counts[dim] * geometry.stride[dim] * math.prod(sizes[dim + 1 :])
        left = left // counts[dim]
    steps = [range(0, d * k, d) for d, k in zip(geometry.dilation, geometry.kernel, strict=True)]
    taps = [
        sum(step * math.prod(sizes[dim + 1 :]) for dim, step in enumerate(tap))
        for tap in itertools.product(*steps)
    ]
    where = corner[:, None] + torch.tensor(taps, device=x.device)
    found = x.flatten(2)[images[:, None], :, where].transpose(1, 2)
    return torch.unflatten(found, 1, (geometry.groups, -1)).transpose(0, 1).flatten(2)


def outputs_at(y: Tensor, geometry: ConvGeometry, images: Tensor, places: Tensor) -> Tensor:
    """A layer's output at places, (P, C); ``y`` is (N, C, ...), for linear layers (N, ..., C)."""
    if not geometry.dims:
        return y.reshape(len(y), -1, y.shape[-1])[images, places]
    return y.flatten(2)[images, :, places]


def _stuffed(x: Tensor, geometry: ConvGeometry) -> Tensor:
    if all(step == 1 for step in geometry.stuffing):
        return x
    sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], geometry.stuffing, strict=True)]
    made = x.new_zeros((*x.shape[:2], *sizes))
    spread = tuple(slice(None, None, step) for step in (1, 1, *geometry.stuffing))
    made[spread] = x
    return made


def _each(value: Any, dims: int) -> tuple[int, ...]:
    given: Sequence[Any] = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(int(v) for v in given) * (dims if len(given) == 1 else 1)
