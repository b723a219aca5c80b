"""Penalties in training: those that drive whole units towards zero before they are cut, and PACT's.

Units are passed in as plain data: nothing here knows how channels were found to be coupled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cctool.base.errors import TrainingError
from cctool.training.constraints.base import Constraint
from cctool.training.objectives import absolute_sum


@dataclass(frozen=True)
class Part:
    """The slices of one parameter that the units of one family own.

    Attributes:
        parameter: the object that is trained.
        dim: the dim that `indices` index.
        indices: row u holds the indices that unit u owns; shape [units, indices per unit].
    """

    parameter: nn.Parameter
    dim: int
    indices: Tensor

    @property
    def elements(self) -> int:
        """How many elements of the parameter one unit owns."""
        return self.indices.shape[1] * (self.parameter.numel() // self.parameter.shape[self.dim])


class ScaleL1(Constraint):
    """``strength * sum |gamma|`` over the elements that some unit owns.

    Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", equation 1, with
    the subgradient 0 at 0. The sum of `objectives.gamma_penalty`, without the scales that cannot be removed.

    Args:
        parts: of batch-norm scales, one dim each; an element that is in several counts once.
        strength: weight of the sum, above 0.

    Raises:
        TrainingError: if no scale can be trained.
    """

    name = "gamma_l1"

    def __init__(self, parts: Sequence[Part], strength: float) -> None:
        scales, chosen, start = [], [], 0
        for scale, owned in _owned(part for part in parts if part.parameter.requires_grad):
            scales.append(scale)
            chosen.append(owned.nonzero().flatten() + start)
            start += scale.numel()
        if not scales:
            raise TrainingError("there is no batch norm with a trainable scale on channels that can be cut")
        indices = torch.cat(chosen)
        self._sum = absolute_sum(scales, strength, None if len(indices) == start else indices)

    def penalty(self) -> Tensor:
        """Return the weighted sum, a scalar."""
        return self._sum()


class GroupLasso(Constraint):
    """``strength * sum over units of sqrt(p) * ||w||_2``, w being the p numbers that a unit owns.

    Yuan and Lin 2006, "Model selection and estimation in regression with grouped variables", equation 2.1;
    Wen et al. 2016, "Learning Structured Sparsity in Deep Neural Networks", equation 2, for filters; over
    coupled groups as in Fang et al. 2023, "DepGraph", section 3.3. The factor sqrt(p) makes up for different
    sizes of units. Groups overlap where a weight connects two families. The subgradient at w = 0 is 0.

    Args:
        families: the parts of each family, with the same number of units.
        strength: weight of the sum, above 0.

    Raises:
        TrainingError: if there is no family.
    """

    name = "group_lasso"

    def __init__(self, families: Sequence[Sequence[Part]], strength: float) -> None:
        self._strength = strength
        self._families = [
            [replace(part, indices=part.indices.to(part.parameter.device)) for part in family]
            for family in families
            if family
        ]
        if not self._families:
            raise TrainingError("the group lasso has no unit to act on: nothing can be cut")

    def penalty(self) -> Tensor:
        """Return the weighted sum, a scalar."""
        squares = _PerIndex()
        terms = []
        for family in self._families:
            size = sum(part.elements for part in family)
            owned = [squares(part)[part.indices].sum(dim=1) for part in family]
            norms = _safe_sqrt(torch.stack(owned).sum(dim=0))
            terms.append(math.sqrt(size) * norms.sum())
        return self._strength * torch.stack(terms).sum()


class _PerIndex:
    """Sums of squares for each index of a dim, computed once even if several families use that dim."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], Tensor] = {}

    def __call__(self, part: Part) -> Tensor:
        """Sum of squares at each index of the part's dim; shape [size of the dim]."""
        key = id(part.parameter), part.dim
        if key not in self._made:
            others = [dim for dim in range(part.parameter.dim()) if dim != part.dim]
            squared = part.parameter.square()
            self._made[key] = squared.sum(dim=others) if others else squared
        return self._made[key]


def _safe_sqrt(values: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 and not infinite."""
    # The inner `where` keeps sqrt away from 0: its infinite gradient times the outer zero would be NaN.
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0)


class GrowingPenalty(Constraint):
    """``c / 2 * sum w^2`` over the weights of the units that will be cut, with c growing from step to step.

    GReg-1 of Wang et al. 2021, "Neural Pruning via Growing Regularization", arXiv 2012.09243, section 3.2:
    the units are chosen before, and their penalty grows until the network has learned to do without them. A
    weight that belongs to two of these units counts once; other weights get no penalty from this one.

    Args:
        families: the parts of each family.
        doomed: for each family which units will be cut; shape [units], True is cut.
        delta: increase of the coefficient.
        every: steps between two increases.
        ceiling: largest coefficient.

    Raises:
        TrainingError: if no unit is to be cut.
    """

    name = "growing"

    def __init__(
        self,
        families: Sequence[Sequence[Part]],
        doomed: Sequence[Tensor],
        delta: float,
        every: int = 1,
        ceiling: float = 1.0,
    ) -> None:
        self._delta, self._every, self._ceiling = delta, every, ceiling
        self._steps = 0
        chosen = [
            replace(part, indices=part.indices[units.to(part.indices.device)])
            for family, units in zip(families, doomed, strict=True)
            for part in family
        ]
        self._weights = [(parameter, owned) for parameter, owned in _owned(chosen) if bool(owned.any())]
        if not self._weights:
            raise TrainingError("the growing penalty has no unit to act on: no unit is to go at this rate")

    @property
    def coefficient(self) -> float:
        """Coefficient of the current step."""
        return growing_coefficient(self._steps, self._delta, self._every, self._ceiling)

    def penalty(self) -> Tensor:
        """Return the penalty of the current step, a scalar."""
        sums = [(parameter * owned).square().sum() for parameter, owned in self._weights]
        return self.coefficient / 2 * torch.stack(sums).sum()

    def weights(self) -> None:
        """Count the step, which is done."""
        self._steps += 1


def _owned(parts: Iterable[Part]) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter once, with a mask of the elements that any part owns, of its shape and on its device."""
    found: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for part in parts:
        parameter = part.parameter
        if id(parameter) not in found:
            found[id(parameter)] = parameter, torch.zeros_like(parameter, dtype=torch.bool)
        indices = part.indices.flatten().to(parameter.device)
        found[id(parameter)][1].index_fill_(part.dim, indices, True)
    return list(found.values())


def growing_coefficient(step: int, delta: float, every: int, ceiling: float) -> float:
    """``min(ceiling, delta * (1 + floor(step / every)))`` after ``step`` steps, from 0.

    >>> [growing_coefficient(step, 0.25, 2, 0.6) for step in range(6)]
    [0.25, 0.25, 0.5, 0.5, 0.6, 0.6]
    """
    return min(ceiling, delta * (1 + step // every))


class ClippingDecay(Constraint):
    """``strength * sum alpha^2`` over clipping levels (Choi et al. 2018, arXiv 1805.06085, section 3.2).

    Args:
        levels: the parameters alpha, each of any shape.
        strength: weight of the sum, at least 0.
    """

    name = "alpha_decay"

    def __init__(self, levels: Sequence[nn.Parameter], strength: float) -> None:
        self._levels, self._strength = list(levels), strength

    def penalty(self) -> Tensor | None:
        """Return the weighted sum, a scalar; None if there are no levels or the strength is 0."""
        if not self._levels or not self._strength:
            return None
        return self._strength * torch.stack([level.square().sum() for level in self._levels]).sum()
