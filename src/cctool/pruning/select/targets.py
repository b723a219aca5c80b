"""How much must go for the network to cost no more than a limit: bisection on the true counter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cctool.base.errors import PruningError
from cctool.pruning.select.order import Order

_NEAR = 0.005
_MOST_OTHERS = 24
_ROUNDS = 3


@dataclass(frozen=True)
class TriedCut:
    """One network that a search looked at.

    Attributes:
        removed: units of the order that went, before widths were rounded.
        cost: what it costs, in the target's own unit.
    """

    removed: int
    cost: float


@dataclass(frozen=True)
class Reached:
    """Where a search ended.

    Attributes:
        counts: kept units of each family, by its number, of the network that was chosen.
        chosen: that network, which costs no more than the limit.
        above: the one with a unit less removed, which costs more; None where nothing had to go.
        trials: all that were looked at, in order.
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

    Where the last of them overshoots the limit by more than a two-hundredth of the dense cost, the next unit
    of another family (or as many as rounding takes at a time) goes in its place, or a few such, if that
    lands nearer.

    Args:
        ordered: the units that may go, from the first to the last.
        cost: of the network with these kept counts; it must not grow when more units go.
        limit: what it may cost.
        what: the target in words, for the error.
        grains: units of which a family's kept count is a multiple, by its number; 1 where it is not named.

    Raises:
        PruningError: even without all of them it costs more.
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
        # nearest of those that still cost too much: one step more may do
        base = above
    return Reached(counts, high, low, tuple(trials))


def _others(
    ordered: Order, removed: int, before: Mapping[int, int], grains: Mapping[int, int]
) -> Iterator[dict[int, int]]:
    """Counts with one step more gone than `before`, of each family that comes after the first `removed`."""
    ahead = ordered.owners[removed + 1 :].tolist()
    least = ordered.counts(len(ordered.owners))
    for number in list(dict.fromkeys(ahead))[:_MOST_OTHERS]:
        grain = grains.get(number, 1)
        fewer = (math.ceil(before[number] / grain) - 1) * grain
        if fewer >= least[number]:
            yield {**before, number: fewer}
