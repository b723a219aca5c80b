"""The moving average of weights: its recursion, its place in the network, and what training hands out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cctool.base.errors import CorruptCheckpointError
from cctool.options.train.fit import FitOptions
from cctool.training.averaging import WeightAverage, average_in
from cctool.training.loop.fit import fit
from cctool.training.resume.progress import EpochRow
from training_toys import network, task


def random(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_is_the_recursion_in_double_precision() -> None:
    model = nn.Linear(3, 2).double()
    expected = random(model, 0)
    average = WeightAverage(model, 0.3)
    for step in range(6):
        decay = min(0.3, (1 + step) / (10 + step))
        found = random(model, step + 1)
        expected = {name: decay * expected[name] + (1 - decay) * found[name] for name in found}
        average.update()
    with average.in_place():
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in found.items())


def test_what_never_changes_stays_to_the_last_bit_and_tied_weights_stay_tied() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, nn.BatchNorm1d(4), second)
    with torch.no_grad():
        model[1].running_var.fill_(0.1)
    average = WeightAverage(model, 0.9)
    for _ in range(20):
        with torch.no_grad():
            first.weight.add_(1)
        average.update()
    before = first.weight.clone()
    with average.in_place():
        assert second.weight is first.weight
        assert torch.all(first.weight < before)
        assert torch.equal(model[1].running_var, torch.full((4,), 0.1))
    assert torch.equal(first.weight, before)


def states(**options: Any) -> tuple[dict[str, torch.Tensor], list[EpochRow]]:
    model, rows = network(), []
    torch.manual_seed(1)
    asked = FitOptions(**{"epochs": 2, "optimizer": "sgd", "lr": 0.05, **options})
    fit(task(model, options=asked, observers=[lambda row, bare: rows.append(row)]))
    return model.state_dict(), rows


def test_training_hands_out_and_validates_the_average() -> None:
    plain, plain_rows = states()
    averaged, rows = states(ema=0.9)
    assert [row.train["loss"] for row in rows] == [row.train["loss"] for row in plain_rows]
    assert [row.validation["loss"] for row in rows] != [row.validation["loss"] for row in plain_rows]
    assert any(not torch.equal(plain[name], value) for name, value in averaged.items())


def test_the_handed_out_weights_are_those_of_a_loop_by_hand() -> None:
    """Without validation the last epoch counts: the average over every step that was taken."""
    model, seen = network(), []

    class Watched(WeightAverage):
        def update(self) -> None:
            super().update()
            seen.append({name: value.clone() for name, value in self._tensors()})

    asked = FitOptions(epochs=2, optimizer="sgd", lr=0.05, ema=0.7)
    start = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cctool.training.loop.fit.WeightAverage", Watched)
        fit(task(model, options=asked, validate=None))
    expected = start
    for step, weights in enumerate(seen):
        decay = min(0.7, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in weights}
    assert len(seen) > 4
    for name, value in expected.items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_a_state_comes_back_and_a_broken_one_is_refused() -> None:
    model = network()
    average = WeightAverage(model, 0.9)
    random(model, 1)
    average.update()
    state = average.state()
    fresh = WeightAverage(model, 0.9)
    fresh.restore(state)
    assert fresh.steps == 1
    assert all(torch.equal(value, state[f"average/{name}"]) for name, value in average_in(state).items())
    for broken in (
        {},
        {**state, "average/steps": torch.tensor(-1)},
        {**state, "average/steps": torch.ones(2)},
    ):
        with pytest.raises(CorruptCheckpointError):
            WeightAverage(model, 0.9).restore(broken)
    name = next(iter(average_in(state)))
    with pytest.raises(CorruptCheckpointError, match="of its shape"):
        WeightAverage(model, 0.9).restore({**state, f"average/{name}": torch.zeros(3, 3, 3)})
