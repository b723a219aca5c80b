"""Cut and masked networks are compared in every output, and what was not compared is never called equal."""

from typing import Any

import pytest
import torch
from torch import nn

import output_toys as toys
from cctool.base.errors import PruningError
from cctool.operations.prune.shown import _equality
from cctool.options.prune.choices import PruneMethod
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.planner import thin
from cctool.pruning.cut.verify import compare_outputs
from cctool.pruning.masks.emptied import find_emptied

HALF = PruneOptions(method=PruneMethod.L1, rate=0.5)


def report(model: nn.Module) -> Any:
    return thin(model.eval(), (torch.randn(2, *toys.SHAPE),), HALF).report


def test_all_outputs_are_named_and_compared() -> None:
    found = report(toys.Dict())
    assert found.parameters_after < found.parameters_before
    assert [(o.name, o.elements, o.different) for o in found.outputs] == [
        ("out", 3 * 4 * 256, None),
        ("aux", 3 * 4 * 256, None),
        ("classes", 3 * 256, 0.0),
    ]
    assert _equality(found).endswith("0.00 % of 768 in classes differ")


def test_whole_numbers_alone_are_counted_and_not_called_equal() -> None:
    assert _equality(report(toys.Classes())) == (
        "cut compared with masked in whole numbers: 0.00 % of 768 in output differ"
    )


def test_nan_in_the_same_places_is_equal_and_nothing_but_nan_is_not() -> None:
    found = report(toys.Partly())
    assert [o.not_compared for o in found.outputs] == ["", ""]
    with pytest.raises(PruningError, match="outputs are not finite"):
        report(toys.Nowhere())


def test_an_output_without_elements_is_named() -> None:
    outputs = {"out": torch.randn(3, 4), "none": torch.zeros(3, 0)}
    found = compare_outputs(outputs, dict(outputs))
    shown = type("Cut", (), {"outputs": found.outputs, "error": 0.0, "precision": "float32"})
    assert _equality(shown).endswith("(float32); not compared: none (it has no elements on random inputs)")


def test_detections_of_any_number_are_cut() -> None:
    found = report(toys.Detections())
    assert found.parameters_after < found.parameters_before
    assert [o.name for o in found.outputs if o.not_compared] == []
    assert {o.name for o in found.outputs} == {f"{i}.{key}" for i in range(3) for key in ("boxes", "labels")}


def test_numbers_and_whole_numbers_that_differ_are_noticed() -> None:
    out, classes = torch.randn(5, 7), torch.arange(1000)
    wrong = classes.clone()
    wrong[:20] += 1
    found = compare_outputs({"out": out, "classes": classes}, {"out": out, "classes": wrong})
    assert found.too_different
    assert found.different is not None
    assert (found.different.name, found.different.different) == ("classes", 2.0)
    wrong[5:] = classes[5:]
    assert not compare_outputs({"classes": classes}, {"classes": wrong}).too_different
    holes = out.clone()
    holes[0, 0] = torch.nan
    assert compare_outputs({"out": out}, {"out": holes}).failure == "outputs are not finite"
    assert compare_outputs({"out": holes}, {"out": holes.clone()}).failure == ""


def test_shapes_that_depend_on_the_data_are_not_compared_and_others_fail() -> None:
    left, right = {"boxes": torch.zeros(4, 2)}, {"boxes": torch.zeros(3, 2)}
    assert "a width is written into code" in compare_outputs(left, right).failure
    found = compare_outputs(left, right, lambda: {"boxes"})
    assert (found.failure, found.outputs[0].not_compared) == ("", "its shape depends on the data and differs")
    shown = type("Cut", (), {"outputs": found.outputs, "error": 0.0, "precision": "float32"})
    assert "equals" not in _equality(shown)


def test_empty_channels_of_a_network_of_nan_are_not_cut() -> None:
    model = toys.Nowhere().eval()
    with torch.no_grad():
        model.stem[0].weight[0] = 0
        model.stem[1].weight[0] = 0
    with pytest.raises(PruningError, match="is not known: none of the network's outputs can be compared"):
        find_emptied(model, (torch.randn(2, *toys.SHAPE),))
    model = toys.Dict().eval()
    with torch.no_grad():
        model.stem[0].weight[0] = 0
        model.stem[1].weight[0] = 0
    assert find_emptied(model, (torch.randn(2, *toys.SHAPE),)).plan.tensors
