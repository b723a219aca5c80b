"""Which units go: a fraction of the removable ones, the lowest scores first.

Ties are broken by position within the family (relative to its size, so that equal scores thin all families
alike), then by the order of the families: exactly k units go, and always the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from cctool.errors import UsageError
from cctool.graph.channels import ChannelGraph, Family
from cctool.graph.ledger import Role
from cctool.options.prune import AUTO_ROUND, PruneOptions, Scope
from cctool.pruning.scores import ScoreContext, Unscored, score_families

_FUZZ = 1e-9  # 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True)
class Selection:
    """Which units stay.

    Attributes:
        kept: for each family of the graph a mask of its units; shape [units], True stays.
        spared: why a family lost nothing, by its name.
    """

    kept: tuple[Tensor, ...]
    spared: Mapping[str, str]

    def removed_units(self) -> int:
        """How many units go."""
        return sum(int((~mask).sum()) for mask in self.kept)


def names_of(family: Family) -> set[str]:
    """Names by which a pattern finds a family: its own, its tensors', those of the modules around them.

    A module that only reads the channels is not among them: it keeps its own width anyway.
    """
    names = {family.name}
    for place in family.places:
        if place.role is not Role.CONSUMER:
            parts = place.tensor.split(".")
            names.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return names


def matching(model: nn.Module, graph: ChannelGraph, patterns: Sequence[str]) -> set[int]:
    """Numbers of the families that a glob pattern matches.

    Raises:
        UsageError: a pattern matches no parameter, module or family of the model.
    """
    known = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_modules()}
    known |= {family.name for family in graph.families}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            near = get_close_matches(pattern, sorted(known), n=3, cutoff=0.4)
            hint = f"; near: {', '.join(near)}" if near else "; `cctool analyze` lists the names"
            raise UsageError(f"pattern {pattern!r} matches no parameter, module or family{hint}")
    return {
        number
        for number, family in enumerate(graph.families)
        if any(fnmatchcase(name, pattern) for name in names_of(family) for pattern in patterns)
    }


def select(
    model: nn.Module,
    graph: ChannelGraph,
    options: PruneOptions,
    context: ScoreContext,
    step: int = 1,
    spared: Mapping[str, str] | None = None,
) -> Selection:
    """Choose the units that go.

    Args:
        model: the model, for its names.
        graph: its coupled channels.
        options: method, rate or keep, scope, rounding and patterns.
        context: what the score function looks at.
        step: number of the step, from 1; sets the rate of this step.
        spared: families that must stay as they are, by name, with the reason.

    Raises:
        UsageError: a pattern matches nothing.
        PruningError: a score is not finite.
    """
    reasons = dict(spared or {})
    excluded = matching(model, graph, options.exclude)
    chosen = matching(model, graph, options.only) if options.only else set(range(len(graph.families)))
    scores: dict[int, Tensor] = {}
    found = score_families(graph, options, context)
    for number, family in enumerate(graph.families):
        score = found[number]
        if family.name in reasons:
            continue
        if family.units == 1:
            reasons[family.name] = "a single unit, and one must stay"
        elif number in excluded:
            reasons[family.name] = "excluded"
        elif number not in chosen:
            reasons[family.name] = "not among those asked for"
        elif isinstance(score, Unscored):
            reasons[family.name] = score.reason
        else:
            scores[number] = score
    counts = _counts(graph, scores, options, step)
    return Selection(
        tuple(_keep(f, scores.get(n), counts.get(n)) for n, f in enumerate(graph.families)), reasons
    )


def select_counts(graph: ChannelGraph, scores: Mapping[int, Tensor], counts: Mapping[int, int]) -> Selection:
    """Keep the best `counts[number]` units of each family numbered there, and all of the others."""
    kept = tuple(_keep(f, scores.get(n), counts.get(n)) for n, f in enumerate(graph.families))
    return Selection(kept, {})


def _order(score: Tensor) -> Tensor:
    """Units from the first to go to the last."""
    return torch.sort(score, stable=True).indices


def _keep(family: Family, score: Tensor | None, count: int | None) -> Tensor:
    mask = torch.ones(family.units, dtype=torch.bool)
    if score is not None and count is not None:
        mask[_order(score)[: family.units - count]] = False
    return mask


def _counts(
    graph: ChannelGraph, scores: Mapping[int, Tensor], options: PruneOptions, step: int
) -> dict[int, int]:
    """How many units each family keeps."""
    sizes = {number: len(score) for number, score in scores.items()}
    keep, rate = options.keep_at(step), options.rate_at(step)
    if keep is not None:
        widths = {number: graph.families[number].width for number in sizes}
        counts = {n: int(size * widths[n] * keep + _FUZZ) // widths[n] for n, size in sizes.items()}
    elif options.effective_scope is Scope.LOCAL:
        counts = {number: size - math.floor(rate * size + _FUZZ) for number, size in sizes.items()}
    else:
        counts = _global_counts(scores, math.floor(rate * sum(sizes.values()) + _FUZZ))
    return {n: _round_up(max(1, count), sizes[n], graph.families[n], options) for n, count in counts.items()}


def _global_counts(scores: Mapping[int, Tensor], remove: int) -> dict[int, int]:
    """Kept counts when the `remove` lowest units of all families go, each family's best one apart."""
    if not scores:
        return {}
    numbers = list(scores)
    orders = [_order(scores[n])[:-1] for n in numbers]
    values = torch.cat([scores[n][order] for n, order in zip(numbers, orders, strict=True)])
    places = torch.cat([order / len(scores[n]) for n, order in zip(numbers, orders, strict=True)])
    owners = torch.repeat_interleave(
        torch.arange(len(numbers)), torch.tensor([len(order) for order in orders])
    )
    by_place = torch.sort(places, stable=True).indices
    ranked = by_place[torch.sort(values[by_place], stable=True).indices]
    lost = torch.bincount(owners[ranked[:remove]], minlength=len(numbers)).tolist()
    return {n: len(scores[n]) - gone for n, gone in zip(numbers, lost, strict=True)}


def _round_up(count: int, size: int, family: Family, options: PruneOptions) -> int:
    wanted = options.round_to or AUTO_ROUND
    grain = wanted // math.gcd(wanted, family.width)
    return min(size, math.ceil(count / grain) * grain)
