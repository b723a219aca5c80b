"""Fine-tuning of tables against autograd of the tables themselves, and what no optimizer may undo."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import TrainingError
from cctool.checkpoint.edits.mask import add_masks, masks_of
from cctool.options.train.fit import FitOptions
from cctool.training.constraints.masked_weights import keeping_masks
from cctool.training.constraints.shared_entries import KeepCodebooks, SharedWeights
from cctool.training.loop.fit import Training, fit
from cctool.training.objectives import Supervised
from cctool.training.processes import make_fabric
from training_toys import feed, network

CPU = torch.device("cpu")
NAMES = ("0.weight", "5.weight")


def shared_network(*, masks: bool = False, seed: int = 0) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """A network whose weights share four numbers a layer, and which weight has which."""
    model = network(seed)
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    with torch.no_grad():
        for name in NAMES:
            weight = model.get_parameter(name)
            index = torch.randint(0, 4, weight.shape, generator=generator)
            weight.copy_((torch.randn(4, generator=generator) * 0.2)[index])
            if masks:
                mask = torch.rand(weight.shape, generator=generator) < 0.6
                add_masks(model, {name: mask})
                index = index.masked_fill(~mask, -1)
            entries[name] = index
    return model, entries


def constraint(model: nn.Module, entries: dict[str, Tensor]) -> KeepCodebooks:
    return KeepCodebooks([SharedWeights(model.get_parameter(name), index) for name, index in entries.items()])


def task(model: nn.Module, entries: dict[str, Tensor], options: FitOptions, **changes: Any) -> Training:
    return replace(
        Training(
            model=model,
            batches=feed().training(),
            options=options,
            objective=Supervised(),
            lr=options.learning_rate(fresh=True),
            fabric=make_fabric(CPU),
            input_shape=(1, 8, 8),
            constraints=(*keeping_masks(model), constraint(model, entries)),
        ),
        **changes,
    )


def table(weight: Tensor, index: Tensor) -> list[float]:
    """The numbers that weights share; fails where a number is not shared."""
    values = [weight[index == entry].unique() for entry in range(4)]
    assert all(len(found) == 1 for found in values)
    return [float(found) for found in values]


def test_a_step_moves_the_table_by_its_gradient_over_the_number_of_weights() -> None:
    index = torch.tensor([[0, 1, 0], [2, 0, 1]])
    numbers = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    inputs, wanted = torch.randn(5, 3), torch.randn(5, 2)
    (inputs @ numbers[index].T - wanted).square().sum().backward()
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(numbers[index])
    keep = KeepCodebooks([SharedWeights(layer.weight, index)])
    keep.epoch(0)
    (layer(inputs) - wanted).square().sum().backward()
    keep.gradients()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    optimizer.step()
    with torch.no_grad():
        keep.weights()
    assert numbers.grad is not None
    moved = numbers.detach() - 0.01 * numbers.grad / torch.tensor([3.0, 2.0, 1.0])
    torch.testing.assert_close(layer.weight.detach(), moved[index])


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
        {"optimizer": "sgd", "lr": 0.05, "nesterov": True, "clip_norm": 0.1},
        {"optimizer": "adam", "lr": 1e-2},
        {"optimizer": "adamw", "lr": 1e-2},
    ],
)
def test_assignments_stay_and_tables_move(options: dict[str, Any], masks: bool) -> None:
    model, entries = shared_network(masks=masks)
    before = {name: table(model.get_parameter(name).detach(), index) for name, index in entries.items()}
    bias = model.get_parameter("5.bias").detach().clone()
    fit(task(model, entries, FitOptions(epochs=2, **options)))
    for name, index in entries.items():
        after = table(model.get_parameter(name).detach(), index)
        assert all(old != new for old, new in zip(before[name], after, strict=True))
    assert not torch.equal(model.get_parameter("5.bias"), bias)
    for name, mask in masks_of(model).items():
        assert not model.get_parameter(name)[~mask].any()


def test_without_the_constraint_the_tables_fall_apart() -> None:
    model, entries = shared_network()
    fit(task(model, entries, FitOptions(epochs=1, optimizer="sgd", lr=0.05), constraints=()))
    assert all(len(model.get_parameter(name).unique()) > 40 for name in entries)


class Mixing(torch.optim.SGD):
    """Treats every weight differently, as noise or a trust ratio would."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        result = super().step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.linspace(0, 0.01, parameter.numel()).view_as(parameter))
        return result


def test_an_optimizer_of_the_users_cannot_tell_shared_weights_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from cctool.training.loop import fit as loop

    monkeypatch.setattr(
        loop, "make_optimizer", lambda model, lr, options, code: Mixing(model.parameters(), lr=lr)
    )
    model, entries = shared_network()
    fit(task(model, entries, FitOptions(epochs=1, optimizer="sgd", lr=0.05)))
    for name, index in entries.items():
        table(model.get_parameter(name).detach(), index)


def test_equal_weights_stay_bit_for_bit_what_they_are() -> None:
    numbers = torch.tensor([0.1, 1e-30, -3e30])
    index = torch.arange(3).repeat(1001)
    weight = nn.Parameter(numbers[index])
    keep = KeepCodebooks([SharedWeights(weight, index)])
    keep.epoch(0)
    with torch.no_grad():
        keep.weights()
    assert torch.equal(weight.detach(), numbers[index])


def test_weights_on_their_own_keep_their_gradients_and_spoil_no_others() -> None:
    layer = nn.Linear(4, 1)
    layer.weight.grad = torch.tensor([[1.0, float("nan"), 3.0, float("inf")]])
    keep = KeepCodebooks([SharedWeights(layer.weight, torch.tensor([[0, -1, 0, -1]]))])
    keep.epoch(0)
    keep.gradients()
    assert layer.weight.grad.nan_to_num(nan=7.0, posinf=8.0).tolist() == [[2.0, 7.0, 2.0, 8.0]]


def test_entries_of_another_shape_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"entries of shape \[3\] for weights of \[1, 3\]"):
        KeepCodebooks([SharedWeights(nn.Linear(3, 1).weight, torch.tensor([0, 0, 1]))])


@pytest.mark.cuda
def test_cuda_averages_as_the_cpu_does() -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-1, 5, (16, 8, 3, 3), generator=generator)
    values, gradient = (torch.randn(index.shape, generator=generator) for _ in range(2))
    found = []
    for device in ("cpu", "cuda"):
        weight = nn.Parameter(values.to(device, memory_format=torch.channels_last))
        weight.grad = gradient.to(device, memory_format=torch.channels_last)
        # Entries are found where the network lies then; it may move before training begins.
        keep = KeepCodebooks([SharedWeights(weight, index)])
        keep.epoch(0)
        keep.gradients()
        with torch.no_grad():
            keep.weights()
        found.append((weight.detach().cpu(), weight.grad.cpu()))
    torch.testing.assert_close(found[0], found[1])
