"""Batch-norm statistics against averages made by hand."""

import pytest
import torch
from torch import nn

from cctool.base.errors import DataError
from cctool.training.batch_norm import recalibrate
from training_toys import batch, network

IMAGES = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 + 1


def batches(*sizes: int) -> list:
    return [batch(part, None) for part in IMAGES[: sum(sizes)].split(sizes)]


def statistics(model: nn.Sequential, sizes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and variances of what reaches the batch norm, averaged over batches by their images."""
    means, variances = torch.zeros(6), torch.zeros(6)
    for part in IMAGES[: sum(sizes)].split(sizes):
        reached = model[0](part).detach()
        share = len(part) / sum(sizes)
        means += share * reached.mean((0, 2, 3))
        variances += share * reached.transpose(0, 1).reshape(6, -1).var(1)
    return means, variances


@pytest.mark.parametrize("sizes", [(16, 16), (16, 16, 8)])
def test_statistics_are_the_average_over_batches(sizes: tuple[int, ...]) -> None:
    model = network().eval()
    assert recalibrate(model, batches(*sizes), 40) == sum(sizes)
    means, variances = statistics(model, sizes)
    assert torch.allclose(model[1].running_mean, means, atol=1e-5)
    assert torch.allclose(model[1].running_var, variances, rtol=1e-4)


def test_no_more_images_are_used_than_asked_for() -> None:
    model = network()
    assert recalibrate(model, batches(16, 16, 8), 20) == 20
    means, _ = statistics(model, (16, 4))
    assert torch.allclose(model[1].running_mean, means, atol=1e-5)


def test_nothing_but_statistics_changes() -> None:
    model = network().train()
    model[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recalibrate(model, batches(16, 16), 32)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert [module.training for module in model] == [True, True, True, False, True, True]
    assert model[1].momentum == 0.1


def test_dropout_stays_off() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(1))
    recalibrate(model, batches(20, 20), 40)
    halves = torch.stack([IMAGES[:20].mean(), IMAGES[20:].mean()])
    assert model[1].running_mean.item() == pytest.approx(halves.mean().item(), rel=1e-5)


def test_a_network_without_batch_norm_uses_no_image() -> None:
    assert recalibrate(nn.Linear(2, 2), batches(8), 8) == 0


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        recalibrate(network(), [], 8)
