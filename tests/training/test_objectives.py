"""Losses against closed forms written in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import TrainingError
from cctool.tasks.classification import distillation_loss
from cctool.training.objectives import (
    CLASSIFICATION,
    Distillation,
    Supervised,
    gamma_penalty,
)
from training_toys import network

STUDENT = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
TEACHER = torch.tensor([[2.0, 0.0, -1.0], [1.0, 1.0, 4.0]])
LABELS = torch.tensor([0, 1])


def softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def kl(temperature: float) -> float:
    p, q = (softmax(logits.double().numpy() / temperature) for logits in (TEACHER, STUDENT))
    return float((p * np.log(p / q)).sum(axis=1).mean())


def ce(smoothing: float = 0.0) -> float:
    log_q = np.log(softmax(STUDENT.double().numpy()))
    targets = np.eye(3)[LABELS.numpy()] * (1 - smoothing) + smoothing / 3
    return float(-(targets * log_q).sum(axis=1).mean())


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_distillation_loss_is_t_squared_times_kl(temperature: float) -> None:
    found = distillation_loss(STUDENT.double(), TEACHER.double(), temperature)
    assert found.item() == pytest.approx(temperature**2 * kl(temperature), rel=1e-5)


def test_distillation_loss_of_equal_networks_is_zero() -> None:
    assert distillation_loss(TEACHER, TEACHER, 4.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_distillation_weighs_teacher_and_labels(alpha: float) -> None:
    objective = Distillation(lambda images: TEACHER, temperature=2.0, alpha=alpha)
    terms = objective(nn.Identity(), STUDENT, LABELS)
    assert terms.loss.item() == pytest.approx(alpha * 4 * kl(2.0) + (1 - alpha) * ce(), rel=1e-5)
    assert sum(value.item() for value in terms.components.values()) == pytest.approx(terms.loss.item())


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    distillation_loss(student, teacher, 3.0).backward()
    assert teacher.grad is None
    p, q = (softmax(logits.double().numpy() / 3) for logits in (TEACHER, STUDENT))
    assert student.grad is not None
    # d/ds of T^2 * KL(p || softmax(s / T)), mean over two rows, is T * (q - p) / 2.
    assert np.allclose(student.grad.numpy(), 3 * (q - p) / 2, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_and_its_smoothing(smoothing: float) -> None:
    terms = Supervised(label_smoothing=smoothing)(nn.Identity(), STUDENT, LABELS)
    assert terms.loss.item() == pytest.approx(ce(smoothing), rel=1e-5)


def test_auxiliary_classifiers_count_three_tenths() -> None:
    found = CLASSIFICATION.loss((STUDENT, STUDENT, STUDENT), LABELS)
    assert found.item() == pytest.approx(1.6 * ce(), rel=1e-5)


@pytest.mark.parametrize("outputs", [torch.zeros(2, 3, 4), torch.zeros(3, 3)])
def test_outputs_that_are_no_logits_are_refused(outputs: Tensor) -> None:
    with pytest.raises(TrainingError, match="returned shape"):
        CLASSIFICATION.loss(outputs, LABELS)


def test_outputs_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(TrainingError, match="returned a dict"):
        CLASSIFICATION.loss({"logits": STUDENT}, LABELS)


def test_gamma_penalty_is_the_sum_of_magnitudes_and_its_gradient_the_sign() -> None:
    model = network()
    gamma = model[1].weight
    with torch.no_grad():
        gamma.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5, -0.25, 3.0]))
    penalty = gamma_penalty(model, 0.1)
    assert penalty is not None
    value = penalty()
    value.backward()
    assert value.item() == pytest.approx(0.675)
    assert gamma.grad is not None
    assert gamma.grad.tolist() == pytest.approx([0.1, -0.1, 0, 0.1, -0.1, 0.1])


def test_gamma_penalty_without_batch_norm_is_refused() -> None:
    assert gamma_penalty(nn.Linear(2, 2), 0.0) is None
    with pytest.raises(TrainingError, match="no batch norm"):
        gamma_penalty(nn.Linear(2, 2), 0.1)
