"""The user's loss and metric: every failure names the function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cctool.base.errors import UserCodeError
from cctool.training.user_functions import UserLoss, UserMetric, named_function

OUTPUTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
LABELS = torch.tensor([0, 1, 2, 0])


def test_a_good_loss_passes() -> None:
    loss = UserLoss("my.py:f", lambda outputs, labels: F.cross_entropy(outputs, labels)[None])
    assert loss(OUTPUTS, LABELS).item() == pytest.approx(F.cross_entropy(OUTPUTS, LABELS).item())
    assert loss(OUTPUTS, LABELS).dim() == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda outputs, labels: 1.0, "returned a float"),
        (lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="none"), r"shape \[4\]"),
        (lambda outputs, labels: outputs.argmax(), "int64"),
        (lambda outputs, labels: outputs.detach().sum(), "without a gradient"),
        (lambda outputs, labels: outputs @ labels, "raised RuntimeError"),
        (lambda outputs: outputs.sum(), "raised TypeError"),
    ],
)
def test_a_faulty_loss_is_named(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(UserCodeError, match=message) as caught:
        UserLoss("my.py:faulty", function)(OUTPUTS, LABELS)
    assert "my.py:faulty" in str(caught.value)


def test_a_loss_needs_no_gradient_while_evaluating() -> None:
    with torch.no_grad():
        assert UserLoss("my.py:f", lambda outputs, labels: outputs.sum())(OUTPUTS, LABELS).dim() == 0


def test_a_good_metric_passes() -> None:
    metric = UserMetric("my.py:share", lambda outputs, labels: (outputs.argmax(1) == labels).float().mean())
    expected = (OUTPUTS.argmax(1) == LABELS).float().mean().item()
    assert metric(OUTPUTS, LABELS) == pytest.approx(expected)
    assert metric.name == "share"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda outputs, labels: outputs.sum(1), r"shape \[4\]"),
        (lambda outputs, labels: "many", "a str"),
        (lambda outputs, labels: None, "a NoneType"),
        (lambda outputs, labels: float("nan"), "returned nan"),
        (lambda outputs, labels: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_faulty_metric_is_named(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(UserCodeError, match=message) as caught:
        UserMetric("my.py:faulty", function)(OUTPUTS, LABELS)
    assert "my.py:faulty" in str(caught.value)


def test_only_named_references_are_loaded() -> None:
    with pytest.raises(UserCodeError, match="add --loss math:sqrt"):
        named_function("math:sqrt", (), "--loss")
    with pytest.raises(UserCodeError, match="is expected"):
        named_function("nonsense", ("nonsense",), "--loss")
    assert named_function("math:sqrt", ("math:sqrt",), "--loss")(4) == 2
