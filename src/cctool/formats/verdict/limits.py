"""Whether the errors of a written model are rounding, judged at every place of every output.

A place is a channel or class (`tally.by_place`). Its error is the root mean square of the differences over
all samples, its signal the standard deviation of the model's values over the samples. Both are means, so
that another draw of samples gives the same verdict; docs/architecture.md says why a fault is larger.

- `quick`: the error is at most a share of the signal, or a few ulps of the channel's largest value.
- `in_float64`: two float32 programs for the same function differ by rounding, which grows with depth and with
  badly scaled statistics. Model and file are both compared with the model in float64.
- `steps.py` judges networks that round, where a difference in the last digit becomes a whole step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cctool.formats.verdict.rounding import (
    Counted,
    Run,
    Shake,
    exact_runner,
    shaken_outputs,
)
from cctool.formats.verdict.samples import Drawn
from cctool.formats.verdict.tally import OutputTally, squares

TOLERANCE = 5e-5
"""Allowed error of a float32 program, as a fraction of the signal; 1e-7 to 5e-6 is usual."""

SHARE = 1e-3
"""The same where activations are rounded."""

CERTAIN = 3.29
"""Standard errors between an error and its limit: one draw in a thousand is farther off."""

ULPS = 3.0
"""Allowed error in units of the last place of the largest value of the channel."""

DULL_ULPS = 32.0
"""The same where the channel hardly depends on the inputs, so that it cannot be verified anyway."""

_ULP = 2.0**-23  # of a number: at most this share; without the jumps at powers of two

LOST = 0.5
"""Error or limit over signal, from which on a comparison says little: a quarter of the variance."""

COMPARED_INTENDED = "the network with the file's constants"

ROUNDING = 8.0
"""Allowed error over the network's own in float64."""


@dataclass(frozen=True)
class Limit:
    """The place of an output that comes closest to its limit.

    Attributes:
        place: its index.
        error: its root mean square error.
        limit: what is allowed there.
        over: error / limit.
        source: what the limit follows from: tolerance, ulps, float64 or steps.
        signal: the standard deviation of the network's values there.
        dull: the places that do not depend on the inputs clearly more than their limits.
        sensitive: whether some place does.
        compared: what the file was compared with.
    """

    place: int
    error: float
    limit: float
    source: str
    signal: float
    sensitive: bool
    compared: str = "the network"
    dull: tuple[int, ...] = ()

    @property
    def over(self) -> float:
        """Error / limit."""
        return self.error / self.limit if self.limit else (torch.inf if self.error else 0.0)


def floor_of(tally: OutputTally, places: int) -> Tensor:
    """A few ulps of the largest value at each place, [places]."""
    found = tally.magnitudes
    return ULPS * _ULP * (found if len(found) == places else found.amax().expand(places))


def resolution(tally: OutputTally, places: int) -> Tensor:
    """The error at each place that its resolution allows, [places].

    It is `floor_of`; but where that is more than half of the signal, no comparison could fail for a fault
    that matters, and what is left is the rounding of sums of any length.
    """
    floor = floor_of(tally, places)
    return torch.where(floor > LOST * signals_at(tally, places), floor * (DULL_ULPS / ULPS), floor)


def largest_ulp(tally: OutputTally) -> float:
    """A few ulps of the largest value of an output."""
    return ULPS * _ULP * tally.largest


def quick(tally: OutputTally, share: float) -> Limit:
    """Error and limit over all samples, against the network in its own precision."""
    errors = tally.errors.mean(0).sqrt()
    floor = resolution(tally, len(errors))
    found = closest(errors, torch.maximum(share * tally.signals, floor), tally, "tolerance")
    return replace(found, source="ulps") if found.limit <= float(floor[found.place]) else found


def closest(
    errors: Tensor, limits: Tensor, tally: OutputTally, source: str, compared: str = "the network"
) -> Limit:
    """The place whose error is the largest for its limit; both [places]."""
    signals = signals_at(tally, len(errors))
    place = int((errors / limits.clamp(min=1e-300)).nan_to_num(0, torch.inf).argmax())
    telling = (limits <= LOST * signals) & (signals > 0)
    dull = tuple((~telling).nonzero().flatten().tolist())
    values = (float(values[place]) for values in (errors, limits, signals))
    error, limit, signal = values
    return Limit(place, error, limit, source, signal, bool(telling.any()), compared, dull)


def signals_at(tally: OutputTally, places: int) -> Tensor:
    """Signals at each place; where shapes changed, that of the whole output at all of them."""
    signals = tally.signals
    return signals if len(signals) == places else torch.full((places,), tally.signal, dtype=torch.float64)


def certain(tally: OutputTally, share: float) -> bool:
    """Whether another draw of as many samples would hardly give another verdict of `quick`."""
    found = quick(tally, share)
    errors = tally.errors[:, found.place] / max(found.limit, 1e-300) ** 2
    if len(errors) < 2 or not bool(errors.isfinite().all()):
        return bool(errors.isinf().any())
    off = float(errors.std()) / len(errors) ** 0.5
    return bool(abs(float(errors.mean()) - 1) >= CERTAIN * off)


def in_float64(
    model: nn.Module, network: Run, tallies: Sequence[OutputTally], failing: Iterable[int], drawn: Drawn
) -> dict[int, Limit]:  # fmt: skip
    """Errors of failing outputs against the model in float64; a few times the model's own are allowed.

    Sigmoids near 0 are right to the last place of 1 in runtimes, and to their own in torch.

    Without float64, because a dtype is written into the network's code, the model's own error is how far it
    moves when its inputs change by an ulp.
    """
    # One sample at a time: a network whose results depend on the batch size would hide behind its own error.
    samples, found = drawn.samples, drawn.found
    expected = Counted(network, single=True)(samples)
    compared = "the network in float64"
    try:
        exact = Counted(exact_runner(model), single=True)(samples)
        own = [expected, Counted(exact_runner(model, loosely=True), single=True)(samples)]
    except Exception:  # a dtype written into the network's code
        exact, compared = expected, "the network"
        own = list(shaken_outputs(model, network, samples, Shake(0.0, 2.0**-23)))
    limits = {}
    for i in failing:
        if exact[i].shape != expected[i].shape:
            continue
        tally, n = tallies[i], len(samples)
        errors = squares(exact[i], found[i], n).mean(0).sqrt()
        ours = torch.stack([squares(exact[i], run[i], n).mean(0).sqrt() for run in own]).amax(0)
        floor = floor_of(tally, len(errors))
        # Where the inputs hardly matter, a place's own error is one draw: the others say what is usual.
        allowed = ROUNDING * torch.maximum(ours, usual(ours, floor))
        signals = signals_at(tally, len(errors))
        allowed = torch.stack((allowed, resolution(tally, len(errors)), TOLERANCE * signals)).amax(0)
        limits[i] = closest(errors, allowed, tally, "float64", compared)
    return limits


def usual(values: Tensor, sizes: Tensor) -> Tensor:
    """What is usual at a place of its size: the median share, so that no single place decides for others."""
    known = sizes > 0
    if not bool(known.any()):
        return torch.zeros_like(values)
    return (values[known] / sizes[known]).median() * sizes
