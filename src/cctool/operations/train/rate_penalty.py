"""The rate (bits a value) of coded feature maps as a penalty in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from cctool.base.errors import UsageError
from cctool.training.constraints.base import Constraint
from cctool.transforms.codec.taps import Rates, collecting_rates, taps_of


class RatePenalty(Constraint):
    """``weight * bits``: estimated bits per value of all maps that the taps coded in this step.

    Args:
        rates: of the network that is trained.
        weight: above 0, in units of the loss per bit per value.
    """

    name = "rate"

    def __init__(self, rates: Rates, weight: float) -> None:
        self._rates = rates
        self._weight = weight

    def penalty(self) -> Tensor | None:
        """The weighted rate, a scalar; None if no map of this step has a gradient."""
        found = self._rates.per_element()
        return None if found is None else self._weight * found


@contextmanager
def rate_penalties(model: nn.Module, weight: float) -> Iterator[Sequence[Constraint]]:
    """The penalty of ``--rate-weight``, for a training within the block; none if the weight is 0.

    Raises:
        UsageError: if the network has no taps.
    """
    if not weight:
        yield ()
        return
    refuse_rate_without_taps(model, weight)
    with collecting_rates(model) as rates:
        yield (RatePenalty(rates, weight),)


def refuse_rate_without_taps(model: nn.Module, weight: float) -> None:
    """Raise UsageError for ``--rate-weight`` without coded feature maps."""
    if weight and not taps_of(model):
        raise UsageError(
            f"--rate-weight {weight:g}: the network has no coded feature maps; "
            "`cctool transform --target features` puts codecs behind its modules"
        )
