"""Weights that a mask took away stay exactly zero, whatever the optimizer remembers of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cctool.checkpoint.edits.mask import MaskedPlace, masked_places
from cctool.training.constraints.base import Constraint

__all__ = ["KeepMasks", "keeping_masks"]


def keeping_masks(model: nn.Module) -> tuple[Constraint, ...]:
    """What training a network has to respect for its masks: nothing where it has none."""
    places = tuple(masked_places(model))
    return (KeepMasks(places),) if places else ()


class KeepMasks(Constraint):
    """Zeroes masked gradients before they are clipped, and masked weights after the step.

    With no gradient, momentum and decay have nothing to work on; but what an optimizer brings along from
    elsewhere, or adds on its own, would revive a weight, so that weights are zeroed all the same.

    Args:
        places: masked parameters; their tensors are looked up at each step, for a model that is moved to a
            device gets new buffers.
    """

    name = "masks"

    def __init__(self, places: Sequence[MaskedPlace]) -> None:
        self._places = places
        self._gone: dict[str, Tensor] = {}

    def epoch(self, epoch: int) -> None:
        """Note what is gone; masks do not change while training runs."""
        self._gone = {place.name: place.mask.logical_not() for place in self._places}

    def gradients(self) -> None:
        """Zero the gradients of masked weights."""
        for place in self._places:
            if place.parameter.grad is not None:
                place.parameter.grad.masked_fill_(self._gone[place.name], 0)

    def weights(self) -> None:
        """Zero masked weights; called without gradients."""
        for place in self._places:
            place.parameter.masked_fill_(self._gone[place.name], 0)
