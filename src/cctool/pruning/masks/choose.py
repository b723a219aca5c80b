"""Which weights a mask removes, tensor by tensor, and why some tensors get none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cctool.base.errors import PruningError, UsageError
from cctool.base.patterns import refuse_unmatched
from cctool.checkpoint.edits.computed import why_not_parameters
from cctool.checkpoint.edits.mask import masks_of
from cctool.graph.channels import couple
from cctool.graph.ledger import Role
from cctool.graph.records import ChannelGraph
from cctool.options.prune.choices import Granularity, PruneMethod, Scope
from cctool.options.prune.options import PruneOptions
from cctool.options.prune.patterns import Pattern
from cctool.pruning.cut.behind import followers
from cctool.pruning.masks.granularity import (
    WeightGroups,
    as_filters,
    from_filters,
    groups_of,
    keep_highest,
    keep_highest_together,
    keep_pattern,
    pattern_misfit,
)
from cctool.pruning.masks.report import is_maskable, weights_of
from cctool.pruning.scores.criteria import Unscored
from cctool.pruning.select.order import Selection, around

Saliency = Callable[[str, Tensor], "Tensor | Unscored"]
"""(name, weight) -> how much each element matters, of the weight's shape; the lowest magnitudes are first."""


@dataclass(frozen=True)
class ChosenMasks:
    """Masks, and the weights without one.

    Attributes:
        masks: by name of the parameter, of its shape; True is kept.
        skipped: names of the weights that get no mask, with the reason.
        follow: for masks that follow the rows of another tensor, that tensor's name.
    """

    masks: Mapping[str, Tensor]
    skipped: Mapping[str, str]
    follow: Mapping[str, str]


@dataclass(frozen=True)
class _Ranked:
    """One weight that may be masked, as [O, I, K].

    Attributes:
        name: qualified name.
        module: its owner.
        shape: as it is stored.
        worth: saliency of each element; 0 where an earlier mask has removed it.
        left: bool, False where an earlier mask has removed the element.
    """

    name: str
    module: nn.Module
    shape: torch.Size
    worth: Tensor
    left: Tensor


def magnitude(name: str, weight: Tensor) -> Tensor:
    """|w| (Han et al. 2015, arXiv 1506.02626, section 3)."""
    return weight.abs()


def choose_masks(
    model: nn.Module,
    inputs: Sequence[Tensor],
    options: PruneOptions,
    saliency: Saliency = magnitude,
    *,
    step: int = 1,
    rates: Mapping[str, float] | None = None,
    apart: Mapping[str, str] | None = None,
) -> ChosenMasks:
    """Choose the elements to remove from the weights of all convolutions and linear layers.

    The rate refers to what earlier masks have kept: single weights for ``element``, groups otherwise. A
    group's worth is the sum of its elements' saliency, or of their squares for method ``l2``. With ``row``, a
    filter's bias and the scale and shift of a batch norm that follows it are masked, too, so that it emits
    nothing; rows that are the model's outputs are kept. N:M has a pattern instead of a rate.

    Args:
        model: any module; it is not changed.
        inputs: positional arguments of its forward; rows need a pass.
        options: granularity, rate, pattern, block, scope, patterns of names, method.
        saliency: how much elements matter.
        step: number of the step, from 1; sets the rate.
        rates: rate by tensor, module or pattern, instead of the options' rate; others keep all their weights.
        apart: names of weights that get no mask whatever the options say, with the reasons.

    Raises:
        UsageError: a pattern matches no parameter or module.
        PruningError: nothing can be masked, or a saliency is not finite.
    """
    skipped = dict(apart or {})
    wanted = _wanted(model, inputs, options, rates, skipped)
    ranked = _ranked(model, wanted, options, saliency, skipped)
    if not ranked:
        reasons = why_not_parameters(model) or "; ".join(dict.fromkeys(skipped.values()))
        reasons = reasons or "it has no weights of two or more dimensions"
        raise PruningError(f"nothing can be masked with --granularity {options.granularity.value}: {reasons}")
    together = options.effective_scope is Scope.GLOBAL and rates is None
    # With a table, each tensor has a rate of its own, so tensors do not compete.
    kept = _kept(ranked, options, wanted, step, together=together)
    masks = {
        item.name: from_filters(kept[item.name], item.module, item.shape).contiguous() for item in ranked
    }
    follow: dict[str, str] = {}
    if options.granularity is Granularity.ROW:
        behind = followers(model, inputs)
        for name, filters in kept.items():
            rows = filters.flatten(1).any(1)
            follow |= dict.fromkeys(behind.get(name, ()), name)
            masks |= {other: rows.clone() for other in behind.get(name, ())}
    return ChosenMasks(masks, skipped, follow)


def _wanted(
    model: nn.Module,
    inputs: Sequence[Tensor],
    options: PruneOptions,
    rates: Mapping[str, float] | None,
    skipped: dict[str, str],
) -> dict[str, float]:
    """Names of the weights that may be masked, with the rate after the last step; adds to ``skipped``."""
    excluded = _matching(model, options.exclude)
    only = _matching(model, options.only) if options.only else None
    by_name = _rates(model, rates) if rates is not None else None
    rows = options.granularity is Granularity.ROW
    frozen = couple(model, inputs).frozen if rows else ()
    outputs = {(dim.parameter, dim.dim) for dim in frozen if dim.op == "output"}
    wanted: dict[str, float] = {}
    for name, _, module in weights_of(model):
        if name in skipped:
            continue
        if not is_maskable(module):
            skipped[name] = "not the weight of a convolution or linear layer"
        elif name in excluded:
            skipped[name] = "excluded"
        elif only is not None and name not in only:
            skipped[name] = "not among those asked for"
        elif by_name is not None and name not in by_name:
            skipped[name] = "no rate is given for it"
        elif (name, int(isinstance(module, _ConvNd) and module.transposed)) in outputs:
            skipped[name] = "its rows are the model's outputs"
        else:
            wanted[name] = options.rate if by_name is None else by_name[name]
    return wanted


def _ranked(
    model: nn.Module,
    wanted: Mapping[str, float],
    options: PruneOptions,
    saliency: Saliency,
    skipped: dict[str, str],
) -> list[_Ranked]:
    masks, pattern = masks_of(model), options.pattern or Pattern()
    single = options.granularity in (Granularity.ELEMENT, Granularity.NM)
    ranked = []
    for name, parameter, module in weights_of(model):
        if name not in wanted:
            continue
        if options.granularity is Granularity.NM:
            misfit = pattern_misfit(as_filters(parameter.detach(), module), pattern)
            if misfit:
                skipped[name] = misfit
                continue
        found = saliency(name, parameter.detach())
        if isinstance(found, Unscored):
            skipped[name] = found.reason
            continue
        if not bool(torch.isfinite(found).all()):
            raise PruningError(f"{name}: its saliency is not finite: the weights hold NaN or infinity")
        left = masks.get(name, torch.ones_like(parameter, dtype=torch.bool)).cpu()
        worth = found.detach().cpu().abs().masked_fill(left.logical_not(), 0)
        # Squares rank single weights as magnitudes do, and their sums rank groups by the l2 norm.
        if options.method is PruneMethod.L2 and not single:
            worth = worth.double().square()
        ranked.append(
            _Ranked(name, module, parameter.shape, as_filters(worth, module), as_filters(left, module))
        )
    return ranked


def _kept(
    ranked: Sequence[_Ranked], options: PruneOptions, rates: Mapping[str, float], step: int, *, together: bool
) -> dict[str, Tensor]:
    """Masks of what is kept of each weight, bool [O, I, K]."""
    if options.granularity is Granularity.NM:
        pattern = options.pattern or Pattern()
        return {
            item.name: keep_pattern(
                item.worth.masked_fill(item.left.logical_not(), -math.inf), pattern
            ).logical_and(item.left)
            for item in ranked
        }
    groups = {item.name: groups_of(item.worth, options.granularity, options.block) for item in ranked}
    worths = {item.name: _group_worth(item, groups[item.name]) for item in ranked}
    if together:
        stay = keep_highest_together(worths, options.rate_at(step))
    else:
        stay = {
            name: keep_highest(worth, replace(options, rate=rates[name]).rate_at(step))
            for name, worth in worths.items()
        }
    return {name: groups[name].spread(kept) for name, kept in stay.items()}


def _group_worth(item: _Ranked, groups: WeightGroups) -> Tensor:
    """Worth of each group; -inf where earlier masks have removed all of it."""
    gone = groups.sums(item.left) == 0
    return groups.sums(item.worth).masked_fill(gone, -math.inf)


def idle_patterns(model: nn.Module, options: PruneOptions) -> tuple[str, ...]:
    """A note for each pattern of ``--only`` and ``--exclude`` that names something, but no weight."""
    maskable = {name for name, _, module in weights_of(model) if is_maskable(module)}
    return tuple(
        f"{flag} {pattern} changes nothing: what it names holds no weight that could be masked"
        for flag, patterns in (("--only", options.only), ("--exclude", options.exclude))
        for pattern in patterns
        if not maskable & _matching(model, [pattern])
    )


def _matching(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the weights that a glob pattern matches, by their own name or that of a module around them.

    Raises:
        UsageError: a pattern matches no parameter or module of the model.
    """
    known = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_modules()}
    refuse_unmatched(patterns, known, "parameter or module")
    return {
        name
        for name, _, _ in weights_of(model)
        if any(fnmatchcase(outer, pattern) for outer in around(name) for pattern in patterns)
    }


def _rates(model: nn.Module, rates: Mapping[str, float]) -> dict[str, float]:
    """Rates by name of the weight; the last pattern that matches applies."""
    found: dict[str, float] = {}
    for pattern, rate in rates.items():
        if not 0 <= rate < 1:
            raise UsageError(f"rate {rate} of {pattern} is outside [0, 1): give the fraction to remove")
        found |= dict.fromkeys(_matching(model, [pattern]), rate)
    return found


def unit_masks(model: nn.Module, graph: ChannelGraph, selection: Selection) -> dict[str, Tensor]:
    """Masks of all parameters of the units that a selection removes.

    Filters, biases, scales and shifts of norms, and the weights that read the units: the elements that are 0
    in the masked network, which a cut one must equal. Running statistics and other buffers get no mask.
    """
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    for family, kept in zip(graph.families, selection.kept, strict=True):
        for place in family.places:
            if bool(kept.all()) or place.role is Role.STATISTIC or place.tensor not in parameters:
                continue
            shape = parameters[place.tensor].shape
            mask = masks.setdefault(place.tensor, torch.ones(shape, dtype=torch.bool))
            mask.index_fill_(place.dim, place.indices[~kept].flatten(), False)
    return masks
