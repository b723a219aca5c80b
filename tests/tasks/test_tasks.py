"""The tasks: losses and metrics against closed formulas in numpy, and what they refuse."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cctool.base.errors import CctoolError
from cctool.checkpoint.spec import Metrics
from cctool.data.serving.batches import Batch
from cctool.tasks.base import LOSS, Task, main_measure
from cctool.tasks.classification import Classification
from cctool.tasks.regression import Regression
from cctool.tasks.segmentation import Segmentation
from cctool.tasks.table import TASKS, task_named
from cctool.training.evaluate import evaluate

CPU = torch.device("cpu")


def segmented(size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 3, size, size, generator=generator)
    masks = torch.randint(0, 3, (4, 12, 12), generator=generator)
    masks[0, :4] = 255
    return logits, masks


def test_mean_iou_and_pixel_accuracy_equal_numpy() -> None:
    logits, masks = segmented()
    task = Segmentation()
    halves = [task.sums(logits[part], masks[part]) for part in (slice(0, 1), slice(1, 4))]
    assert halves[0] is not None
    assert halves[1] is not None
    found = task.values({"confusion": halves[0]["confusion"] + halves[1]["confusion"]}, 4)
    big = F.interpolate(logits, size=(12, 12), mode="bilinear", align_corners=False)
    predicted, wanted = big.argmax(1).numpy(), masks.numpy()
    counts = wanted != 255
    ious = []
    for label in range(3):
        hit, asked = (predicted == label) & counts, (wanted == label) & counts
        ious.append((hit & asked).sum() / (hit | asked).sum())
    assert found["miou"] == pytest.approx(100 * np.mean(ious))
    assert found["pixels"] == pytest.approx(100 * (predicted == wanted)[counts].mean())
    shown = task.sums(logits, masks, training=True)
    assert shown is not None
    assert task.values(shown, 4) == pytest.approx({"pixels": found["pixels"]})


def test_a_class_that_occurs_nowhere_counts_in_no_mean() -> None:
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 0] = 1
    task = Segmentation()
    sums = task.sums(logits, torch.zeros(1, 2, 2, dtype=torch.int64))
    assert sums is not None
    assert task.values(sums, 1) == {"miou": 100, "pixels": 100}


def test_the_loss_of_pixels_ignores_and_counts_auxiliary_outputs_half() -> None:
    logits, masks = segmented(12)
    task = Segmentation()
    alone = task.loss(logits, masks)
    assert alone == pytest.approx(float(F.cross_entropy(logits, masks, ignore_index=255)))
    assert task.loss({"out": logits, "aux": logits}, masks) == pytest.approx(1.5 * float(alone))
    nothing = torch.full_like(masks, 255)
    assert task.loss(logits, nothing) == 0


def test_tensors_of_another_shape_are_no_auxiliary_classifiers() -> None:
    labels = torch.tensor([5, 9, 0])
    logits, embedding = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 4)
    task = Classification()
    assert task.loss((logits, embedding), labels) == task.loss(logits, labels)
    assert task.loss((logits, torch.zeros(3, 10, 2)), labels) == task.loss(logits, labels)
    assert task.loss((logits, logits), labels) == pytest.approx(1.3 * float(task.loss(logits, labels)))
    scores, masks = segmented(12)
    other = {"out": scores, "aux": scores[:, :1]}
    assert Segmentation().loss(other, masks) == Segmentation().loss(scores, masks)


def test_regression_equals_its_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    found, wanted = torch.randn(5, 2, 3, generator=generator), torch.randn(5, 2, 3, generator=generator)
    task = Regression()
    assert task.loss(found, wanted) == pytest.approx(float(F.mse_loss(found, wanted)))
    sums = task.sums(found, wanted)
    assert sums is not None
    assert task.values(sums, 5) == pytest.approx(
        {"mse": float(F.mse_loss(found, wanted)), "mae": float(F.l1_loss(found, wanted))}
    )
    flat = task.sums(found[:, 0, 0], wanted[:, 0, 0])
    assert flat is not None
    assert float(flat["mae"]) == pytest.approx(float((found - wanted)[:, 0, 0].abs().sum()))


class Fixed(torch.nn.Module):
    """Gives the rows that the images number."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(rows)

    def forward(self, images: Tensor) -> Any:
        return {"out": self.rows[images[:, 0, 0, 0].long()]}


def measured(task: Task, rows: Tensor, targets: Tensor, sizes: tuple[int, ...]) -> Metrics:
    numbers = torch.arange(len(rows), dtype=torch.float32).view(-1, 1, 1, 1).split(sizes)
    batches = [Batch(images, targets[images.flatten().long()], images.flatten().long()) for images in numbers]
    return evaluate(Fixed(rows), batches, split="test", device=CPU, task=task)


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 1, 1)])
def test_evaluate_measures_any_task_alike_in_any_batches(sizes: tuple[int, ...]) -> None:
    logits, masks = segmented()
    whole = Segmentation().sums(logits, masks)
    assert whole is not None
    found = measured(Segmentation(), logits, masks, sizes).values
    assert {name: found[name] for name in ("miou", "pixels")} == pytest.approx(
        Segmentation().values(whole, 4)
    )
    values = measured(Regression(), logits, logits + 0.5, sizes).values
    assert values == pytest.approx({"loss": 0.25, "mse": 0.25, "mae": 0.5}, rel=1e-5)


def judged(task: Task, outputs: Any, targets: Tensor) -> Tensor:
    task.refuse(outputs, targets, "test")
    return task.loss(outputs, targets)


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "says"),
    [
        ("segmentation", torch.zeros(2, 3), torch.zeros(2, 4, 4).long(), r"shape \[2, 3\]"),
        ("segmentation", {"logits": torch.zeros(2, 3, 4, 4)}, torch.zeros(2, 4, 4).long(), "'out' of a dict"),
        ("segmentation", torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), "whole-number masks"),
        ("segmentation", torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4).long(), "whole-number masks"),
        ("segmentation", torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 3), "class 3, the network 3 classes"),
        ("regression", torch.zeros(2, 3), torch.zeros(2, 4), "equal shapes"),
        ("regression", {"a": torch.zeros(2, 3)}, torch.zeros(2, 3), "a dict"),
        ("regression", torch.zeros(2, 3), torch.full((2, 3), float("nan")), "NaN or infinite"),
        ("classification", torch.zeros(2, 3), torch.tensor([0, 3]), "label 3, the network 3 classes"),
        ("classification", torch.zeros(2, 3, 4), torch.tensor([0, 1]), "cross-entropy needs"),
    ],
)
def test_what_does_not_fit_is_refused(task: str, outputs: Any, targets: Tensor, says: str) -> None:
    with pytest.raises(CctoolError, match=says):
        judged(task_named(task), outputs, targets)


def test_every_task_has_a_main_measure_and_unknown_ones_are_named() -> None:
    names = [main_measure(task).name for task in TASKS.values()]
    assert names == ["top1", "miou", "mse", "loss", "loss"]
    assert main_measure(type("Bare", (), {"measures": ()})()) is LOSS
    with pytest.raises(CctoolError, match="classification, segmentation, regression"):
        task_named("detection")


@pytest.mark.cuda
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_pixels_has_a_deterministic_form_on_cuda(smoothing: float) -> None:
    found = []
    for device in ("cpu", "cuda"):
        torch.use_deterministic_algorithms(device == "cuda")
        logits, masks = (tensor.to(device) for tensor in segmented())
        logits.requires_grad_()
        loss = Segmentation().loss(logits, masks, smoothing)
        loss.backward()
        assert logits.grad is not None
        found.append((loss.detach().cpu(), logits.grad.cpu()))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here)
