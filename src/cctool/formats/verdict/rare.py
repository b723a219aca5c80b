"""Faults that move few of the samples, told from steps of a network that rounds.

A step is rare but large, so `steps.py` leaves samples with large errors out, and with them a fault in what
few inputs reach. Here all samples are looked at that are far off. Steps explain them where small changes move
the network itself there, and not where float64 sides with the network each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cctool.formats.verdict.rounding import MOST, chance_of

_LARGE = 4.0  # limits: the limit is one of root mean squares, and rounding alone has no tails as long
_FARTHER = 4.0  # times what steps move a sample by at most
_ONE_SIDED = 0.07  # significance level of float64 taking the network's side
_HALF = 0.5  # of the steps that only one of two programs makes are made by either


@dataclass(frozen=True)
class Far:
    """Samples at which an output is far off.

    Args:
        errors: root mean square errors at each place of all samples, [samples, places].
        allowed: by which a place may be off, [places].
        most: samples that are looked at.
    """

    errors: Tensor
    allowed: Tensor
    most: int = 2 * MOST

    @property
    def samples(self) -> Tensor:
        """Their indices, the farthest first."""
        over = (self.errors / self.allowed.clamp(min=1e-300)).nan_to_num(0, torch.inf).amax(1)
        order = over.argsort(descending=True, stable=True)[: self.most]
        return order[over[order] > _LARGE]

    def fault(
        self, fine: Tensor, coarse: Tensor, limits: Tensor, sides: Callable[[Tensor, int], Tensor | None]
    ) -> tuple[int, float] | None:
        """Place and root mean square error of a fault at these samples; None if it may be steps.

        Args:
            fine: how far changes that no float32 program can be held to move the network at these samples,
                [trials, samples, places], root mean square.
            coarse: the same for changes that no integer runtime can be held to, at any samples.
            limits: that hold whatever steps do, [places].
            sides: tells for some of these samples and a place how far the network is from itself in float64;
                None if that is not known.
        """
        errors = self.errors[self.samples]
        quiet = (errors > _LARGE * self.allowed) & (fine.amax(0) <= self.allowed)
        steps = torch.maximum(fine.amax((0, 1)), coarse.amax((0, 1)))
        beyond = errors > torch.maximum(_FARTHER * steps, limits)
        for which, certain in ((quiet, _ONE_SIDED), (beyond, _HALF)):
            place = int(which.sum(0).max(0).indices)
            asked = which[:, place].nonzero().flatten()[:MOST]
            apart = sides(asked, place) if len(asked) else None
            if apart is None:
                continue
            sided = int((apart <= errors[asked, place] / 2).sum())
            if chance_of(sided, len(asked), _HALF) <= certain:
                return place, float(errors[asked, place].square().mean().sqrt())
        return None
