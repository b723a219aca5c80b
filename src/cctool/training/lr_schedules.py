"""Learning-rate schedules: pure functions from a step to a multiplier of the base learning rate.

They depend on the step and not on the previous value, so a resumed training run needs only its step. Warm-up
comes first, and the schedule's steps are counted from its end.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from cctool.options.train.fit import FitOptions, Schedule, Warmup


@dataclass(frozen=True)
class Clock:
    """How far a phase, warm-up or schedule, has come.

    Attributes:
        step: steps done since the phase began, from 0.
        total: steps of the whole phase.
        per_epoch: steps of one epoch.
    """

    step: int
    total: int
    per_epoch: int


def constant(clock: Clock, options: FitOptions, floor: float) -> float:
    """Always 1."""
    return 1.0


def multistep(clock: Clock, options: FitOptions, floor: float) -> float:
    """``lr_gamma`` to the power of the number of milestones passed, like torch's MultiStepLR by epochs."""
    passed = bisect.bisect_right(options.milestones, clock.step // clock.per_epoch)
    return float((0.1 if options.lr_gamma is None else options.lr_gamma) ** passed)


def cosine(clock: Clock, options: FitOptions, floor: float) -> float:
    """Half a cosine from 1 to ``floor`` (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5)."""
    return floor + (1 - floor) * (1 + math.cos(math.pi * clock.step / clock.total)) / 2


def poly(clock: Clock, options: FitOptions, floor: float) -> float:
    """``(1 - step / total) ** power`` from 1 to ``floor``."""
    power = 1.0 if options.power is None else options.power
    return floor + (1 - floor) * float((1 - clock.step / clock.total) ** power)


def onecycle(clock: Clock, options: FitOptions, floor: float) -> float:
    """Rise from 1/25 to 1 and fall to 1/250,000 in two half cosines (Smith and Topin 2019, arXiv 1708.07120).

    The same numbers as torch's OneCycleLR with its defaults, except that momentum is not cycled.
    """
    first, last = 1 / 25, 1 / 25 / 1e4
    share = 0.3 if options.onecycle_warm is None else options.onecycle_warm
    # torch counts the peak as step share * total - 1, which may be fractional.
    top = share * clock.total - 1
    if clock.step <= top:
        return _half_cosine(first, 1.0, clock.step / top if top > 0 else 1.0)
    return _half_cosine(1.0, last, (clock.step - top) / (clock.total - 1 - top))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def linear(clock: Clock) -> float:
    """Grow by equal amounts each step and reach 1 at the last one (Goyal et al. 2017, arXiv 1706.02677)."""
    return (clock.step + 1) / clock.total


def exponential(clock: Clock) -> float:
    """Grow fourfold each epoch; over five epochs from 1/1024."""
    return float(4.0 ** (clock.step // clock.per_epoch - clock.total // clock.per_epoch))


SCHEDULES: dict[Schedule, Callable[[Clock, FitOptions, float], float]] = {
    Schedule.CONSTANT: constant,
    Schedule.MULTISTEP: multistep,
    Schedule.COSINE: cosine,
    Schedule.ONECYCLE: onecycle,
    Schedule.POLY: poly,
}

WARMUPS: dict[Warmup, Callable[[Clock], float]] = {Warmup.LINEAR: linear, Warmup.EXPONENTIAL: exponential}


def multiplier(step: int, steps_per_epoch: int, options: FitOptions, floor: float = 0.0) -> float:
    """Multiplier of the base learning rate at a step.

    Args:
        step: optimizer steps done since training began, from 0.
        steps_per_epoch: optimizer steps of one epoch, at least 1.
        options: schedule, warm-up and their lengths.
        floor: multiplier at which ``cosine`` and ``poly`` end.
    """
    warm = options.warmup_length * steps_per_epoch
    total = options.epochs * steps_per_epoch - warm
    schedule = SCHEDULES[options.schedule]
    if step >= warm:
        return schedule(Clock(step - warm, total, steps_per_epoch), options, floor)
    # Up to the schedule's first value, so that one that starts low is reached without a jump.
    start = schedule(Clock(0, total, steps_per_epoch), options, floor)
    return start * WARMUPS[options.warmup or Warmup.LINEAR](Clock(step, warm, steps_per_epoch))
