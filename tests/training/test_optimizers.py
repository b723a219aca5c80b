"""Optimizers: the table, the groups, the user's own."""

from pathlib import Path

import pytest
import torch

from cctool.base.errors import TrainingError, UserCodeError
from cctool.options.train.fit import DecayScope, FitOptions, OptimizerName
from cctool.training.optimizers import OPTIMIZERS, make_optimizer, parameter_groups
from training_toys import network


def test_table_covers_its_enum() -> None:
    assert set(OPTIMIZERS) == set(OptimizerName)


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_names_give_torchs_optimizers(name: str, kind: type) -> None:
    made = make_optimizer(network(), 0.05, FitOptions(optimizer=name, weight_decay=0.01))
    assert type(made) is kind
    assert made.param_groups[0]["lr"] == 0.05
    assert made.param_groups[0]["weight_decay"] == 0.01


def test_sgd_takes_momentum_and_nesterov() -> None:
    made = make_optimizer(network(), 0.1, FitOptions(optimizer="sgd", momentum=0.7, nesterov=True))
    assert made.param_groups[0]["momentum"] == 0.7
    assert made.param_groups[0]["nesterov"] is True
    assert make_optimizer(network(), 0.1, FitOptions(optimizer="sgd")).param_groups[0]["momentum"] == 0.9


def test_decay_of_weights_leaves_biases_and_normalisation_out() -> None:
    model = network()
    weights, others = parameter_groups(model, 0.1, DecayScope.WEIGHTS)
    assert {id(value) for value in weights["params"]} == {id(model[0].weight), id(model[5].weight)}
    assert weights["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert len(others["params"]) == 4
    (everything,) = parameter_groups(model, 0.1, DecayScope.ALL)
    assert len(everything["params"]) == 6


def test_tied_parameters_come_once() -> None:
    model = network()
    model.append(model[5])
    groups = parameter_groups(model, 0.1, DecayScope.WEIGHTS)
    assert sum(len(group["params"]) for group in groups) == 6


def test_a_frozen_network_is_refused() -> None:
    with pytest.raises(TrainingError, match="no trainable parameters"):
        make_optimizer(network().requires_grad_(False), 0.1, FitOptions())


FACTORIES = """
import torch
def good(groups, lr):
    return torch.optim.RMSprop(groups, lr=lr)
def wrong(groups, lr):
    return "an optimizer"
def other(groups, lr):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
def raises(groups, lr):
    raise KeyError("lost")
"""


def reference(tmp_path: Path, name: str) -> str:
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES)
    return f"{path}:{name}"


def test_the_users_factory_is_called(tmp_path: Path) -> None:
    name = reference(tmp_path, "good")
    made = make_optimizer(network(), 0.02, FitOptions(optimizer=name), {name})
    assert type(made) is torch.optim.RMSprop
    assert made.param_groups[0]["lr"] == 0.02


def test_installed_modules_can_be_named() -> None:
    options = FitOptions(optimizer="torch.optim:Adagrad")
    assert type(make_optimizer(network(), 0.1, options, {"torch.optim:Adagrad"})) is torch.optim.Adagrad


@pytest.mark.parametrize(
    ("name", "message"),
    [("wrong", "returned a str"), ("other", "owns none"), ("raises", "KeyError"), ("absent", "no function")],
)
def test_a_faulty_factory_is_named(tmp_path: Path, name: str, message: str) -> None:
    full = reference(tmp_path, name)
    with pytest.raises(UserCodeError, match=message) as caught:
        make_optimizer(network(), 0.1, FitOptions(optimizer=full), {full})
    assert full in str(caught.value)


def test_a_factory_that_was_not_named_never_runs(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserCodeError, match="runs only when it is named"):
        make_optimizer(network(), 0.1, FitOptions(optimizer=f"{tmp_path}/evil.py:f"))
