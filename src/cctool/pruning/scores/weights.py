"""How much a single weight matters: the criteria of `units.py` element by element, for masks.

The lowest are removed first. Methods that rank whole channels do not apply here, and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cctool.options.prune.choices import NEEDS_DATA, PruneMethod
from cctool.pruning.scores.criteria import Unscored, lamp, require_evidence, require_same_network
from cctool.pruning.scores.evidence import Evidence


@dataclass(frozen=True)
class _Weight:
    """One weight tensor, and the evidence on it: of the tensor's shape, or None."""

    values: Tensor
    gradient: Tensor | None
    square: Tensor | None
    generator: torch.Generator


SaliencyFn = Callable[[_Weight], Tensor | Unscored]

_WHOLE_CHANNELS = "ranks whole channels, not single weights: --method l1, lamp, taylor or hessian rank those"
_NO_GRADIENT = Unscored("it takes no part in the loss: no gradient reaches it in evaluation mode")


def _magnitude(weight: _Weight) -> Tensor:
    """|w| (Han et al. 2015, arXiv 1506.02626, section 3); l1 and l2 of a single weight are the same."""
    return weight.values.abs()


def _lamp(weight: _Weight) -> Tensor:
    """w^2 over the sum of all squares in the tensor that are not smaller (Lee et al. 2021, equation 1)."""
    return lamp(weight.values.square().flatten()).view_as(weight.values)


def _taylor(weight: _Weight) -> Tensor | Unscored:
    """|g w| with the mean gradient g: the root of Molchanov et al. 2019's importance, section 3.1.

    The square of each image's own g w, averaged, would be twice the saliency of `hessian`.
    """
    return _NO_GRADIENT if weight.gradient is None else (weight.gradient * weight.values).abs()


def _hessian(weight: _Weight) -> Tensor | Unscored:
    """Half h w^2 (LeCun et al. 1989, "Optimal Brain Damage", equation 5); h is the empirical Fisher's."""
    return _NO_GRADIENT if weight.square is None else weight.square * weight.values.square() / 2


def _gradient(weight: _Weight) -> Tensor | Unscored:
    """|g| with the mean gradient g."""
    return _NO_GRADIENT if weight.gradient is None else weight.gradient.abs()


def _random(weight: _Weight) -> Tensor:
    """Uniform numbers in [0, 1), drawn on the CPU, so that every device draws the same."""
    return torch.rand(weight.values.shape, generator=weight.generator).to(weight.values.device)


def _none(method: PruneMethod) -> SaliencyFn:
    return lambda weight: Unscored(f"{method.value} {_WHOLE_CHANNELS}")


SALIENCIES: dict[PruneMethod, SaliencyFn] = {
    PruneMethod.L1: _magnitude,
    PruneMethod.L2: _magnitude,
    PruneMethod.LAMP: _lamp,
    PruneMethod.TAYLOR: _taylor,
    PruneMethod.HESSIAN: _hessian,
    PruneMethod.GRADIENT: _gradient,
    PruneMethod.RANDOM: _random,
    **{
        method: _none(method)
        for method in (PruneMethod.SLIMMING, PruneMethod.FPGM, PruneMethod.APOZ, PruneMethod.ACTIVATION)
    },
}
"""Saliency function of each method."""


def _looked_up(known: Mapping[str, Tensor], name: str, values: Tensor) -> Tensor | None:
    found = known.get(name)
    if found is None:
        return None
    require_same_network(name, tuple(values.shape), tuple(found.shape))
    return found.to(values.device)


def weight_saliency(
    method: PruneMethod, name: str, weight: Tensor, evidence: Evidence | None, generator: torch.Generator
) -> Tensor | Unscored:
    """Score every element of one weight tensor.

    Args:
        method: how elements are ranked.
        name: qualified name of the parameter, by which evidence is looked up.
        weight: its values, any shape and floating dtype; not changed.
        evidence: what was gathered on images, for the methods that need it; None for the others.
        generator: for random methods, on the CPU; it advances by `weight.numel()` numbers.

    Returns:
        Shape and device of the weight, float64 if the weight is and else float32, at least 0; or why the
        method cannot rank this tensor.

    Raises:
        UsageError: the method looks at images, and there is no evidence for it.
        PruningError: the evidence is of another network.
    """
    values = weight.detach()
    known = require_evidence(method, evidence) if method in NEEDS_DATA else None
    gradient = _looked_up(known.gradients, name, values) if known is not None else None
    square = _looked_up(known.squares, name, values) if known is not None else None
    return SALIENCIES[method](
        _Weight(values if values.dtype == torch.float64 else values.float(), gradient, square, generator)
    )
