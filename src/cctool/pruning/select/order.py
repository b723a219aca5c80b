"""Which units are removed: the lowest scores first, as many as a rate, a table of rates or a search says.

Rates and searches all follow one `Order`: every unit that may be removed, from the first to the last. Equal
scores are ordered by position within the family, relative to its size, so that all families shrink alike,
and then by family. So exactly k units are removed, and always the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from cctool.base.networks import some
from cctool.base.patterns import refuse_unmatched
from cctool.graph.ledger import Role
from cctool.graph.records import ChannelGraph, Family
from cctool.options.prune.choices import Scope
from cctool.options.prune.options import AUTO_ROUND, PruneOptions
from cctool.pruning.scores.criteria import Unscored

FUZZ = 1e-9  # added before rounding down: 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True)
class Selection:
    """Which units stay.

    Attributes:
        kept: for each family of the graph a mask of its units; shape [units], True stays.
        spared: families that were not allowed to lose units, by name, with the reason.
    """

    kept: tuple[Tensor, ...]
    spared: Mapping[str, str]

    def removed_units(self) -> int:
        """How many units go."""
        return sum(int((~mask).sum()) for mask in self.kept)


@dataclass(frozen=True)
class Candidates:
    """The families that may lose units.

    Attributes:
        scores: one score per unit, by number of the family.
        least: least number of units to keep, by number of the family.
        spared: why each of the other families keeps its width, by name.
    """

    scores: Mapping[int, Tensor]
    least: Mapping[int, int]
    spared: Mapping[str, str]

    @property
    def units(self) -> int:
        """Units of all candidates together."""
        return sum(map(len, self.scores.values()))


@dataclass(frozen=True)
class Order:
    """Units that may be removed, from the first to the last.

    Attributes:
        owners: for each place in the order the number of the family that loses a unit; within a family the
            lowest score is first.
        sizes: number of units of each family.
    """

    owners: Tensor
    sizes: Mapping[int, int]

    def counts(self, removed: int) -> dict[int, int]:
        """Number of kept units of each family when the first `removed` units of the order are removed."""
        lost = torch.bincount(self.owners[:removed], minlength=max(self.sizes, default=0) + 1).tolist()
        return {number: size - lost[number] for number, size in self.sizes.items()}


def names_of(family: Family) -> set[str]:
    """Names by which a pattern finds a family: its own, its tensors', and those of the modules around them.

    Modules that only read the channels are not included: their own width does not change.
    """
    names = {family.name}
    for place in family.places:
        if place.role is not Role.CONSUMER:
            names.update(around(place.tensor))
    return names


def around(name: str) -> list[str]:
    """A tensor's qualified name, after those of the modules around it, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def matching(model: nn.Module, graph: ChannelGraph, patterns: Sequence[str]) -> set[int]:
    """Numbers of the families that a glob pattern matches.

    Raises:
        UsageError: a pattern matches no parameter, module or family of the model.
    """
    known = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_modules()}
    known |= {family.name for family in graph.families}
    refuse_unmatched(patterns, known, "parameter, module or family")
    return {
        number
        for number, family in enumerate(graph.families)
        if any(fnmatchcase(name, pattern) for name in names_of(family) for pattern in patterns)
    }


def idle_patterns(graph: ChannelGraph, options: PruneOptions) -> tuple[str, ...]:
    """A note for each pattern of ``--only`` and ``--exclude`` that names something, but no family."""
    named = set().union(*map(names_of, graph.families)) if graph.families else set()
    return tuple(
        f"{flag} {pattern} changes nothing: what it names has no channels of its own that could go"
        for flag, patterns in (("--only", options.only), ("--exclude", options.exclude))
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in named)
    )


def arbitrary_choices(graph: ChannelGraph, chosen: Candidates, selection: Selection) -> tuple[str, ...]:
    """A note if families lose some of their units, all of which have the same score."""
    equal = [
        graph.families[number].name
        for number, score in chosen.scores.items()
        if len(score) > 1 and not bool(selection.kept[number].all()) and bool((score == score[0]).all())
    ]
    if not equal:
        return ()
    return (
        f"which channels go is arbitrary in {some(equal)}: all have the same score; another --method, or "
        "training first (slimming: --gamma-l1 or --sparsify), tells them apart",
    )


def candidates(
    model: nn.Module,
    graph: ChannelGraph,
    scores: Sequence[Tensor | Unscored],
    options: PruneOptions,
    spared: Mapping[str, str] | None = None,
) -> Candidates:
    """Find the families that may lose units.

    Args:
        model: for the names of its modules.
        graph: its coupled channels.
        scores: of each family, as `score_families` returns them.
        options: patterns and least widths.
        spared: families that must not be cut, by name, with the reason.

    Raises:
        UsageError: a pattern matches nothing.
    """
    reasons = dict(spared or {})
    excluded = matching(model, graph, options.exclude)
    chosen = matching(model, graph, options.only) if options.only else set(range(len(graph.families)))
    found: dict[int, Tensor] = {}
    least: dict[int, int] = {}
    for number, (family, score) in enumerate(zip(graph.families, scores, strict=True)):
        fewest = max(1, math.ceil(options.min_channels / family.width))
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
        elif fewest >= family.units:
            reasons[family.name] = f"has {family.units * family.width} channels, no more than --min-channels"
        else:
            found[number], least[number] = score, fewest
    return Candidates(found, least, reasons)


def order(chosen: Candidates, scope: Scope) -> Order:
    """Order all units that may be removed.

    Global: by score, whatever the family. Local: all families at the same rate, so that the first k units are
    floor(rate * units) of each family for some rate, as nearly as k allows.
    """
    sizes = {number: len(score) for number, score in chosen.scores.items()}
    if not sizes:
        return Order(torch.zeros(0, dtype=torch.int64), sizes)
    orders = {n: _ranked(score)[: len(score) - chosen.least[n]] for n, score in chosen.scores.items()}
    numbers = torch.tensor(list(orders))
    owners = torch.repeat_interleave(numbers, torch.tensor([len(ranked) for ranked in orders.values()]))
    if scope is Scope.LOCAL:
        # The rate at which a family loses its j-th unit.
        keys = [
            torch.tensor([j / sizes[n] for j in range(1, len(ranked) + 1)], dtype=torch.float64)
            for n, ranked in orders.items()
        ]
        return Order(owners[torch.sort(torch.cat(keys), stable=True).indices], sizes)
    values = torch.cat([chosen.scores[n][ranked] for n, ranked in orders.items()])
    # Stable sorts, first by position, then by score: equal scores keep the order of positions.
    places = torch.cat([ranked / sizes[n] for n, ranked in orders.items()])
    by_place = torch.sort(places, stable=True).indices
    return Order(owners[by_place[torch.sort(values[by_place], stable=True).indices]], sizes)


def by_options(
    graph: ChannelGraph,
    chosen: Candidates,
    options: PruneOptions,
    step: int = 1,
    rates: Mapping[int, float] | None = None,
) -> dict[int, int]:
    """Number of kept units of each candidate by `rate`, `keep` or a table of rates, before rounding.

    Args:
        graph: the coupled channels.
        chosen: families that may lose units.
        options: rate, keep, scope.
        step: number of the step, from 1; sets the rate of this step.
        rates: rate of each family by its number, from a table; other families keep their width.
    """
    sizes = {number: len(score) for number, score in chosen.scores.items()}
    keep = options.keep_at(step)
    if keep is not None:  # a share of the channels, of which a unit may hold several
        widths = {number: graph.families[number].width for number in sizes}
        return {n: int(size * widths[n] * keep + FUZZ) // widths[n] for n, size in sizes.items()}
    if rates is not None:
        reached = {n: options.rate_at(step, rates.get(n, 0.0)) for n in sizes}
        return {n: size - math.floor(reached[n] * size + FUZZ) for n, size in sizes.items()}
    rate = options.rate_at(step)
    if options.effective_scope is Scope.LOCAL:
        return {number: size - math.floor(rate * size + FUZZ) for number, size in sizes.items()}
    return order(chosen, Scope.GLOBAL).counts(math.floor(rate * sum(sizes.values()) + FUZZ))


def select_counts(
    graph: ChannelGraph, chosen: Candidates, counts: Mapping[int, int], options: PruneOptions
) -> Selection:
    """Keep the best `counts[number]` units of each candidate, rounded up as asked, and all other families."""
    kept = []
    for number, family in enumerate(graph.families):
        mask = torch.ones(family.units, dtype=torch.bool)
        score = chosen.scores.get(number)
        if score is not None:
            count = _rounded(max(chosen.least[number], counts[number]), family, options)
            mask[_ranked(score)[: family.units - count]] = False
        kept.append(mask)
    return Selection(tuple(kept), chosen.spared)


def _ranked(score: Tensor) -> Tensor:
    """Units from the first to be removed to the last."""
    return torch.sort(score, stable=True).indices


def grain_of(family: Family, options: PruneOptions) -> int:
    """How many units to remove at a time, so that the kept width is a multiple of what was asked for."""
    wanted = options.round_to
    if wanted is None:
        wanted = AUTO_ROUND if family.units * family.width >= AUTO_ROUND else 1
    return wanted // math.gcd(wanted, family.width)


def _rounded(count: int, family: Family, options: PruneOptions) -> int:
    grain = grain_of(family, options)
    return min(family.units, math.ceil(count / grain) * grain)
