"""How much must go for the network to cost no more than a limit: bisection on the true counter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from cctool.errors import PruningError
from cctool.pruning.selection import Order
from cctool.pruning.surgery import CutPlan, copy_with

__all__ = ["Reached", "Trial", "fewest_removed", "sketch"]


@dataclass(frozen=True)
class Trial:
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
        chosen: the network that costs no more than the limit, with the fewest units removed.
        above: the next one, which costs more; None where nothing had to go.
        trials: all that were looked at, in order.
    """

    chosen: Trial
    above: Trial | None
    trials: tuple[Trial, ...]


def fewest_removed(
    ordered: Order, cost: Callable[[Mapping[int, int]], float], limit: float, what: str
) -> Reached:
    """Find the smallest number of units whose removal brings the cost to the limit or below.

    Args:
        ordered: the units that may go, from the first to the last.
        cost: of the network with these kept counts; it must not grow when more units go.
        limit: what it may cost.
        what: the target in words, for the error.

    Raises:
        PruningError: even without all of them it costs more.
    """
    trials: list[Trial] = []

    def look(removed: int) -> Trial:
        trial = Trial(removed, cost(ordered.counts(removed)))
        trials.append(trial)
        return trial

    low, high = look(0), None
    if low.cost <= limit:
        return Reached(low, None, tuple(trials))
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
    return Reached(high, low, tuple(trials))


def sketch(model: nn.Module, plan: CutPlan) -> nn.Module:
    """A network of the widths that a plan leaves, for counting: its tensors are views of the dense ones.

    It computes nothing of use, but costs no memory.
    """
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    narrow = {}
    for name, cuts in plan.tensors.items():
        if name in tensors:
            view = tensors[name].detach()
            for cut in cuts:
                view = view.narrow(cut.dim, 0, cut.keep.numel())
            narrow[name] = view
    return copy_with(model, narrow, plan)
