"""What a pruning did and did not do, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cctool.graph.records import ChannelGraph, Family, Frozen
from cctool.pruning.cut.surgery import CutPlan
from cctool.pruning.cut.verify import BATCH_SIZES, Check, OutputCheck
from cctool.pruning.scores.criteria import Unscored
from cctool.pruning.select.order import Selection


@dataclass(frozen=True)
class FamilyReport:
    """The effect of a cut on one family.

    Attributes:
        name: the first module that produces its channels.
        units: number of units before.
        kept: number of units after.
        width: number of that module's channels in one unit.
        members: every (tensor, dim) that its units touch.
        parameters: number of parameters that its units touch, without buffers; families overlap in these.
        removed_to: highest score of the removed units; None if there are none or the method gives no scores.
        kept_from: lowest score of the kept units; None in the same cases.
        note: why it lost nothing, "" if it did.
    """

    name: str
    units: int
    kept: int
    width: int
    members: tuple[tuple[str, int], ...]
    parameters: int
    removed_to: float | None
    kept_from: float | None
    note: str


@dataclass(frozen=True)
class StatisticReport:
    """A call whose result depends on how many channels are kept.

    Attributes:
        op: function that was called.
        module: the module that called it, "" for the root.
        families: names of the cut families that it runs over.
        reason: how it depends.
    """

    op: str
    module: str
    families: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class PruneReport:
    """What a cut did and did not do.

    Attributes:
        families: every family, in the order of the forward pass.
        frozen: parameter dims that cannot be cut, with the operation that froze them.
        parameters_before: number of parameters.
        parameters_after: number after the cut.
        error: largest difference of the cut from the masked network, relative to the largest output.
        statistics: calls that the masked network computed over the kept channels only.
        precision: the dtype of that comparison.
        batch_sizes: batch sizes at which all output shapes were compared.
        notes: further remarks for the user.
        outputs: every output as it was compared.
    """

    families: tuple[FamilyReport, ...]
    frozen: tuple[Frozen, ...]
    parameters_before: int
    parameters_after: int
    error: float
    statistics: tuple[StatisticReport, ...]
    precision: str
    batch_sizes: tuple[int, ...]
    notes: tuple[str, ...]
    outputs: tuple[OutputCheck, ...] = ()


@dataclass(frozen=True)
class ThinResult:
    """A verified plan, the graph and the selection that it was made of, and the report."""

    plan: CutPlan
    report: PruneReport
    graph: ChannelGraph
    selection: Selection


def report_of(
    model: nn.Module,
    graph: ChannelGraph,
    scores: Sequence[Tensor | Unscored],
    selection: Selection,
    plan: CutPlan,
    outcome: Check,
    notes: Sequence[str],
) -> PruneReport:
    """Make the report of a planned and verified cut; the model is the one before the cut."""
    parameters = dict(model.named_parameters())
    after = 0
    for name, parameter in parameters.items():
        shape = list(parameter.shape)
        for cut in plan.tensors.get(name, ()):
            shape[cut.dim] = cut.keep.numel()
        after += torch.Size(shape).numel()
    families = tuple(
        _family(family, kept, score, parameters, selection)
        for family, kept, score in zip(graph.families, selection.kept, scores, strict=True)
    )
    return PruneReport(
        families=families,
        frozen=graph.frozen,
        parameters_before=sum(p.numel() for p in parameters.values()),
        parameters_after=after,
        error=outcome.error,
        statistics=tuple(
            StatisticReport(found.op, found.module, found.families, found.reason)
            for found in outcome.statistics
        ),
        precision=outcome.precision,
        batch_sizes=BATCH_SIZES,
        notes=tuple(notes),
        outputs=outcome.outputs,
    )


def _family(
    family: Family,
    kept: Tensor,
    score: Tensor | Unscored,
    parameters: dict[str, nn.Parameter],
    selection: Selection,
) -> FamilyReport:
    touched = sum(
        place.indices.numel() * parameters[place.tensor].numel() // parameters[place.tensor].shape[place.dim]
        for place in family.places
        if place.tensor in parameters
    )
    whole = bool(kept.all())
    ranked = None if whole or isinstance(score, Unscored) else score
    return FamilyReport(
        name=family.name,
        units=family.units,
        kept=int(kept.sum()),
        width=family.width,
        members=tuple((place.tensor, place.dim) for place in family.places),
        parameters=touched,
        removed_to=None if ranked is None else float(ranked[~kept].max()),
        kept_from=None if ranked is None else float(ranked[kept].min()),
        note=selection.spared.get(family.name, "") if whole else "",
    )
