"""Penalties over units against closed formulas, autograd and hand-made schedules."""

import math

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import TrainingError
from cctool.training.constraints.penalties import (
    GroupLasso,
    GrowingPenalty,
    Part,
    ScaleL1,
    growing_coefficient,
)
from cctool.training.objectives import gamma_penalty

UNITS = torch.arange(4).view(4, 1)


def network() -> nn.Sequential:
    """`conv (3 -> 4), bn, conv (4 -> 5), flatten, linear`: one family of four units, and one of five."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 4, 2)
    )
    nn.init.uniform_(model[1].weight, -1, 1)
    return model


def first(model: nn.Sequential) -> list[Part]:
    conv, norm, reader = model[0], model[1], model[2]
    return [
        Part(conv.weight, 0, UNITS),
        Part(conv.bias, 0, UNITS),
        Part(norm.weight, 0, UNITS),
        Part(norm.bias, 0, UNITS),
        Part(reader.weight, 1, UNITS),
    ]


def second(model: nn.Sequential) -> list[Part]:
    """Each of the five units owns four columns of the linear layer behind the flatten."""
    columns = torch.arange(20).view(5, 4)
    return [Part(model[2].weight, 0, torch.arange(5).view(5, 1)), Part(model[4].weight, 1, columns)]


def owned(model: nn.Sequential, unit: int) -> Tensor:
    """All numbers of one unit of the first family, written out."""
    conv, norm, reader = model[0], model[1], model[2]
    pieces = [conv.weight[unit], conv.bias[unit], norm.weight[unit], norm.bias[unit], reader.weight[:, unit]]
    return torch.cat([piece.flatten() for piece in pieces])


def test_scale_l1_is_the_sum_and_its_subgradient() -> None:
    model = network()
    with torch.no_grad():
        model[1].weight[2] = 0.0
    penalty = ScaleL1([Part(model[1].weight, 0, UNITS)], 0.5).penalty()
    assert penalty.item() == pytest.approx(0.5 * sum(abs(g) for g in model[1].weight.tolist()))
    penalty.backward()
    expected = [0.5 * (g > 0) - 0.5 * (g < 0) for g in model[1].weight.tolist()]
    assert model[1].weight.grad.tolist() == expected
    whole = gamma_penalty(model, 0.5)
    assert whole is not None
    assert torch.equal(whole(), penalty)


def test_scale_l1_counts_owned_elements_once_and_no_others() -> None:
    model = network()
    some = [Part(model[1].weight, 0, UNITS[:2]), Part(model[1].weight, 0, UNITS[1:3])]
    expected = model[1].weight[:3].abs().sum().item()
    assert ScaleL1(some, 1.0).penalty().item() == pytest.approx(expected)
    model[1].weight.requires_grad_(False)
    with pytest.raises(TrainingError, match="no batch norm with a trainable scale"):
        ScaleL1(some, 1.0)


def test_group_lasso_is_its_formula() -> None:
    model = network()
    size = 27 + 1 + 1 + 1 + 45
    by_hand = 0.1 * math.sqrt(size) * sum(owned(model, unit).norm() for unit in range(4))
    columns = [
        torch.cat([model[2].weight[u].flatten(), model[4].weight[:, 4 * u : 4 * u + 4].flatten()])
        for u in range(5)
    ]
    by_hand = by_hand + 0.1 * math.sqrt(36 + 8) * sum(column.norm() for column in columns)
    found = GroupLasso([first(model), second(model)], 0.1).penalty()
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-6)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters, allow_unused=True),
        torch.autograd.grad(by_hand, parameters, allow_unused=True),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_group_lasso_has_the_gradient_zero_at_zero() -> None:
    model = network()
    with torch.no_grad():
        for part in first(model):
            part.parameter.index_fill_(part.dim, torch.tensor([1]), 0.0)
    GroupLasso([first(model)], 1.0).penalty().backward()
    for part in first(model):
        gradient = part.parameter.grad
        assert gradient is not None
        assert torch.isfinite(gradient).all()
        assert not gradient.select(part.dim, 1).any()
        assert gradient.select(part.dim, 0).any() or not part.parameter.select(part.dim, 0).any()


def test_growing_acts_on_the_doomed_once() -> None:
    """A weight between two doomed units counts once; the gradient is c * w there and 0 elsewhere."""
    model = network()
    doomed = [torch.tensor([True, False, False, True]), torch.tensor([False, True, False, False, False])]
    penalty = GrowingPenalty([first(model), second(model)], doomed, delta=0.2)
    penalty.penalty().backward()
    reader = torch.zeros(5, 4, dtype=torch.bool)
    reader[:, [0, 3]] = True
    reader[1] = True
    expected = {
        model[0].weight: torch.tensor([True, False, False, True]).view(4, 1, 1, 1),
        model[1].weight: torch.tensor([True, False, False, True]),
        model[2].weight: reader.view(5, 4, 1, 1),
        model[4].weight: torch.tensor([False] * 4 + [True] * 4 + [False] * 12),
    }
    for parameter, mask in expected.items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, 0.2 * parameter * mask)
    assert model[2].bias.grad is None


def test_the_growing_coefficient_follows_its_formula() -> None:
    model = network()
    penalty = GrowingPenalty([first(model)], [torch.ones(4, dtype=torch.bool)], 0.1, every=3, ceiling=0.25)
    squares = sum(owned(model, unit).square().sum() for unit in range(4)).item()
    for step in range(12):
        wanted = min(0.25, 0.1 * (1 + step // 3))
        assert penalty.coefficient == growing_coefficient(step, 0.1, 3, 0.25) == pytest.approx(wanted)
        assert penalty.penalty().item() == pytest.approx(wanted / 2 * squares, rel=1e-6)
        penalty.weights()


@pytest.mark.parametrize("change", [{"delta": 0.2}, {"every": 1}, {"ceiling": 0.15}])
def test_each_setting_changes_the_coefficient(change: dict[str, float]) -> None:
    settings = {"step": 4, "delta": 0.1, "every": 2, "ceiling": 10.0}
    assert growing_coefficient(**settings) != growing_coefficient(**settings | change)


def test_nothing_to_act_on_is_refused() -> None:
    model = network()
    with pytest.raises(TrainingError, match="no unit is to go"):
        GrowingPenalty([first(model)], [torch.zeros(4, dtype=torch.bool)], 0.1)
    with pytest.raises(TrainingError, match="nothing can be cut"):
        GroupLasso([], 0.1)
