"""How much a unit matters: one pure function for each method, the lowest scores go first.

A score function sees one family and returns one score a unit, or says why the method cannot rank the family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cctool.errors import PruningError
from cctool.graph.channels import ChannelGraph, Family, Place
from cctool.graph.ledger import Role
from cctool.options.prune import PruneMethod, PruneOptions
from cctool.pruning.criteria import Unscored

__all__ = ["SCORES", "ScoreContext", "ScoreFn", "Unscored", "score_context", "score_families"]


@dataclass(frozen=True)
class ScoreContext:
    """What score functions may look at.

    Attributes:
        tensors: parameters and buffers of the model by qualified name.
        generator: for the methods that draw; on the CPU, so that every device draws the same.
    """

    tensors: Mapping[str, Tensor]
    generator: torch.Generator


ScoreFn = Callable[[Family, ScoreContext], Tensor | Unscored]


def score_context(model: nn.Module, seed: int = 0) -> ScoreContext:
    """Context of a model's own tensors and a seeded generator."""
    tensors = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return ScoreContext(tensors, torch.Generator().manual_seed(seed))


def _per_unit(place: Place, context: ScoreContext, power: int) -> Tensor:
    """Sum of |w|^power over all that a unit owns of one tensor; shape [units], float32 on the CPU."""
    tensor = context.tensors[place.tensor]
    others = [dim for dim in range(tensor.ndim) if dim != place.dim]
    if tensor.dtype != torch.float64:
        tensor = tensor.float()
    norms = torch.linalg.vector_norm(tensor, ord=power, dim=others) if others else tensor.abs()
    return (norms**power).cpu()[place.indices].sum(dim=1)


def _filters(family: Family) -> list[Place]:
    return [place for place in family.places if place.role is Role.FILTER] or list(family.places)


def slimming(family: Family, context: ScoreContext) -> Tensor | Unscored:
    """Sum of |gamma| over the unit's batch norms (Liu et al. 2017, "Network Slimming", section 3)."""
    scales = [place for place in family.places if place.role is Role.SCALE]
    if not scales:
        return Unscored("no batch norm on these channels: rank them with --method l1 or l2")
    return torch.stack([_per_unit(place, context, 1) for place in scales]).sum(dim=0)


def l1(family: Family, context: ScoreContext) -> Tensor:
    """Sum of |w| over the filters that produce the unit (Li et al. 2017, section 3.1)."""
    return torch.stack([_per_unit(place, context, 1) for place in _filters(family)]).sum(dim=0)


def l2(family: Family, context: ScoreContext) -> Tensor:
    """Euclidean norm of the filters that produce the unit, all together: sqrt(sum of w^2)."""
    return torch.stack([_per_unit(place, context, 2) for place in _filters(family)]).sum(dim=0).sqrt()


def random(family: Family, context: ScoreContext) -> Tensor:
    """Uniform numbers in [0, 1): the control that every other method has to beat."""
    return torch.rand(family.units, generator=context.generator)


SCORES: dict[PruneMethod, ScoreFn] = {
    PruneMethod.SLIMMING: slimming,
    PruneMethod.L1: l1,
    PruneMethod.L2: l2,
    PruneMethod.RANDOM: random,
}
"""Score function of each method."""


def score_families(
    graph: ChannelGraph, options: PruneOptions, context: ScoreContext
) -> tuple[Tensor | Unscored, ...]:
    """Score every unit of every family.

    Args:
        graph: the coupled channels.
        options: method, reduction, normalisation.
        context: what score functions may look at.

    Returns:
        For each family of the graph one score a unit, float64 on the CPU, or why there is none.

    Raises:
        PruningError: a score is not finite.
    """
    return tuple(_finite(SCORES[options.method](family, context), family) for family in graph.families)


def _finite(score: Tensor | Unscored, family: Family) -> Tensor | Unscored:
    if isinstance(score, Unscored):
        return score
    if not bool(torch.isfinite(score).all()):
        raise PruningError(f"family {family.name}: scores are not finite: its weights hold NaN or infinity")
    return score.double()
