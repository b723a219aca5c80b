"""What training needs to go on bit for bit, through the form that files hold."""

import json
import random

import numpy as np
import pytest
import torch

from cctool.base.errors import CorruptCheckpointError, TrainingError
from cctool.training.logs.table import weight_sparsity
from cctool.training.processes import make_fabric
from cctool.training.resume.state import (
    flatten,
    generator_states,
    restore_generators,
    restore_optimizer,
    unflatten,
)
from training_toys import network

CPU = torch.device("cpu")


def test_containers_survive_as_json_and_tensors() -> None:
    value = {"state": {0: {"m": torch.ones(2), "step": 3}, 1: {}}, "betas": (0.9, [None, True, "x"]), "e": {}}
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(flatten(value, "o", tensors))
    found = unflatten(json.loads(text), tensors)
    assert torch.equal(found["state"][0].pop("m"), torch.ones(2))
    assert found == {"state": {0: {"step": 3}, 1: {}}, "betas": (0.9, [None, True, "x"]), "e": {}}
    assert isinstance(found["betas"], tuple)


def test_what_no_file_can_hold_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"o/x of the training state is a object"):
        flatten({"x": object()}, "o", {})


def test_all_generators_go_on_where_they_were() -> None:
    fabric = make_fabric(CPU)

    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()

    random.gauss(0, 1), np.random.randn()  # each now holds a second draw back
    states = generator_states(fabric)
    expected = [draw() for _ in range(3)]
    restore_generators(states, fabric)
    assert [draw() for _ in range(3)] == expected


def test_another_number_of_processes_is_refused() -> None:
    fabric = make_fabric(CPU)
    states = {name: torch.cat([value, value]) for name, value in generator_states(fabric).items()}
    with pytest.raises(TrainingError, match="2 processes trained this"):
        restore_generators(states, fabric)
    with pytest.raises(CorruptCheckpointError, match="no generator states"):
        restore_generators({}, fabric)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_moments_are_laid_out_as_their_parameters(kind: type) -> None:
    model = network().to(memory_format=torch.channels_last)
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, **extra)
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    tensors: dict[str, torch.Tensor] = {}
    state = flatten(optimizer.state_dict(), "optimizer", tensors)
    other = kind(model.parameters(), lr=0.5, **extra)
    restore_optimizer(other, state, {name: value.contiguous() for name, value in tensors.items()})
    assert other.param_groups[0]["lr"] == 0.1
    for parameter in model.parameters():
        for name, value in optimizer.state[parameter].items():
            found = other.state[parameter][name]
            assert torch.equal(found, value), name
            assert found.stride() == value.stride(), name


def test_another_optimizers_state_is_refused() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = flatten(torch.optim.SGD(network().parameters(), lr=0.1).state_dict(), "optimizer", tensors)
    groups = [{"params": [value]} for value in network().parameters()]
    with pytest.raises(TrainingError, match="does not fit this optimizer"):
        restore_optimizer(torch.optim.SGD(groups, lr=0.1), state, tensors)


def test_sparsity_counts_zeros_of_weights_alone() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.flatten()[:27] = 0
        model[1].bias.zero_()
    found = weight_sparsity(model)
    assert found["0.weight"] == pytest.approx(50)
    assert found["total"] == pytest.approx(100 * 27 / (54 + 1152))
    assert set(found) == {"0.weight", "5.weight", "total"}
