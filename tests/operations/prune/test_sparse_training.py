"""Sparse training before a cut: units really shrink, the right ones do, and every option matters."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import procedure_toys as toys
from cctool.base.errors import PruningError, TrainingError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations.prune import sparse_training as sparsifying
from cctool.operations.prune.sparse_training import sparsified
from cctool.operations.train.finetune import finetune
from cctool.options.prune.choices import PruneMethod, Scope, Sparsifier
from cctool.options.prune.options import PruneOptions, SparsifyOptions
from cctool.options.train.fit import FitOptions
from cctool.pruning.cut.planner import plan_thinning
from cctool.training.constraints.penalties import GroupLasso, GrowingPenalty, ScaleL1

TRAINING = {"epochs": 6, "lr": 0.05}


def options(method: Sparsifier, strength: float | None = None, **changes: Any) -> PruneOptions:
    given = {"method": PruneMethod.L2, "rate": 0.5, "optimizer": "sgd", "data": toys.DIGITS, **changes}
    training = {**TRAINING, **{key: given.pop(key) for key in ("epochs", "lr") if key in given}}
    return PruneOptions(**given, sparsify=SparsifyOptions(method, strength=strength, **training))


def run(method: Sparsifier, strength: float | None = None, **changes: Any) -> Checkpoint:
    return sparsified(
        toys.plain_checkpoint(), toys.digits(), options(method, strength, **changes), toys.context()
    )


@pytest.fixture(scope="module")
def control() -> Checkpoint:
    """The same training without a penalty."""
    return finetune(
        toys.plain_checkpoint(),
        toys.digits(),
        FitOptions(epochs=TRAINING["epochs"], lr=TRAINING["lr"], optimizer="sgd"),
        toys.DIGITS,
        toys.context(),
        choose_best=False,
    )


def norms(checkpoint: Checkpoint) -> Tensor:
    """Of all that each of the 8 + 12 units owns."""
    conv, norm, reader, last, head = (checkpoint.model[n] for n in (0, 1, 3, 4, 8))
    inner = [
        torch.cat(
            [
                conv.weight[u].flatten(),
                norm.weight[u : u + 1],
                norm.bias[u : u + 1],
                reader.weight[:, u].flatten(),
            ]
        ).norm()
        for u in range(8)
    ]
    outer = [
        torch.cat(
            [reader.weight[u].flatten(), last.weight[u : u + 1], last.bias[u : u + 1], head.weight[:, u]]
        ).norm()
        for u in range(12)
    ]
    return torch.stack(inner + outer).detach()


def scales(checkpoint: Checkpoint) -> Tensor:
    return torch.cat(
        [m.weight.detach().abs() for m in checkpoint.model.modules() if isinstance(m, nn.BatchNorm2d)]
    )


def test_gamma_l1_shrinks_scales(control: Checkpoint) -> None:
    assert scales(run(Sparsifier.GAMMA_L1, 0.15)).mean() < 0.75 * scales(control).mean()


def test_group_lasso_shrinks_units(control: Checkpoint) -> None:
    assert norms(run(Sparsifier.GROUP_LASSO, 0.02)).mean() < 0.75 * norms(control).mean()


def test_growing_empties_the_doomed_and_spares_the_others(control: Checkpoint) -> None:
    start = toys.plain_checkpoint()
    wanted = options(Sparsifier.GROWING)
    found = plan_thinning(start.model, (torch.randn(2, 1, 32, 32),), wanted)
    doomed = ~torch.cat(found.selection.kept)
    assert 0 < int(doomed.sum()) < len(doomed)
    after, without = norms(run(Sparsifier.GROWING)), norms(control)
    assert (after[doomed] < 0.3 * without[doomed]).all()
    assert after[~doomed].mean() > 0.7 * without[~doomed].mean()
    # What is cut afterwards is what was driven to zero.
    trained = run(Sparsifier.GROWING)
    again = plan_thinning(trained.model, (torch.randn(2, 1, 32, 32),), replace(wanted, sparsify=None))
    assert torch.equal(~torch.cat(again.selection.kept), doomed)


@pytest.mark.parametrize("method", list(Sparsifier))
def test_the_defaults_shrink_something(method: Sparsifier, control: Checkpoint) -> None:
    measure = scales if method is Sparsifier.GAMMA_L1 else norms
    assert measure(run(method)).mean() < measure(control).mean() - 1e-3


@pytest.mark.parametrize("method", list(Sparsifier))
@pytest.mark.parametrize("change", [{"strength": 0.03}, {"epochs": 2}, {"lr": 0.01}])
def test_each_option_changes_the_weights(method: Sparsifier, change: dict[str, Any]) -> None:
    base, other = run(method, epochs=1), run(method, **{"epochs": 1, **change})
    assert not torch.equal(base.model[0].weight, other.model[0].weight)


def test_the_source_stays_as_it_is_and_no_option_does_nothing() -> None:
    start = toys.plain_checkpoint()
    before = deepcopy(start.model.state_dict())
    wanted = options(Sparsifier.GAMMA_L1, epochs=1)
    result = sparsified(start, toys.digits(), wanted, toys.context())
    assert all(torch.equal(value, before[name]) for name, value in start.model.state_dict().items())
    assert not torch.equal(result.model[0].weight, start.model[0].weight)
    assert sparsified(start, toys.digits(), replace(wanted, sparsify=None), toys.context()) is start


def penalty(wanted: PruneOptions, **changes: Any) -> Any:
    model = toys.plain_network()
    found = plan_thinning(model, (torch.randn(2, 1, 32, 32),), replace(wanted, **changes))
    assert wanted.sparsify is not None
    return sparsifying._penalty(model, found, wanted.sparsify, 100), model


def test_excluded_families_are_left_alone() -> None:
    wanted = options(Sparsifier.GAMMA_L1, 1.0)
    made, model = penalty(wanted, exclude=("0",))
    assert isinstance(made, ScaleL1)
    assert made.penalty().item() == pytest.approx(12.0)
    made.penalty().backward()
    assert model[1].weight.grad is None


def test_the_default_growth_reaches_the_ceiling_in_three_quarters_of_the_steps() -> None:
    made, _ = penalty(options(Sparsifier.GROWING))
    assert isinstance(made, GrowingPenalty)
    reached = []
    for _ in range(100):
        reached.append(made.coefficient)
        made.weights()
    assert reached == sorted(reached)
    assert 70 <= reached.index(sparsifying.CEILING) <= 75
    assert len(set(reached)) == 15


def test_the_default_strengths_are_those_that_are_documented() -> None:
    lasso, model = penalty(options(Sparsifier.GROUP_LASSO))
    assert isinstance(lasso, GroupLasso)
    stronger, _ = penalty(
        options(Sparsifier.GROUP_LASSO, 2 * sparsifying.DEFAULT_STRENGTH[Sparsifier.GROUP_LASSO])
    )
    assert stronger.penalty().item() == pytest.approx(2 * lasso.penalty().item())
    one, _ = penalty(options(Sparsifier.GAMMA_L1))
    total = sum(m.weight.detach().abs().sum() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert one.penalty().item() == pytest.approx(1e-2 * float(total))


def test_several_steps_doom_what_the_last_one_leaves_out() -> None:
    wanted = options(Sparsifier.GROWING, scope=Scope.LOCAL, steps=3, rate=0.75)
    assert sparsifying._at_once(wanted).rate_at(1) == 0.75
    kept = replace(options(Sparsifier.GROWING), keep=0.5, steps=2)
    assert sparsifying._at_once(kept).keep_at(1) == 0.25


def test_what_has_nothing_to_act_on_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 10))
    start = replace(toys.plain_checkpoint(), model=model)
    with pytest.raises(TrainingError, match="no batch norm"):
        sparsified(start, toys.digits(), options(Sparsifier.GAMMA_L1), toys.context())
    with pytest.raises(TrainingError, match="no unit is to go"):
        sparsified(
            toys.plain_checkpoint(), toys.digits(), options(Sparsifier.GROWING, rate=0.0), toys.context()
        )


def test_a_plan_that_spares_everything_is_refused() -> None:
    start, wanted = toys.plain_checkpoint(), options(Sparsifier.GROUP_LASSO)
    found = plan_thinning(start.model, (torch.randn(2, 1, 32, 32),), wanted)
    spared = {family.name: "excluded" for family in found.graph.families}
    found = replace(found, selection=replace(found.selection, spared=spared))
    with pytest.raises(PruningError, match="no family"):
        sparsified(start, toys.digits(), wanted, toys.context(), found)


@pytest.mark.cuda
@pytest.mark.parametrize("method", list(Sparsifier))
def test_cuda_gives_what_the_cpu_gives(method: Sparsifier) -> None:
    start = toys.plain_checkpoint()
    start.model.to("cuda")
    wanted = options(method, epochs=1)
    there = sparsified(start, toys.digits(), wanted, toys.context(device="cuda"))
    assert torch.allclose(norms(there).cpu(), norms(run(method, epochs=1)), rtol=1e-2, atol=1e-3)
