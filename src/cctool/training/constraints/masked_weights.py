"""Masked weights stay exactly zero, whatever state the optimizer has for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cctool.checkpoint.edits.mask import MaskedPlace, masked_places
from cctool.training.constraints.base import Constraint


def keeping_masks(model: nn.Module) -> tuple[Constraint, ...]:
    """The constraint that keeps a network's masks; none if it has no masks."""
    places = tuple(masked_places(model))
    return (KeepMasks(places),) if places else ()


class KeepMasks(Constraint):
    """Zeroes masked gradients before they are clipped, and masked weights after the step.

    Without gradients, momentum and decay leave a zero weight at zero. But an optimizer that has state from
    before the mask, or that adds noise, would revive it, so the weights are zeroed as well.

    Args:
        places: masked parameters. Their tensors are looked up at each step, because a model that is moved to
            another device gets new buffers.
    """

    name = "masks"

    def __init__(self, places: Sequence[MaskedPlace]) -> None:
        self._places = places
        self._gone: dict[str, Tensor] = {}

    def epoch(self, epoch: int) -> None:
        """Invert the masks once; they do not change during an epoch."""
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
