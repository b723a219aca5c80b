"""Learning-rate schedules against torch's own schedulers."""

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
)

from cctool.options.train.fit import FitOptions, Schedule, Warmup
from cctool.training.lr_schedules import SCHEDULES, WARMUPS, multiplier

EPOCHS, PER_EPOCH = 6, 5
STEPS = EPOCHS * PER_EPOCH


def ours(steps: int = STEPS, floor: float = 0.0, **options: Any) -> list[float]:
    settings = FitOptions(epochs=EPOCHS, **options)
    return [multiplier(step, PER_EPOCH, settings, floor) for step in range(steps)]


def torchs(kind: Any, steps: int = STEPS, every: int = 1, **arguments: Any) -> list[float]:
    """What torch's scheduler gives at each step, stepped once every so many."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = kind(optimizer, **arguments)
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return rates


def test_tables_cover_their_enums() -> None:
    assert set(SCHEDULES) == set(Schedule)
    assert set(WARMUPS) == set(Warmup)


def test_constant_stays() -> None:
    assert ours(schedule=Schedule.CONSTANT) == [1.0] * STEPS


@pytest.mark.parametrize("gamma", [None, 0.3])
def test_multistep_equals_torch(gamma: float | None) -> None:
    expected = torchs(MultiStepLR, every=PER_EPOCH, milestones=[2, 4], gamma=gamma or 0.1)
    found = ours(schedule=Schedule.MULTISTEP, milestones=(2, 4), lr_gamma=gamma)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_cosine_equals_torch(floor: float) -> None:
    expected = torchs(CosineAnnealingLR, T_max=STEPS, eta_min=floor)
    assert ours(floor=floor, schedule=Schedule.COSINE) == pytest.approx(expected)


@pytest.mark.parametrize("power", [None, 0.9, 2.0])
def test_poly_equals_torch(power: float | None) -> None:
    expected = torchs(PolynomialLR, total_iters=STEPS, power=power or 1.0)
    assert ours(schedule=Schedule.POLY, power=power) == pytest.approx(expected)


def test_poly_ends_at_its_floor() -> None:
    found = ours(steps=STEPS + 1, floor=0.25, schedule=Schedule.POLY)
    assert found[0] == 1
    assert found[-1] == pytest.approx(0.25)


@pytest.mark.parametrize("share", [None, 0.5])
def test_onecycle_equals_torch(share: float | None) -> None:
    expected = torchs(
        OneCycleLR, max_lr=1.0, total_steps=STEPS + 1, pct_start=share or 0.3, cycle_momentum=False
    )
    settings = FitOptions(epochs=1, schedule=Schedule.ONECYCLE, onecycle_warm=share)
    # torch counts one step more than it takes: its first rate is that of no step.
    found = [multiplier(step, STEPS + 1, settings) for step in range(STEPS)]
    assert found == pytest.approx(expected)


def test_linear_warmup_equals_torch() -> None:
    warm = 2 * PER_EPOCH
    expected = torchs(LinearLR, steps=warm, start_factor=1 / warm, total_iters=warm - 1)
    found = ours(schedule=Schedule.CONSTANT, warmup_epochs=2)
    assert found[:warm] == pytest.approx(expected)
    assert found[warm:] == [1.0] * (STEPS - warm)


def test_exponential_warmup_grows_fourfold_from_a_1024th() -> None:
    found = ours(schedule=Schedule.CONSTANT, warmup=Warmup.EXPONENTIAL)
    starts = found[::PER_EPOCH]
    assert starts == [1 / 1024, 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1]
    assert all(found[step] == starts[step // PER_EPOCH] for step in range(STEPS))


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("warmup", list(Warmup))
def test_the_schedule_begins_when_the_warmup_ends(schedule: Schedule, warmup: Warmup) -> None:
    extra: dict[str, Any] = {"milestones": (1, 2)} if schedule is Schedule.MULTISTEP else {}
    warmed = ours(schedule=schedule, warmup=warmup, warmup_epochs=2, **extra)
    alone = [
        multiplier(step, PER_EPOCH, FitOptions(epochs=EPOCHS - 2, schedule=schedule, **extra))
        for step in range(STEPS - 2 * PER_EPOCH)
    ]
    assert warmed[2 * PER_EPOCH :] == pytest.approx(alone)
    assert warmed[0] < alone[0]
    assert max(warmed[: 2 * PER_EPOCH]) <= alone[0] + 1e-12
