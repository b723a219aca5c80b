"""Every output of a network is exported by its name, and compared."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import output_toys as toys
from cctool.base.errors import ExportError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec
from cctool.formats.onnx.write import write_onnx
from cctool.formats.pt2 import write_pt2
from cctool.formats.records import ExportRequest
from cctool.formats.verdict.compare import compare, random_batches, require_agreement
from cctool.formats.verdict.rounding import runner_of
from cctool.models.registry import build
from cctool.tasks.regression import Regression
from cctool.tasks.segmentation import Segmentation

SHAPE = toys.SHAPE


def request(model: nn.Module, path: Path, shape: Any = SHAPE, **changes: Any) -> ExportRequest:
    spec = ModelSpec(architecture="net.py:net", input_shape=shape)
    return ExportRequest(Checkpoint(model.eval(), spec), path, shape, **changes)


def flat(outputs: Any) -> list[Tensor]:
    return [value for value in torch.utils._pytree.tree_leaves(outputs) if isinstance(value, Tensor)]


def assert_onnxruntime_agrees(path: Path, model: nn.Module, names: list[str], shape: Any, batch: int) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == names
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = flat(model(x))
    for name, found, value in zip(names, session.run(None, {"input": x.numpy()}), expected, strict=True):
        assert found.dtype == value.numpy().dtype, name
        np.testing.assert_allclose(found, value.numpy(), atol=1e-5 * max(1, float(value.abs().max())))


@pytest.mark.parametrize(
    ("toy", "names"),
    [
        (toys.Dict, ["out", "aux", "classes"]),
        # `input` is the name of the input.
        (toys.Nested, ["boxes.0", "boxes.1", "input_2", "relu"]),
        (toys.Pair, ["logits", "output1"]),
        (toys.Classes, ["output"]),
        (toys.Heads, ["output"]),
        (toys.YoloLike, ["small", "medium", "large"]),
    ],
)
def test_onnx_files_name_their_outputs(toy: type[nn.Module], names: list[str], tmp_path: Path) -> None:
    model = toy()
    written = write_onnx(request(model, tmp_path / "a.onnx"))
    assert written.verified == "verified"
    for batch in (1, 3):
        assert_onnxruntime_agrees(tmp_path / "a.onnx", model, names, SHAPE, batch)
    assert not model._forward_hooks


def test_what_is_no_tensor_is_left_out_with_a_note(tmp_path: Path) -> None:
    notes = write_onnx(request(toys.Dict(), tmp_path / "a.onnx")).notes
    assert "size is no tensor but a value of type int: left out" in notes


def test_pt2_keeps_the_structure(tmp_path: Path) -> None:
    model = toys.Nested().eval()
    (found,) = write_pt2(request(model, tmp_path / "a.pt2")).agreements
    assert [output.name for output in found.outputs] == ["boxes.0", "boxes.1", "input", "relu"]
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        read = torch.export.load(tmp_path / "a.pt2").module()(x)
        assert torch.allclose(read["boxes"][1], model(x)["boxes"][1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "shape", "names"),
    [
        ("lraspp_mobilenet_v3_large", {"num_classes": 3}, (3, 64, 64), ["out"]),
        ("ssdlite320_mobilenet_v3_large", {"num_classes": 3}, (3, 64, 64), ["bbox_regression", "cls_logits"]),
    ],
)
def test_torchvisions_dicts_are_exported(
    name: str, arguments: Any, shape: Any, names: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build(f"torchvision:{name}", arguments).eval()
    written = write_onnx(request(model, tmp_path / "a.onnx", shape))
    assert [output.name for output in written.agreements[0].outputs] == names
    detects = name.startswith("ssd")
    assert any("ends at what the detector's head puts out" in note for note in written.notes) == detects
    reference = model
    if detects:

        class Head(nn.Module):
            def forward(self, x: Tensor) -> Any:
                images, _ = model.transform(list(x))
                return model.head(list(model.backbone(images.tensors).values()))

        reference = Head()
    assert_onnxruntime_agrees(tmp_path / "a.onnx", reference, names, shape, 1)


def off(model: nn.Module, index: int, change: Any) -> Any:
    """A program that is right but for one output."""

    def candidate(batch: Tensor) -> list[Tensor]:
        found = runner_of(model)(batch)
        found[index] = change(found[index])
        return found

    return candidate


def test_an_error_is_judged_by_the_range_of_its_own_output() -> None:
    class Scaled(toys.Heads):
        def form(self, out: Tensor, aux: Tensor) -> Any:
            return {"large": 1e4 * out, "small": aux}

    model = Scaled().eval()
    same = compare(model, runner_of(model), random_batches(SHAPE, 0), "noise")
    assert [output.name for output in same.outputs] == ["large", "small"]
    assert same.outputs[0].output_range == same.output_range > 1e3 * (same.outputs[1].output_range or 0)
    # An error of a thousandth of the small one's range is a millionth of the large one's.
    with pytest.raises(ExportError, match=r"its output small is off by up to 0\.001"):
        compare(model, off(model, 1, lambda v: v + 1e-3), random_batches(SHAPE, 0), "noise")


def test_whole_numbers_are_compared_too() -> None:
    model = toys.Dict().eval()

    def few(value: Tensor) -> Tensor:
        value[0, 0, 0] = 3 - value[0, 0, 0]
        return value

    found = compare(model, off(model, 2, few), random_batches(SHAPE, 0), "noise")
    # One pixel of 256 in each of six batches.
    assert found.outputs[2].elements == 18 * 256
    assert found.outputs[2].different == pytest.approx(100 * 6 / (18 * 256))
    with pytest.raises(ExportError, match=r"4,608 of 4,608 elements of its output classes differ"):
        compare(model, off(model, 2, lambda v: v + 1), random_batches(SHAPE, 0), "noise")


def test_a_task_says_what_is_chosen_alike() -> None:
    model = toys.Dict().eval()
    batches = list(random_batches(SHAPE, 0))
    shift = torch.zeros(4)[:, None, None]
    shift[0] = 1e-6
    found = compare(model, off(model, 0, lambda v: v + shift), iter(batches), "noise", task=Segmentation())
    with torch.no_grad():
        outs = [model(batch)["out"].numpy() for batch in batches]
    same = np.concatenate([((o + shift.numpy()).argmax(1) == o.argmax(1)).reshape(-1) for o in outs])
    assert found.choices is not None
    assert (found.choices.name, found.choices.n) == ("pixels", 18 * 256)
    assert found.choices.percent == pytest.approx(100 * same.mean())
    assert found.top1_agreement is None
    assert compare(model, runner_of(model), iter(batches), "noise", task=Regression()).choices is None
    # Without a task nothing is chosen: `out` is no scores of classes (N, C).
    plain = compare(model, runner_of(model), iter(batches), "noise")
    assert plain.choices is None
    require_agreement(plain)


def test_lengths_that_depend_on_the_data_are_compared_where_they_agree() -> None:
    model = toys.Detections().eval()
    calls = []

    def cut_short(value: Tensor) -> Tensor:
        calls.append(value)
        return value[:-1] if len(calls) % 2 else value

    found = compare(model, off(model, 0, cut_short), random_batches(SHAPE, 0, (2,)), "noise")
    boxes = found.outputs[0]
    assert (boxes.name, boxes.other_shapes, boxes.not_compared) == ("0.boxes", 2, "")
    assert boxes.elements == sum(value.numel() for value in calls[1::2])
    never = compare(model, off(model, 0, lambda v: v[:-1]), random_batches(SHAPE, 0, (2,)), "noise")
    assert "depends on the data" in never.outputs[0].not_compared
    # The labels have five rows whatever the data.
    with pytest.raises(ExportError, match="puts out"):
        compare(model, off(model, 1, lambda v: v[:-1]), random_batches(SHAPE, 0, (2,)), "noise")


def test_nan_everywhere_is_never_verified(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="allow-nonfinite"):
        write_onnx(request(toys.Nowhere(), tmp_path / "a.onnx"))
    written = write_onnx(request(toys.Nowhere(), tmp_path / "a.onnx", allow_nonfinite=True))
    assert written.verified == "not verified: none of its outputs could be compared"
    assert written.agreements[0].lines() == ["output: not compared, it holds nothing but NaN and infinities"]
    partly = write_onnx(request(toys.Partly(), tmp_path / "b.onnx", allow_nonfinite=True))
    assert partly.verified == "verified"


def test_an_output_that_cannot_be_compared_is_named(tmp_path: Path) -> None:
    class Holes(toys.Heads):
        def form(self, out: Tensor, aux: Tensor) -> Any:
            return {"out": out, "none": aux[:, :0], "nan": aux * torch.nan}

    written = write_onnx(request(Holes(), tmp_path / "a.onnx", allow_nonfinite=True))
    assert written.verified == "verified but for none, nan, which could not be compared"
