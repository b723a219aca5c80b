"""Evaluation against counts made by hand in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from cctool.base.errors import DataError, UserCodeError
from cctool.training.evaluate import evaluate, outputs_of
from cctool.training.user_functions import UserLoss, UserMetric
from training_toys import batch, network

CPU = torch.device("cpu")
CLASSES = 9


def logits_and_labels(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, CLASSES, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)


@pytest.mark.parametrize("sizes", [(37,), (16, 16, 5), (1,) * 37])
def test_counts_are_exact_whatever_the_batches(sizes: tuple[int, ...]) -> None:
    logits, labels = logits_and_labels(37)
    parts = [batch(*pair) for pair in zip(logits.split(sizes), labels.split(sizes), strict=True)]
    found = evaluate(nn.Identity(), parts, split="test", device=CPU)

    scores, truth = logits.double().numpy(), labels.numpy()
    ranks = (scores > scores[np.arange(37), truth][:, None]).sum(axis=1)
    log_q = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    assert found.n == 37
    assert found.split == "test"
    assert found.values["top1"] == pytest.approx(100 * (ranks < 1).mean())
    assert found.values["top5"] == pytest.approx(100 * (ranks < 5).mean())
    assert found.values["loss"] == pytest.approx(-log_q[np.arange(37), truth].mean(), rel=1e-5)


def test_modes_and_statistics_stay_as_they_were() -> None:
    model = network()
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(
        model, [batch(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))], split="x", device=CPU
    )
    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_network_is_in_eval_mode_without_gradients() -> None:
    model = network().train()
    images = torch.randn(4, 1, 8, 8)
    ((outputs, _),) = outputs_of(model, [batch(images, None)], CPU)
    assert not outputs.requires_grad
    assert torch.equal(outputs, model.eval()(images).detach())


def test_bf16_changes_the_loss_a_little() -> None:
    model, images = network(), torch.randn(8, 1, 8, 8)
    labels = torch.arange(8) % 3
    full, half = (
        evaluate(model, [batch(images, labels)], split="x", device=CPU, precision=precision).values["loss"]
        for precision in ("32", "bf16")
    )
    assert full != half
    assert full == pytest.approx(half, rel=0.05)


def test_the_users_metric_sees_the_whole_split_at_once() -> None:
    logits, labels = logits_and_labels(20)
    seen = []

    def metric(outputs: torch.Tensor, truth: torch.Tensor) -> float:
        seen.append((outputs, truth))
        return 7.5

    parts = [batch(logits[:12], labels[:12]), batch(logits[12:], labels[12:])]
    found = evaluate(nn.Identity(), parts, split="x", device=CPU, metric=UserMetric("my.py:metric", metric))
    assert found.values["metric"] == 7.5
    ((outputs, truth),) = seen
    assert torch.equal(outputs, logits)
    assert torch.equal(truth, labels)


def test_the_loss_can_be_replaced() -> None:
    logits, labels = logits_and_labels(6)
    found = evaluate(
        nn.Identity(),
        [batch(logits, labels)],
        split="x",
        device=CPU,
        loss=UserLoss("my.py:four", lambda outputs, truth: outputs.sum() * 0 + 4),
    )
    assert found.values["loss"] == 4


def test_faulty_data_is_refused() -> None:
    logits, labels = logits_and_labels(4)
    with pytest.raises(DataError, match="empty"):
        evaluate(nn.Identity(), [], split="test", device=CPU)
    with pytest.raises(DataError, match="no labels"):
        evaluate(nn.Identity(), [batch(logits, None)], split="test", device=CPU)
    with pytest.raises(DataError, match="label 9, the network 9 classes"):
        evaluate(nn.Identity(), [batch(logits, labels * 0 + 9)], split="test", device=CPU)


def test_a_failing_metric_is_named() -> None:
    logits, labels = logits_and_labels(4)
    metric = UserMetric("my.py:bad", lambda outputs, truth: outputs)
    with pytest.raises(UserCodeError, match=r"my\.py:bad"):
        evaluate(nn.Identity(), [batch(logits, labels)], split="test", device=CPU, metric=metric)
