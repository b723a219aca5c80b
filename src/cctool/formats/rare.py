"""Faults that move few of the samples, told from steps of a network that rounds.

A step is rare but large, so `steps.py` leaves samples with large errors out, and with them a fault in a
channel that few inputs reach. Its samples are more than steps explain, and float64 sides with the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cctool.formats.rounding import MOST, chance_of

_LARGE = 4.0  # limits: the limit is one of root mean squares, and rounding alone has no tails as long
_WORSE = 4.0  # times as many samples are expected to step as a further trial would move for the first time
_ALWAYS = 0.02  # of the samples, which are expected to
_UNLIKELY = 1e-3  # significance level of their number
_ONE_SIDED = 0.01  # the same, of float64 taking the network's side


@dataclass(frozen=True)
class Off:
    """Samples at which an output is far off although no trial moved them.

    Args:
        errors: mean square errors, [samples, places].
        moved: mean square movements by rounding, [trials, samples, places].
        allowed: root mean square error that is allowed, [places].
    """

    errors: Tensor
    moved: Tensor
    allowed: Tensor

    @property
    def which(self) -> Tensor:
        """Bool [samples, places]."""
        quiet = self.moved.amax(0).sqrt() <= self.allowed
        return quiet & (self.errors.sqrt() > _LARGE * self.allowed)

    def place(self) -> int | None:
        """The place with more of these samples than steps explain, the least explained one; None if none is.

        How many samples a further trial would move for the first time is estimated from those that exactly
        one trial moved (Good 1953, eq. 9).
        """
        stepped = (self.moved.sqrt() > self.allowed).sum(0)
        first = (stepped == 1).sum(0) / len(self.moved)
        expected = _WORSE * first + _ALWAYS * len(self.errors)
        counts = self.which.sum(0).double()
        chances = torch.where(counts > 0, torch.special.gammainc(counts.clamp(min=1), expected.double()), 1.0)
        place = int(chances.argmin())
        return place if float(chances[place]) < _UNLIKELY else None

    def fault(self, wanted: Tensor, exact: Callable[[Tensor], Tensor | None]) -> tuple[int, float] | None:
        """Place and root mean square error of a fault at these samples; None if it may be steps.

        Of two programs that round alike, each makes half of the steps that only one of them makes.

        Args:
            wanted: what the network makes at each place, [samples, places, values of each].
            exact: gives the same in float64 for some samples; None if that is not known.
        """
        place = self.place()
        if place is None:
            return None
        off = self.which[:, place].nonzero().flatten()
        asked = off[:MOST]
        values = exact(asked)
        if values is None:
            return None
        apart = (values[:, place] - wanted[asked, place]).square().mean(1).sqrt()
        sided = int((apart <= self.allowed[place]).sum())
        if chance_of(sided, len(asked), 0.5) >= _ONE_SIDED:
            return None
        return place, float(self.errors[off, place].mean().sqrt())


@dataclass(frozen=True)
class Tail:
    """The samples with the largest errors of all, a fault in what one input in hundreds reaches among them.

    Args:
        errors: root mean square errors, [samples, places].
        allowed: what no step moves a sample by, [places].
    """

    errors: Tensor
    allowed: Tensor

    def fault(self, wanted: Tensor, exact: Callable[[Tensor], Tensor | None]) -> tuple[int, float] | None:
        """Place and root mean square error of a fault at such samples; None if float64 does not say so.

        Args:
            wanted: what the network makes at each place, [samples, places, values of each].
            exact: gives the same in float64 for some samples; None if that is not known.
        """
        over = (self.errors / self.allowed.clamp(min=1e-300)).nan_to_num(0, torch.inf)
        place = int(over.amax(0).argmax())
        off = (over[:, place] > 1).nonzero().flatten()
        values = exact(off) if len(off) else None
        if values is None:
            return None
        apart = (values[:, place] - wanted[off, place]).square().mean(1).sqrt()
        with_network = apart <= self.errors[off, place] / 2
        if 2 * int(with_network.sum()) <= len(off):
            return None
        return place, float(self.errors[off, place].square().mean().sqrt())
