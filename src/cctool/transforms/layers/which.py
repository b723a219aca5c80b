"""Which layers of a network are transformed, along which axes, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from cctool.base.errors import UsageError
from cctool.checkpoint.edits.mask import masked_places
from cctool.options.transform.choices import Axes
from cctool.transforms.kernels import by_name as kernels
from cctool.transforms.layers.axes import TransformedAxis
from cctool.transforms.layers.base import SwappedLayer

_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "fc": (nn.Linear,),
    "dense": (nn.Linear,),
    "conv": (_ConvNd,),
    "all": (nn.Linear, _ConvNd),
}


@dataclass(frozen=True)
class SelectedLayer:
    """A layer to transform.

    Attributes:
        names: its names in the network; several if it is shared.
        layer: as it is now, possibly swapped already.
        plain: the ordinary layer that computes the same.
    """

    names: tuple[str, ...]
    layer: nn.Module
    plain: nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that is not transformed, and why."""

    name: str
    reason: str


def select_layers(
    model: nn.Module, patterns: Sequence[str]
) -> tuple[list[SelectedLayer], list[SkippedLayer]]:
    """Select linear layers and convolutions.

    Args:
        model: any network.
        patterns: ``linear`` (``fc``, ``dense``), ``conv``, ``all``, or glob patterns of module names.

    Returns:
        Those that can be transformed, and those that match but cannot be, in the network's order.

    Raises:
        UsageError: if a pattern matches nothing.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _KINDS["all"]):
            names.setdefault(module, []).append(name)
    chosen: set[nn.Module] = set()
    for pattern in patterns:
        found = {layer for layer in names if _matches(layer, names[layer], pattern)}
        if not found:
            example = next((known[0] for known in names.values()), None)
            there = f"{example} is one" if example else "the network has none"
            raise UsageError(f"--layers {pattern}: no linear layer or convolution is called so; {there}")
        chosen |= found
    owners = _owners(model)
    selected, skipped = [], []
    for layer, known in names.items():
        if layer not in chosen:
            continue
        plain = layer.plain() if isinstance(layer, SwappedLayer) else layer
        reason = "the network is this one layer" if layer is model else _reason(layer, plain, owners)
        if reason or not isinstance(plain, (nn.Linear, nn.Conv2d)):
            skipped.append(SkippedLayer(known[0], reason))
        else:
            selected.append(SelectedLayer(tuple(known), layer, plain))
    return selected, skipped


def _matches(layer: nn.Module, names: Sequence[str], pattern: str) -> bool:
    if pattern in _KINDS:
        return isinstance(layer, _KINDS[pattern])
    return any(fnmatchcase(name, pattern) for name in names)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that own a parameter, by the parameter's id; each module once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name or "the network itself")
    return owners


def _reason(layer: nn.Module, plain: nn.Module | None, owners: dict[int, list[str]]) -> str:
    kind = type(layer).__name__
    if plain is None:
        return f"{kind} computes with complex numbers and has no weight to transform"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized"
    if type(plain) not in (nn.Linear, nn.Conv2d):
        return f"it is a {kind}; exactly Linear and Conv2d are transformed"
    weight = plain._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters"
    floating = weight.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if not floating or not weight.numel():
        return f"its weight holds {weight.numel():,} numbers of type {weight.dtype}"
    if not bool(weight.isfinite().all()):
        return "its weight holds NaN or infinite values, which no choice of coefficients may hide"
    if any(place.module is plain and place.leaf == "weight" for place in masked_places(plain)):
        return "its weight has a mask, which a transform would spread over all coefficients"
    # The bias may be shared, because it is not transformed.
    stored = [owners[id(p)] for name, p in layer._parameters.items() if name != "bias" and p is not None]
    tied = [modules for modules in stored if len(modules) > 1]
    return f"its weight is tied: {' and '.join(tied[0])} share it" if tied else ""


def transformed_axes(
    weight: Tensor, kernel: str, *, axes: Axes | None, block: int | None, levels: int | None
) -> tuple[TransformedAxis, ...]:
    """The axes of a weight that are transformed, with all of their coefficients.

    Args:
        weight: of a linear layer (2-D) or a convolution (4-D).
        kernel: name of the transform.
        axes: of a convolution; None is spatial, or channel for 1x1 kernels.
        block: places of a channel axis that are transformed together; None is all.
        levels: of a wavelet; None or more than the size allows is as many as it allows.

    Returns:
        Axes of size 1 are left out, so there may be none.
    """
    channel, spatial = (0, 1), tuple(range(2, weight.dim()))
    pointwise = all(weight.shape[dim] == 1 for dim in spatial)
    dims: tuple[int, ...] = spatial
    if axes is Axes.BOTH:
        dims = (*channel, *spatial)
    elif weight.dim() == 2 or axes is Axes.CHANNEL or (axes is None and pointwise):
        dims = channel
    found = []
    for dim in dims:
        size = weight.shape[dim]
        if size > 1:
            length = size if block is None or dim > 1 else min(block, size)
            part, deep = length if length < size else None, _levels(kernel, length, levels)
            found.append(
                TransformedAxis(dim=dim, kernel=kernel, size=size, kept=length, block=part, levels=deep)
            )
    return tuple(found)


def _levels(kernel: str, length: int, levels: int | None) -> int | None:
    if not kernels.is_wavelet(kernel):
        return None
    most = kernels.max_levels(kernel, length)
    return most if levels is None else min(levels, most)
