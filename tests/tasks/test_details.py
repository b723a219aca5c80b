"""What tasks say of single samples and classes, against numpy."""

import numpy as np
import pytest
import torch

from cctool.base.errors import DataError
from cctool.tasks.classification import Classification
from cctool.tasks.details import Classed, Hitting, Predicting
from cctool.tasks.regression import Regression
from cctool.tasks.segmentation import Segmentation

NAMES = ("ant", "bee", "cat")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def counted(predicted: np.ndarray, targets: np.ndarray, classes: int) -> np.ndarray:
    matrix = np.zeros((classes, classes), dtype=int)
    for choice, target in zip(predicted.flatten(), targets.flatten(), strict=True):
        if target != 255:
            matrix[target, choice] += 1
    return matrix


def test_which_tasks_say_what() -> None:
    assert isinstance(Classification(), Classed)
    assert isinstance(Segmentation(), Classed)
    assert not isinstance(Regression(), Classed)
    assert isinstance(Classification(), Hitting)
    assert not isinstance(Segmentation(), Hitting)
    assert all(isinstance(task, Predicting) for task in (Classification(), Segmentation(), Regression()))


def test_classes_of_classification() -> None:
    logits, labels = drawn(50, 4), torch.arange(50) % 3
    matrix = Classification().confusion(logits, labels)
    expected = counted(logits.numpy().argmax(1), labels.numpy(), 4)
    assert (matrix.numpy() == expected).all()
    accuracy = Classification().per_class(matrix)["accuracy"].numpy()
    assert accuracy[:3] == pytest.approx(100 * expected.diagonal()[:3] / expected.sum(1)[:3])
    assert np.isnan(accuracy[3])
    hits = Classification().hits(logits, labels)
    assert (hits["top1"].numpy() == (logits.numpy().argmax(1) == labels.numpy())).all()
    assert hits["top5"].all()


def test_classes_of_segmentation() -> None:
    logits = drawn(3, 4, 5, 6)
    masks = torch.randint(0, 3, (3, 5, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    masks[0, 0] = 255
    matrix = Segmentation().confusion({"out": logits}, masks)
    expected = counted(logits.numpy().argmax(1), masks.numpy(), 4)
    assert (matrix.numpy() == expected).all()
    found = {name: values.numpy() for name, values in Segmentation().per_class(matrix).items()}
    right, union = expected.diagonal(), expected.sum(0) + expected.sum(1) - expected.diagonal()
    assert found["iou"] == pytest.approx(100 * right / union)
    assert found["accuracy"][:3] == pytest.approx(100 * right[:3] / expected.sum(1)[:3])
    assert np.isnan(found["accuracy"][3])


def test_many_classes_do_not_overflow_small_integers() -> None:
    logits = torch.zeros(1, 200, 1, 2)
    logits[0, 199, 0, 0] = logits[0, 3, 0, 1] = 1
    matrix = Segmentation().confusion(logits, torch.tensor([[[199, 150]]], dtype=torch.uint8))
    assert matrix[199, 199] == matrix[150, 3] == 1
    assert matrix.sum() == 2


def test_predictions_of_segmentation() -> None:
    logits = drawn(2, 3, 4, 4)
    masks = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    masks[0, :2] = 255
    rows = list(Segmentation().predictions(logits, masks, NAMES))
    for index, row in enumerate(rows):
        choice, mask = logits[index].numpy().argmax(0), masks[index].numpy()
        matrix = counted(choice, mask, 3)
        right, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
        assert float(str(row["pixel_accuracy"])) == pytest.approx(100 * right.sum() / matrix.sum(), abs=1e-4)
        mean = 100 * (right[union > 0] / union[union > 0]).mean()
        assert float(str(row["mean_iou"])) == pytest.approx(mean, abs=1e-4)
        for number, name in enumerate(NAMES):
            assert float(str(row[f"share_{name}"])) == pytest.approx(
                100 * (choice == number).mean(), abs=1e-4
            )
    unlabelled = list(Segmentation().predictions(logits, None, ()))
    assert [row["mean_iou"] for row in unlabelled] == ["", ""]
    assert list(unlabelled[0]) == ["pixel_accuracy", "mean_iou", "share_0", "share_1", "share_2"]
    nothing = list(Segmentation().predictions(logits, torch.full((2, 4, 4), 255), NAMES))
    assert [row["pixel_accuracy"] for row in nothing] == ["", ""]


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 4, 4), (5, 17)])
def test_predictions_of_regression(shape: tuple[int, ...]) -> None:
    outputs, targets = drawn(*shape), torch.ones(shape)
    rows = list(Regression().predictions(outputs, targets, ()))
    assert len(rows) == 5
    for values, row in zip(outputs.numpy().reshape(5, -1), rows, strict=True):
        assert float(str(row["squared_error"])) == pytest.approx(((values - 1) ** 2).mean(), rel=1e-4)
        assert float(str(row["absolute_error"])) == pytest.approx(np.abs(values - 1).mean(), rel=1e-4)
        shown = [float(str(row[key])) for key in row if key.startswith("predicted_")]
        assert shown == pytest.approx(values.tolist() if values.size <= 16 else [], rel=1e-4)
    assert next(iter(Regression().predictions(outputs, None, ())))["squared_error"] == ""


def test_outputs_without_classes_are_refused() -> None:
    maps = torch.zeros(2, 3, 4)
    with pytest.raises(DataError, match=r"a confusion matrix needs logits .* \[2, 3, 4\]"):
        Classification().confusion(maps, torch.zeros(2, dtype=torch.long))
    with pytest.raises(DataError, match=r"predictions need logits .* \[2, 3, 4\]"):
        next(iter(Classification().predictions(maps, None, ())))
    assert Classification().hits(maps, torch.zeros(2, dtype=torch.long)) == {}
