"""About how many bits the maps of a network take, as a number that training can lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cctool.transforms.codec.taps import taps_of

__all__ = ["Rates", "collecting_rates"]


class Rates:
    """What taps left of the forward passes since it was last asked."""

    def __init__(self) -> None:
        self.passes: list[tuple[Tensor, int]] = []

    def per_element(self) -> Tensor | None:
        """Bits a value of all taps' maps together, and forget them; None where there was no pass.

        A float32 of no dims: the sum of the taps' bits over that of their elements, so that each tap weighs
        as much as it has values. Its gradient reaches what the maps were computed with.
        """
        passes = list(self.passes)
        self.passes.clear()
        if not passes:
            return None
        return torch.stack([bits for bits, _ in passes]).sum() / sum(elements for _, elements in passes)


@contextmanager
def collecting_rates(model: nn.Module) -> Iterator[Rates]:
    """Let the taps of a network estimate the bits of passes that have gradients; see `training.soft_bits`."""
    found, hooks = Rates(), list(taps_of(model).values())
    for hook in hooks:
        hook.rates = found.passes
    try:
        yield found
    finally:
        for hook in hooks:
            hook.rates = None
