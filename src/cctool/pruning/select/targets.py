"""The fewest units to remove so that the network costs no more than a limit: bisection on the exact cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cctool.base.errors import PruningError
from cctool.pruning.select.order import Order

_NEAR = 0.005  # of the dense cost: a cost this little below the limit is not improved further
_MOST_OTHERS = 24  # families tried in place of the last one, per round
_ROUNDS = 3


@dataclass(frozen=True)
class TriedCut:
    """One network that a search tried.

    Attributes:
        removed: number of removed units, before widths were rounded.
        cost: in the unit of the target.
    """

    removed: int
    cost: float


@dataclass(frozen=True)
class Reached:
    """Result of a search.

    Attributes:
        counts: kept units of each family of the chosen network, by the family's number.
        chosen: that network, which costs no more than the limit.
        above: the one with one unit less removed, which costs more; None if nothing had to be removed.
        trials: all networks tried, in order.
    """

    counts: Mapping[int, int]
    chosen: TriedCut
    above: TriedCut | None
    trials: tuple[TriedCut, ...]


def fewest_removed(
    ordered: Order,
    cost: Callable[[Mapping[int, int]], float],
    limit: float,
    what: str,
    grains: Mapping[int, int] | None = None,
) -> Reached:
    """Find the smallest number of units whose removal brings the cost to the limit or below.

    If that lands below the limit by more than 0.5 % of the dense cost, units of other families (as many as
    rounding takes at a time) are removed instead of the last one, if that comes closer.

    Args:
        ordered: the units that may be removed, from the first to the last.
        cost: of the network with these kept counts; it must not grow when more units are removed.
        limit: largest allowed cost.
        what: the target in words, for the error.
        grains: number by family of which its kept count must be a multiple; 1 for families not named.

    Raises:
        PruningError: the network costs more even without all of these units.
    """
    trials: list[TriedCut] = []

    def seen(removed: int, counts: Mapping[int, int]) -> TriedCut:
        trials.append(TriedCut(removed, cost(counts)))
        return trials[-1]

    def look(removed: int) -> TriedCut:
        return seen(removed, ordered.counts(removed))

    low, high = look(0), None
    if low.cost <= limit:
        return Reached(ordered.counts(0), low, None, tuple(trials))
    dense = low.cost
    high = look(len(ordered.owners))
    if high.cost > limit:
        raise PruningError(
            f"{what} cannot be reached: the network costs {low.cost:,.0f} now, and {high.cost:,.0f} "
            f"({high.cost / low.cost:.1%}) with all gone that may go; frozen and excluded widths, --round-to "
            "and --min-channels keep the rest"
        )
    # `low` costs too much, `high` does not, whatever is between.
    while high.removed - low.removed > 1:
        middle = look((low.removed + high.removed) // 2)
        if middle.cost > limit:
            low = middle
        else:
            high = middle
    counts: Mapping[int, int] = ordered.counts(high.removed)
    base = ordered.counts(low.removed)
    for _ in range(_ROUNDS):
        if limit - high.cost <= _NEAR * dense:
            break
        above: dict[int, int] | None = None
        lowest = low.cost
        for other in _others(ordered, low.removed, base, grains or {}):
            trial = seen(sum(ordered.sizes.values()) - sum(other.values()), other)
            if high.cost < trial.cost <= limit:
                high, counts = trial, other
            elif limit < trial.cost < lowest:
                above, lowest = other, trial.cost
        if above is None:
            break
        # The cheapest that still costs too much: one more step from there may meet the limit.
        base = above
    return Reached(counts, high, low, tuple(trials))


def _others(
    ordered: Order, removed: int, before: Mapping[int, int], grains: Mapping[int, int]
) -> Iterator[dict[int, int]]:
    """Counts with one step less than `before` for each family that comes after the first `removed` units."""
    ahead = ordered.owners[removed + 1 :].tolist()
    least = ordered.counts(len(ordered.owners))
    for number in list(dict.fromkeys(ahead))[:_MOST_OTHERS]:
        grain = grains.get(number, 1)
        fewer = (math.ceil(before[number] / grain) - 1) * grain
        if fewer >= least[number]:
            yield {**before, number: fewer}
