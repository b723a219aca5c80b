"""Masked weights stay exactly zero in training, whatever the optimizer does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cctool.checkpoint.edits.mask import add_masks, masks_of
from cctool.checkpoint.file.payload import ResumeState
from cctool.options.train.fit import FitOptions
from cctool.training.constraints.base import Constraint
from cctool.training.constraints.masked_weights import KeepMasks, keeping_masks
from cctool.training.loop.fit import Training, fit
from cctool.training.objectives import Supervised
from cctool.training.processes import make_fabric
from cctool.training.resume.progress import Progress
from training_toys import feed, network

CPU = torch.device("cpu")


def masked(seed: int = 0) -> nn.Sequential:
    model = network(seed)
    generator = torch.Generator().manual_seed(seed)
    names = ("0.weight", "0.bias", "1.weight", "5.weight")
    shapes = {name: model.get_parameter(name).shape for name in names}
    add_masks(model, {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()})
    return model


def task(model: nn.Module, **changes: Any) -> Training:
    options = changes.pop("options", None) or FitOptions(epochs=3, optimizer="sgd", lr=0.05)
    return replace(
        Training(
            model=model,
            batches=feed().training(),
            options=options,
            objective=Supervised(),
            lr=options.learning_rate(fresh=True),
            fabric=make_fabric(CPU),
            input_shape=(1, 8, 8),
            constraints=keeping_masks(model),
        ),
        **changes,
    )


def revived(model: nn.Module) -> int:
    """Weights that a mask took away and that are not zero."""
    masks = masks_of(model)
    assert masks
    return sum(int((model.get_parameter(name)[~mask] != 0).sum()) for name, mask in masks.items())


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
        {"optimizer": "sgd", "lr": 0.05, "nesterov": True, "clip_norm": 0.1},
        {"optimizer": "adam", "lr": 1e-2},
        {"optimizer": "adamw", "lr": 1e-2},
    ],
)
def test_no_step_revives_a_masked_weight(options: dict[str, Any]) -> None:
    model = masked()
    before = {name: mask.clone() for name, mask in masks_of(model).items()}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    fit(task(model, options=FitOptions(epochs=3, **options)))
    assert revived(model) == 0
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, before[name])
        # What stays is trained.
        assert int((model.get_parameter(name)[mask] != start[name][mask]).sum()) >= mask.sum() - 2


def test_without_the_constraint_they_would_be_revived() -> None:
    model = masked()
    fit(task(model, constraints=()))
    assert revived(model) > 100


class Spiteful(torch.optim.SGD):
    """Adds to every weight, gradient or not, as a lookahead or an average would."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        result = super().step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.01)
        return result


def test_an_optimizer_of_the_users_cannot_revive_them(tmp_path: Any, monkeypatch: Any) -> None:
    from cctool.training.loop import fit as loop

    monkeypatch.setattr(
        loop, "make_optimizer", lambda model, lr, options, code: Spiteful(model.parameters(), lr=lr)
    )
    model = masked()
    fit(task(model))
    assert revived(model) == 0


def test_momentum_from_elsewhere_cannot_revive_them() -> None:
    """A training of the dense network is resumed after masks were put on it: its momentum is not zero."""
    states: list[ResumeState] = []
    options = FitOptions(epochs=2, optimizer="sgd", lr=0.05, schedule="constant")  # type: ignore[arg-type]

    def save(model: nn.Module, state: ResumeState, progress: Progress) -> None:
        states.append(state)

    dense = network()
    fit(task(dense, options=options, constraints=(), save=save, stop_after=1))
    model = masked()
    resumed = task(model, options=options, resume=states[0], save=save)
    fit(resumed)
    assert revived(model) == 0
    free = masked()
    fit(replace(resumed, model=free, constraints=()))
    assert revived(free) > 100


def test_gradients_are_zeroed_before_they_are_clipped() -> None:
    model = masked()
    (constraint,) = keeping_masks(model)
    constraint.epoch(0)
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    constraint.gradients()
    for name, mask in masks_of(model).items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert not gradient[~mask].any()
        assert gradient[mask].any()


def test_infinite_gradients_of_masked_weights_are_zeroed() -> None:
    model = nn.Linear(2, 1)
    add_masks(model, {"weight": torch.tensor([[True, False]])})
    (constraint,) = keeping_masks(model)
    constraint.epoch(0)
    model.weight.grad = torch.tensor([[1.0, float("nan")]])
    constraint.gradients()
    assert model.weight.grad.tolist() == [[1.0, 0.0]]


def test_masks_are_found_after_the_model_has_moved() -> None:
    # Moving a module replaces its buffers, as going to a device does.
    model = nn.Linear(2, 1)
    add_masks(model, {"weight": torch.tensor([[True, False]])})
    constraints: tuple[Constraint, ...] = keeping_masks(model)
    model.weight_mask = model.weight_mask.clone()
    model.weight_mask[0, 0] = False
    constraints[0].epoch(0)
    with torch.no_grad():
        model.weight.fill_(1)
        constraints[0].weights()
    assert not model.weight.any()


def test_a_network_without_masks_is_not_constrained() -> None:
    assert keeping_masks(network()) == ()
    assert isinstance(keeping_masks(masked())[0], KeepMasks)
