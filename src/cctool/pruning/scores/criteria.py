"""The criteria: scores of a family's units in each tensor that a method looks at.

Each is a pure function of a family and a context. It returns a table with a row for each tensor and a column
for each unit, or says why the method cannot rank the family. `units.py` reduces the rows to one score.

Which tensors: the filters that produce the unit (l1, l2, fpgm, lamp, hessian, gradient); its batch norms
(slimming); the layers that read it (taylor, apoz, activation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cctool.base.errors import PruningError, UsageError
from cctool.graph.ledger import Role
from cctool.graph.records import Family, Place
from cctool.options.prune.choices import PruneMethod
from cctool.pruning.scores.evidence import Evidence


@dataclass(frozen=True)
class ScoreContext:
    """The inputs of score functions.

    Attributes:
        tensors: parameters and buffers of the model by qualified name.
        generator: for random methods; on the CPU, so that every device draws the same numbers.
        evidence: what was gathered on images, for the methods that need it.
    """

    tensors: Mapping[str, Tensor]
    generator: torch.Generator
    evidence: Evidence | None = None


@dataclass(frozen=True)
class Unscored:
    """Why the method cannot rank a family or a tensor."""

    reason: str


RowsFn = Callable[[Family, ScoreContext], Tensor | Unscored]
"""(family, context) -> scores [tensors, units], on the CPU."""

_UNREAD = Unscored(
    "no layer with weights reads these channels in evaluation mode: rank them with --method l1"
)
_NO_GRADIENT = Unscored("no gradient reaches these weights in evaluation mode: rank them with --method l1")


def require_evidence(method: PruneMethod, evidence: Evidence | None) -> Evidence:
    """Check that there is evidence and that it was gathered for this method.

    Raises:
        UsageError: otherwise.
    """
    if evidence is None:
        raise UsageError(
            f"--method {method.value} looks at training images: name them with --data, as in "
            "--data digits or --data folder:DIR"
        )
    if evidence.method is not method:
        raise UsageError(f"--method {method.value} was given the evidence of {evidence.method.value}")
    return evidence


# ---- tensors of a family --------------------------------------------------------------------------------
def filters(family: Family) -> list[Place]:
    """The filters that produce the units, in the order of the forward pass; all places if there are none."""
    return [place for place in family.places if place.role is Role.FILTER] or list(family.places)


def _real(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _power_sum(place: Place, context: ScoreContext, power: int) -> Tensor:
    """Sum of |w|^power over the elements that each unit owns in a tensor; shape [units], on the CPU."""
    tensor = _real(context.tensors[place.tensor])
    others = [dim for dim in range(tensor.ndim) if dim != place.dim]
    norms = torch.linalg.vector_norm(tensor, ord=power, dim=others) if others else tensor.abs()
    return (norms**power).cpu()[place.indices].sum(dim=1)


def _owned(place: Place, tensor: Tensor) -> Tensor:
    """The elements that each unit owns in a tensor; shape [units, elements], on the tensor's device."""
    rows = tensor.movedim(place.dim, 0).flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(1)
    units = len(place.indices)
    if place.indices.shape[1] == 1 and torch.equal(place.indices[:, 0], torch.arange(len(rows))):
        return rows  # the units are the rows in order: no copy
    return rows[place.indices.to(rows.device)].reshape(units, -1)


# ---- magnitudes -----------------------------------------------------------------------------------------
def scale_magnitudes(family: Family, context: ScoreContext) -> Tensor | Unscored:
    """|gamma| of each batch norm (Liu et al. 2017, "Network Slimming", section 3)."""
    scales = [place for place in family.places if place.role is Role.SCALE]
    if not scales:
        return Unscored("no batch norm on these channels: rank them with --method l1 or l2")
    return torch.stack([_power_sum(place, context, 1) for place in scales])


def l1_norms(family: Family, context: ScoreContext) -> Tensor:
    """Sum of |w| over the unit's filter (Li et al. 2017, "Pruning Filters", section 3.1)."""
    return torch.stack([_power_sum(place, context, 1) for place in filters(family)])


def l2_norms(family: Family, context: ScoreContext) -> Tensor:
    """Euclidean norm of the unit's filter."""
    return squared_norms(family, context).sqrt()


def l2_norm_of_all(family: Family, context: ScoreContext) -> Tensor:
    """Euclidean norm over all filters that produce the unit: sqrt(sum of w^2); shape [units]."""
    return squared_norms(family, context).sum(dim=0).sqrt()


def squared_norms(family: Family, context: ScoreContext) -> Tensor:
    """Sum of w^2 over the unit's filter."""
    return torch.stack([_power_sum(place, context, 2) for place in filters(family)])


def median_distances(family: Family, context: ScoreContext) -> Tensor:
    """Sum of the Euclidean distances of a filter to all filters of its layer.

    The filter nearest to the geometric median has the smallest sum; others can replace it (He et al. 2019,
    "Filter Pruning via Geometric Median", arXiv 1811.00250, section 3.3).
    """
    rows = []
    for place in filters(family):
        owned = _owned(place, _real(context.tensors[place.tensor]))
        # Distances do not change under a common shift; centred, float32 products cancel least.
        centred = owned - owned.mean(dim=0)
        mode = "use_mm_for_euclid_dist" if len(centred) > 25 else "donot_use_mm_for_euclid_dist"
        rows.append(torch.cdist(centred, centred, compute_mode=mode).sum(dim=1).cpu())
    return torch.stack(rows)


def lamp(squares: Tensor) -> Tensor:
    """Score of each entry: its square over the sum of the squares that are not smaller.

    Lee et al. 2021, "Layer-Adaptive Sparsity for the Magnitude-based Pruning", arXiv 2010.07611, equation 1.
    Among equal entries the earlier one counts as smaller. If all entries are 0, all scores are 0.

    Args:
        squares: squared magnitudes; shape [n], at least 0.

    Returns:
        Shape [n], in [0, 1]; the largest entry scores 1 unless all are 0.

    >>> lamp(torch.tensor([1.0, 4.0, 5.0]))
    tensor([0.1000, 0.4444, 1.0000])
    """
    # Summed from the largest down: at each entry, the sum over all that follow it in ascending order.
    ordered, order = torch.sort(squares, stable=True)
    behind = ordered.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(ordered)
    scores[order] = ordered / behind.clamp_min(torch.finfo(ordered.dtype).tiny)
    return scores


# ---- gradients ------------------------------------------------------------------------------------------
def _per_filter(
    family: Family,
    context: ScoreContext,
    known: Mapping[str, Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
) -> Tensor | Unscored:
    """Score of (weights, evidence), both [units, elements], for each filter that there is evidence of."""
    rows = []
    for place in filters(family):
        tensor = context.tensors[place.tensor]
        if place.tensor in known:
            value = known[place.tensor]
            require_same_network(place.tensor, tuple(tensor.shape), tuple(value.shape))
            rows.append(score(_owned(place, _real(tensor)), _owned(place, value.to(tensor.device))).cpu())
    return torch.stack(rows) if rows else _NO_GRADIENT


def require_same_network(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    """Refuse evidence whose shape is not that of its tensor.

    Raises:
        PruningError: the shapes differ.
    """
    if expected != found:
        raise PruningError(
            f"{name} has shape {list(expected)}, and what was gathered on images {list(found)}: that was "
            "gathered on another network"
        )


def second_order(family: Family, context: ScoreContext) -> Tensor | Unscored:
    """Sum of h w^2 / 2 over the unit's filter (LeCun et al. 1989, "Optimal Brain Damage", equation 5).

    The diagonal h of the Hessian is approximated by that of the empirical Fisher matrix, the mean squared
    gradient of single images. It is never negative, as is the paper's Levenberg-Marquardt form, and equal to
    that in expectation if labels follow the network's probabilities (Theis et al. 2018, arXiv 1801.05787).
    """
    evidence = require_evidence(PruneMethod.HESSIAN, context.evidence)
    return _per_filter(family, context, evidence.squares, lambda w, h: (h * w.square()).sum(dim=1) / 2)


def mean_gradients(family: Family, context: ScoreContext) -> Tensor | Unscored:
    """Mean of |g| over the unit's filter, g the mean gradient over all images."""
    evidence = require_evidence(PruneMethod.GRADIENT, context.evidence)
    return _per_filter(family, context, evidence.gradients, lambda _, g: g.abs().mean(dim=1))


def _read_by(family: Family) -> list[Place]:
    return [place for place in family.places if place.role is Role.CONSUMER]


def _contributions(family: Family, context: ScoreContext) -> list[Tensor]:
    """Of each layer that reads the units: shape [images, units]."""
    evidence = require_evidence(PruneMethod.TAYLOR, context.evidence)
    found = []
    for place in _read_by(family):
        values = evidence.contributions.get((place.tensor, place.dim))
        if values is not None:
            size = context.tensors[place.tensor].shape[place.dim]
            require_same_network(place.tensor, (size,), (values.shape[1],))
            found.append(values.double()[:, place.indices].sum(dim=2))
    return found


def first_order(family: Family, context: ScoreContext) -> Tensor | Unscored:
    """Mean over the images of (sum g w)^2; the sum is over the weights of one layer that read the unit.

    The first-order importance of a group of parameters (Molchanov et al. 2019, "Importance Estimation for
    Neural Network Pruning", arXiv 1906.10771, section 3.1) for minibatches of one image, so that the result
    does not depend on the batch size. For the weights that read the unit, the sum of g w equals activation
    times gradient: the gate after batch norm, which the paper finds best.
    """
    found = _contributions(family, context)
    return torch.stack([values.square().mean(dim=0) for values in found]) if found else _UNREAD


def first_order_of_all(family: Family, context: ScoreContext) -> Tensor | Unscored:
    """As `first_order`, with one sum over all layers that read the unit; shape [units]."""
    found = _contributions(family, context)
    return torch.stack(found).sum(dim=0).square().mean(dim=0) if found else _UNREAD


# ---- activations ----------------------------------------------------------------------------------------
def _arriving(
    family: Family, context: ScoreContext, known: Mapping[tuple[str, int], Tensor]
) -> Tensor | Unscored:
    """Mean of a statistic over the unit's channels, for each layer that reads them."""
    rows = []
    for place in _read_by(family):
        values = known.get((place.tensor, place.dim))
        if values is not None:
            size = context.tensors[place.tensor].shape[place.dim]
            require_same_network(place.tensor, (size,), tuple(values.shape))
            rows.append(values[place.indices].mean(dim=1))
    return torch.stack(rows) if rows else _UNREAD


def non_zeros(family: Family, context: ScoreContext) -> Tensor | Unscored:
    """1 - APoZ: the share of non-zeros in the inputs of the layers that read the unit.

    APoZ: average percentage of zeros (Hu et al. 2016, "Network Trimming", arXiv 1607.03250, equation 1).
    """
    zeros = _arriving(family, context, require_evidence(PruneMethod.APOZ, context.evidence).zeros)
    if isinstance(zeros, Unscored):
        return zeros
    if not bool(zeros.any()):
        return Unscored(
            "its activations are never zero, so that zeros rank nothing: --method activation does"
        )
    return 1 - zeros


def mean_activations(family: Family, context: ScoreContext) -> Tensor | Unscored:
    """Mean magnitude of the inputs of the layers that read the unit (Molchanov et al. 2017, section 2.2).

    arXiv 1611.06440. The paper's activations are outputs of ReLU; others would cancel, hence the magnitude.
    """
    evidence = require_evidence(PruneMethod.ACTIVATION, context.evidence)
    return _arriving(family, context, evidence.activations)


# ---- control --------------------------------------------------------------------------------------------
def uniform(family: Family, context: ScoreContext) -> Tensor:
    """Uniform numbers in [0, 1): the baseline that every other method has to beat."""
    return torch.rand(family.units, generator=context.generator).unsqueeze(0)
