"""How much a unit matters: one criterion for each method; units with the lowest scores are removed first.

family -> a row of scores for each tensor (`criteria.py`) -> reduced to one row -> normalised
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cctool.base.errors import PruningError
from cctool.graph.records import ChannelGraph, Family
from cctool.options.prune.choices import Normalize, PruneMethod, Reduce
from cctool.options.prune.options import PruneOptions
from cctool.pruning.scores import criteria
from cctool.pruning.scores.criteria import RowsFn, ScoreContext, Unscored
from cctool.pruning.scores.evidence import Evidence

REDUCTIONS: dict[Reduce, Callable[[Tensor], Tensor]] = {
    Reduce.SUM: lambda rows: rows.sum(dim=0),
    Reduce.MEAN: lambda rows: rows.mean(dim=0),
    Reduce.MAX: lambda rows: rows.amax(dim=0),
    Reduce.FIRST: lambda rows: rows[0],
}
"""[tensors, units] -> [units]; the first tensor is the first in the forward pass."""


def _divided(scores: Tensor, by: Tensor) -> Tensor:
    return scores / by if bool(by != 0) else scores  # all scores are 0 or equal then: the order is the same


NORMALIZERS: dict[Normalize, Callable[[Tensor], Tensor]] = {
    Normalize.NONE: lambda scores: scores,
    Normalize.MEAN: lambda scores: _divided(scores, scores.mean()),
    Normalize.MAX: lambda scores: _divided(scores, scores.amax()),
    Normalize.SUM: lambda scores: _divided(scores, scores.sum()),
    Normalize.STANDARD: lambda scores: _divided(scores - scores.mean(), scores.std(correction=0)),
}
"""[units] -> [units]; `standard` is the standard score (s - mean) / standard deviation."""


@dataclass(frozen=True)
class Criterion:
    """How one method scores the units of a family.

    Attributes:
        rows: scores in each tensor that the method looks at.
        reduce: default reduction of the rows to one.
        together: (family, context) -> [units], the default of methods whose default is no reduction of rows.
        finish: applied to the reduced row; [units] -> [units].
        normalize: default normalisation of a family's scores.
    """

    rows: RowsFn
    reduce: Reduce = Reduce.SUM
    together: RowsFn | None = None
    finish: Callable[[Tensor], Tensor] = NORMALIZERS[Normalize.NONE]
    normalize: Normalize = Normalize.NONE

    def __call__(
        self,
        family: Family,
        context: ScoreContext,
        reduce: Reduce | None = None,
        normalize: Normalize | None = None,
    ) -> Tensor | Unscored:
        """Score the units of a family.

        Args:
            family: the units.
            context: tensors, generator and evidence.
            reduce: how the scores of several tensors become one; None is the method's default.
            normalize: None is the method's default.

        Returns:
            Shape [units], on the CPU, or why there is none.

        Raises:
            UsageError: the method looks at images, and the context has no evidence for it.
            PruningError: the evidence is of another network.
        """
        joint = reduce is None and self.together is not None
        found = self.together(family, context) if joint and self.together else self.rows(family, context)
        if isinstance(found, Unscored):
            return found
        scores = found if joint else self.finish(REDUCTIONS[reduce or self.reduce](found))
        return NORMALIZERS[self.normalize if normalize is None else normalize](scores)


SCORES: dict[PruneMethod, Criterion] = {
    PruneMethod.SLIMMING: Criterion(criteria.scale_magnitudes),
    PruneMethod.L1: Criterion(criteria.l1_norms),
    PruneMethod.L2: Criterion(criteria.l2_norms, together=criteria.l2_norm_of_all),
    PruneMethod.FPGM: Criterion(criteria.median_distances, normalize=Normalize.MEAN),
    PruneMethod.LAMP: Criterion(criteria.squared_norms, finish=criteria.lamp),
    PruneMethod.TAYLOR: Criterion(criteria.first_order, together=criteria.first_order_of_all),
    PruneMethod.HESSIAN: Criterion(criteria.second_order),
    PruneMethod.GRADIENT: Criterion(criteria.mean_gradients, Reduce.MEAN, normalize=Normalize.MEAN),
    PruneMethod.APOZ: Criterion(criteria.non_zeros, Reduce.MEAN),
    PruneMethod.ACTIVATION: Criterion(criteria.mean_activations, Reduce.MEAN, normalize=Normalize.MEAN),
    PruneMethod.RANDOM: Criterion(criteria.uniform),
}
"""Criterion of each method.

Changes of the loss (taylor, hessian), shares (apoz) and LAMP are comparable across families by construction,
and slimming compares scales by design: none of them is normalised. Distances grow with the number of filters
and their fan-in, and activations and gradients depend on the layer: these are divided by the family's mean.
Norms of filters depend on the layer, too, but compete within a family by default; use `--normalize` with
`--scope global`.
"""


def score_context(model: nn.Module, seed: int = 0, evidence: Evidence | None = None) -> ScoreContext:
    """Context of a model's own tensors, a seeded generator, and what was gathered on images."""
    tensors = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return ScoreContext(tensors, torch.Generator().manual_seed(seed), evidence)


def score_families(
    graph: ChannelGraph, options: PruneOptions, context: ScoreContext
) -> tuple[Tensor | Unscored, ...]:
    """Score every unit of every family.

    Returns:
        For each family one score per unit, float64 on the CPU, or why there is none.

    Raises:
        PruningError: a score is not finite, or the evidence is of another network.
        UsageError: the method looks at images, and the context has no evidence for it.
    """
    criterion = SCORES[options.method]
    return tuple(
        _finite(criterion(family, context, options.reduce, options.normalize), family)
        for family in graph.families
    )


def _finite(score: Tensor | Unscored, family: Family) -> Tensor | Unscored:
    if isinstance(score, Unscored):
        return score
    if not bool(torch.isfinite(score).all()):
        raise PruningError(f"family {family.name}: scores are not finite: its weights hold NaN or infinity")
    return score.double()
