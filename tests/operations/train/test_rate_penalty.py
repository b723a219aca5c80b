"""Training that lowers the rate of coded feature maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cctool.base.errors import UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations.train import run as train
from cctool.operations.train.finetune import finetune
from cctool.operations.train.rate_penalty import rate_penalties
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import TrainOptions
from cctool.transforms.codec.figures import NetworkStatistics
from cctool.transforms.codec.taps import recording, state_of, taps_of
from cctool.transforms.codec.training import simulate_rated
from procedure_toys import context
from swapped_toys import network
from transformed_toys import DATA, source, tapped

TAP = "features.3"


def coded() -> Checkpoint:
    return tapped(network("lenet"), TAP)


def images(checkpoint: Checkpoint) -> torch.Tensor:
    return torch.rand(4, *checkpoint.spec.input_shape, generator=torch.Generator().manual_seed(0))


def bits(checkpoint: Checkpoint) -> float:
    statistics = NetworkStatistics(checkpoint.model.eval())
    with torch.no_grad(), recording(checkpoint.model, statistics):
        checkpoint.model(images(checkpoint))
    (tap,) = statistics.figures()
    return min(tap.payload_bits) / tap.elements


def fit(weight: float, **given: Any) -> FitOptions:
    return FitOptions(**({"epochs": 4, "optimizer": "sgd", "lr": 0.05, "rate_weight": weight} | given))


def test_the_penalty_is_the_weighted_rate_of_the_step() -> None:
    checkpoint = coded()
    model, x = checkpoint.model, images(checkpoint)
    with rate_penalties(model, 0.25) as (penalty,):
        assert penalty.penalty() is None
        model(x)
        found = penalty.penalty()
    assert found is not None
    maps = _maps(checkpoint, x)
    _, expected = simulate_rated(maps, state_of(model, TAP))
    assert float(found.detach()) == pytest.approx(0.25 * float(expected.detach()) / maps.numel(), rel=1e-5)
    with rate_penalties(model, 0.0) as none:
        assert none == ()
        assert taps_of(model)[TAP].rates is None


def _maps(checkpoint: Checkpoint, x: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = taps_of(checkpoint.model)[TAP]
    hook.active = False
    handle = checkpoint.model.get_submodule(TAP).register_forward_hook(lambda m, a, y: seen.append(y.clone()))
    checkpoint.model(x)
    handle.remove()
    hook.active = True
    return seen[0]


def test_the_rate_falls_with_the_weight() -> None:
    found = []
    for weight in (0.0, 1.0, 5.0):
        trained = finetune(coded(), source(), fit(weight, epochs=2), DATA, context(), choose_best=False)
        found.append(bits(trained))
        assert taps_of(trained.model)[TAP].rates is None
    assert found[0] > found[1] + 0.02 > found[2] + 0.04


def test_train_takes_it_and_says_what_it_adds(tmp_path: Any) -> None:
    where = replace(context(), output=tmp_path / "out.pt")
    outcome = next(train.run(coded(), TrainOptions(fit=fit(0.5, epochs=1), data=DATA), where))
    (row,) = outcome.report.rows
    assert 0.5 < row.train["rate"] < 0.5 * 20
    assert row.train["loss"] == pytest.approx(row.train["loss_without_penalty"] + row.train["rate"], rel=1e-4)
    assert all(hook.rates is None for hook in taps_of(outcome.checkpoint.model).values())


def test_without_codecs_it_is_refused(tmp_path: Any) -> None:
    where = replace(context(), output=tmp_path / "out.pt")
    with pytest.raises(UsageError, match=r"--rate-weight 0\.5: the network has no coded feature maps"):
        next(train.run(network("lenet"), TrainOptions(fit=fit(0.5), data=DATA), where))
    assert not list(tmp_path.iterdir())
