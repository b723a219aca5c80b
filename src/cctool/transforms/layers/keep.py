"""Which coefficients are kept: the largest, those above a threshold, or the lowest frequencies.

In an orthonormal basis the squared error of the weight is the sum of squares of the dropped coefficients, so
keeping the largest is optimal. Where basis functions b_j have different norms, as those of biorthogonal
wavelets, coefficients are compared by what they add to the weight, ``|s_j| * ||b_j||``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cctool.options.prune.choices import Scope
from cctool.options.transform.choices import Select
from cctool.options.transform.options import WeightOptions
from cctool.transforms.layers.axes import KLT, TransformedAxis, coefficient_norms, count, narrowed
from cctool.transforms.layers.coefficients import CoefficientLayer
from cctool.transforms.layers.klt import KltChoice, klt_choice, used


def chosen(layers: Mapping[str, CoefficientLayer], weights: WeightOptions) -> dict[str, Tensor]:
    """Drop coefficients as the options say; layers get smaller where the kept ones form a box.

    Args:
        layers: with all of their coefficients, by name; narrowed in place.
        weights: the options.

    Returns:
        Masks of the coefficients by layer, True is kept; no entry where a layer keeps all that it still has.
    """
    if weights.threshold is None and weights.keep in (None, 1):
        return {}
    adaptive = {
        name: layer
        for name, layer in layers.items()
        if any(axis.kernel == KLT for axis in layer.arguments.axes)
    }
    fixed = {name: layer for name, layer in layers.items() if name not in adaptive}
    masks = _chosen_adaptive(adaptive, weights) | _chosen_fixed(fixed, weights)
    return {name: mask for name, mask in masks.items() if not bool(mask.all())}


def _chosen_fixed(layers: Mapping[str, CoefficientLayer], weights: WeightOptions) -> dict[str, Tensor]:
    keep = 1.0 if weights.keep is None else weights.keep
    if not layers:
        return {}
    if weights.select is Select.CORNER:
        for layer in layers.values():
            layer.narrow(corner(layer.arguments.axes, keep))
        return {}
    sizes = {name: magnitudes(layer) for name, layer in layers.items()}
    if weights.threshold is not None:
        return {name: above(size, weights.threshold) for name, size in sizes.items()}
    return largest(sizes, keep, together=weights.scope is Scope.GLOBAL)


def _chosen_adaptive(layers: Mapping[str, CoefficientLayer], weights: WeightOptions) -> dict[str, Tensor]:
    """Layers with a KLT keep only those basis columns that some coefficient uses."""
    found = {name: (magnitudes(layer), layer.arguments.axes) for name, layer in layers.items()}
    masks: dict[str, Tensor] = {}
    if weights.threshold is not None:
        above_it = {name: above(sizes, weights.threshold) for name, (sizes, _) in found.items()}
        choices = {name: KltChoice(used(mask, found[name][1]), mask) for name, mask in above_it.items()}
    else:
        keep = 1.0 if weights.keep is None else weights.keep
        box, together = weights.select is Select.CORNER, weights.scope is Scope.GLOBAL
        groups = [found] if together else [{name: layer} for name, layer in found.items()]
        choices = {k: v for group in groups if group for k, v in klt_choice(group, keep, box=box).items()}
    for name, choice in choices.items():
        mask = choice.mask
        for axis, kept in zip(layers[name].arguments.axes, choice.kept, strict=True):
            mask = None if mask is None else narrowed(mask, axis, kept)[0]
        layers[name].narrow(choice.kept)
        masks |= {} if mask is None else {name: mask}
    return masks


def magnitudes(layer: CoefficientLayer) -> Tensor:
    """What each coefficient adds to the weight; the coefficients' shape, float32 or float64, on the CPU."""
    sizes = layer.coefficients.detach().cpu().abs()
    sizes = sizes if sizes.dtype == torch.float64 else sizes.float()
    for axis in layer.arguments.axes:
        norms = coefficient_norms(axis)
        if norms is not None:
            shape = [-1 if dim == axis.dim else 1 for dim in range(sizes.dim())]
            sizes *= norms.to(sizes.dtype).view(shape)
    return sizes


def largest(sizes: Mapping[str, Tensor], keep: float, *, together: bool = False) -> dict[str, Tensor]:
    """Keep exactly the largest coefficients, and at least one per layer.

    Args:
        sizes: from `magnitudes`, by layer.
        keep: share that is kept, in (0, 1]; rounded down to whole coefficients.
        together: whether layers compete with each other.

    Returns:
        Masks of the layers' shapes, True is kept; of equal coefficients the first are kept.
    """
    if not together:
        return {name: largest({name: size}, keep, together=True)[name] for name, size in sizes.items()}
    flat = torch.cat([size.flatten() for size in sizes.values()])
    start = 0
    for size in sizes.values():
        # Ranked above all others, so that every layer keeps its largest.
        flat[start + int(size.argmax())] = math.inf
        start += size.numel()
    wanted = max(len(sizes), _whole(keep * len(flat)))
    # The smallest that is kept. Sorting millions of values would take many times the memory.
    least = flat.kthvalue(len(flat) - wanted + 1).values
    mask = flat > least
    equal = (flat == least).nonzero().flatten()
    mask[equal[: wanted - int(mask.sum())]] = True
    masks, start = {}, 0
    for name, size in sizes.items():
        masks[name] = mask[start : start + size.numel()].view(size.shape)
        start += size.numel()
    return masks


def above(sizes: Tensor, threshold: float) -> Tensor:
    """Keep what is at least ``threshold``, and the largest in any case; a mask, True is kept."""
    mask = sizes >= threshold
    mask.view(-1)[sizes.argmax()] = True
    return mask


def corner(axes: Sequence[TransformedAxis], keep: float) -> tuple[int, ...]:
    """A box of the lowest frequencies with the same share of each axis, as far as whole numbers allow.

    Args:
        axes: transformed axes of one weight, with all of their coefficients.
        keep: share of the coefficients that the box may hold, in (0, 1].

    Returns:
        For each axis the coefficients kept per block, at least one. The box is maximal: one more along any
        axis would exceed the share.
    """
    limit = _whole(keep * math.prod(count(axis) for axis in axes))
    share = keep ** (1 / len(axes))
    kept = [max(1, math.floor(axis.kept * share)) for axis in axes]
    # Smaller last blocks round up, so the box may be too large.
    while _box(axes, kept) > limit and max(kept) > 1:
        kept[max(range(len(axes)), key=lambda i: (kept[i] > 1, kept[i] / axes[i].kept))] -= 1
    grows = True
    while grows:
        grows = False
        # The axis with the smallest share is first to grow.
        for i in sorted(range(len(axes)), key=lambda i: kept[i] / axes[i].kept):
            larger = [*kept[:i], kept[i] + 1, *kept[i + 1 :]]
            if larger[i] <= axes[i].kept and _box(axes, larger) <= limit:
                kept, grows = larger, True
                break
    return tuple(kept)


def _box(axes: Sequence[TransformedAxis], kept: Sequence[int]) -> int:
    smaller = (axis.model_copy(update={"kept": k}) for axis, k in zip(axes, kept, strict=True))
    return math.prod(map(count, smaller))


def _whole(number: float) -> int:
    # Rounding down must not drop a whole one: 0.29 * 100 is 28.999999999999996 in floating point.
    return math.floor(number * (1 + 1e-12) + 1e-9)
