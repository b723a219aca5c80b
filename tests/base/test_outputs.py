"""What networks return: its tensors, their names, and how two of them are told apart."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cctool.base.detectors import before_boxes, chooses_boxes
from cctool.base.outputs import differences, named_tensors, other_values, varying_shapes

A, B, C = (torch.full((2,), float(i)) for i in range(3))
Pair = namedtuple("Pair", ["logits", "aux"])


@dataclass
class Record:
    """As the outputs of large libraries."""

    loss: Tensor | None
    maps: list[Tensor]


class Output(OrderedDict[str, Any]):
    """A mapping that is more than a dict."""


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (A, ["output"]),
        ((A, B), ["output", "output1"]),
        ([A, None, (B, C)], ["output", "output1", "output2"]),
        ({"out": A, "aux": B}, ["out", "aux"]),
        (Output(logits=A, hidden=(B, None, C)), ["logits", "hidden.0", "hidden.2"]),
        ({"boxes": [A, B]}, ["boxes.0", "boxes.1"]),
        ([{"boxes": A}, {"boxes": B}], ["0.boxes", "1.boxes"]),
        ((A, {"p3": B}), ["0", "1.p3"]),
        (Pair(A, B), ["logits", "aux"]),
        (Record(None, [A, B]), ["maps.0", "maps.1"]),
        ({"a.b": A, "a": {"b": B}, 1: C, "1": A}, ["a.b", "a.b_2", "1", "1_2"]),
        ({"Kästen 1/2": A, "": B}, ["K_sten_1_2", "_"]),
        ((None, 3, "text"), []),
    ],
)
def test_tensors_have_unique_names_in_order(outputs: Any, names: list[str]) -> None:
    found = named_tensors(outputs)
    assert list(found) == names
    leaves = iter([value for value in torch.utils._pytree.tree_leaves(outputs) if isinstance(value, Tensor)])
    if not isinstance(outputs, (Record, Output)):
        assert all(value is next(leaves) for value in found.values())


def test_what_is_no_tensor_is_told() -> None:
    assert other_values({"out": A, "size": (3, "s"), "none": None}) == {"size.0": "int", "size.1": "str"}
    assert other_values(A) == {}


def test_differences_of_numbers_that_are_not_finite() -> None:
    nan, inf = torch.nan, torch.inf
    left = torch.tensor([1.0, nan, inf, inf, nan, 2.0])
    right = torch.tensor([1.5, nan, inf, -inf, 0.0, inf])
    assert differences(left, right).tolist() == [0.5, 0, 0, inf, inf, inf]
    assert differences(torch.tensor([1 + 2j]), torch.tensor([1 + 5j])).max() == 3


def test_shapes_that_vary() -> None:
    runs = [{"a": torch.zeros(2), "b": torch.zeros(3)}, {"a": torch.zeros(2), "b": torch.zeros(4)}]
    assert varying_shapes(runs) == {"b"}
    assert varying_shapes([*runs, {"b": torch.zeros(3)}]) == {"a", "b"}


def test_a_detector_ends_before_its_boxes_and_is_as_it_was() -> None:
    from torchvision import models

    torch.manual_seed(0)
    given = {"weights": None, "weights_backbone": None, "num_classes": 3}
    model = models.get_model("ssdlite320_mobilenet_v3_large", **given).eval()
    x = torch.rand(2, 3, 64, 64)
    assert chooses_boxes(model)
    assert not chooses_boxes(nn.Identity())
    with torch.no_grad():
        images, _ = model.transform(list(x))
        expected = model.head(list(model.backbone(images.tensors).values()))
        with before_boxes(model, nn.Identity()):
            found = named_tensors(model(x))
        assert set(named_tensors(model(x))) >= {"0.boxes", "1.scores"}
    assert list(found) == ["bbox_regression", "cls_logits"]
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
