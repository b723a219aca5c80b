"""Small layers and networks of basis functions, and formulas that do not use them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cctool.transforms.basis.build import basis_layer
from cctool.transforms.basis.linear import BasisArguments, BasisLayer
from cctool.transforms.insert_basis import put_basis
from cctool.transforms.layers.base import Swap
from cctool.transforms.layers.which import select_layers

Array = npt.NDArray[Any]


def arguments(layer: nn.Module, kernel: str = "dct", **options: Any) -> BasisArguments:
    """Arguments that fit a whole layer."""
    rows, samples = layer.weight.shape[:2]
    found = {"kernel": kernel, "outputs": rows // getattr(layer, "groups", 1), "inputs": samples}
    return BasisArguments.model_validate(found | options)


def basis(layer: nn.Module, kernel: str = "dct", *, moved: bool = True, **options: Any) -> Any:
    """A basis layer in the place of ``layer``, every parameter moved from where it began."""
    torch.manual_seed(0)
    made: BasisLayer = basis_layer(layer, arguments(layer, kernel, **options))
    if moved:
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.add_(torch.randn_like(parameter) * (0.03 if "offsets" in name else 0.3))
    return made.eval()


def swapped(
    model: nn.Module, kernel: str, layers: str, shape: tuple[int, int, int], **options: Any
) -> tuple[Swap, ...]:
    """Put basis functions into a network."""
    torch.manual_seed(0)
    return put_basis(model, select_layers(model, [layers])[0], kernel, shape, **options)


def rows(kernel: str, frequencies: Array, size: int, period: int) -> Array:
    """Rows of norm 1 by the definition; of the DFT, complex ones."""
    t = np.arange(size)
    if kernel == "dft":
        return np.exp(-2j * np.pi * np.outer(frequencies, t) / period) / np.sqrt(size)
    if kernel == "dct":
        found = np.cos(np.pi * np.outer(frequencies, 2 * t + 1) / (2 * period))
    else:
        found = np.sin(np.pi * np.outer(frequencies + 1, 2 * t + 1) / (2 * period))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def numbers(tensor: Tensor) -> Array:
    """Values as float64 or complex128."""
    found: Array = tensor.detach().numpy()
    return found.astype(np.complex128 if tensor.is_complex() else np.float64)


def filters(layer: Any, unit: float = 10.0, gain: float = 2.0) -> Array:
    """The weight of a convolution of basis functions, from its parameters, term by term."""
    kernel = layer.arguments.kernel
    outputs, samples = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    channel = rows(
        kernel,
        np.arange(layer.out_channels) % outputs + unit * numbers(layer.frequency_offsets),
        samples,
        max(outputs, samples),
    )
    high, wide = (
        rows(kernel, np.arange(size) + unit * numbers(offsets), size, size)
        for size, offsets in zip(layer.kernel_size, (layer.height_offsets, layer.width_offsets), strict=True)
    )
    spatial = np.einsum("opq,pa,qb->oab", numbers(layer.delta), high, wide)
    scale = np.sqrt(gain / np.prod(layer.kernel_size)) * 10
    return scale * np.einsum("oi,oab->oiab", channel, spatial)


def convolved(x: Array, weight: Array, *, stride: int = 1, padding: int = 0, groups: int = 1) -> Array:
    """A convolution of complex or real maps by sums over windows."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    outputs, samples, height, width = weight.shape
    windows = np.lib.stride_tricks.sliding_window_view(x, (height, width), axis=(2, 3))
    windows = windows[:, :, ::stride, ::stride]
    each = outputs // groups
    return np.concatenate(
        [
            np.einsum(
                "nihwab,oiab->nohw",
                windows[:, group * samples : (group + 1) * samples],
                weight[group * each : (group + 1) * each],
            )
            for group in range(groups)
        ],
        axis=1,
    )
