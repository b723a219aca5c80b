"""ONNX files: what they hold, and that what is wrong never gets its name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import CheckpointError, ExportError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec, Parent, Preprocessing, Step
from cctool.formats.onnx import write as writer
from cctool.formats.onnx.write import write_onnx
from cctool.formats.records import ExportRequest, Samples
from cctool.models import registry

SHAPE = (3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def checkpoint(model: nn.Module, **spec: Any) -> Checkpoint:
    given = {"architecture": "net.py:net", "input_shape": SHAPE} | spec
    origin = Parent(path="a.pt", content="c" * 64, file="f" * 64)
    step = Step(verb="train", options={}, seed=0)
    return Checkpoint(model, ModelSpec(**given), history=(step,), origin=origin)


def request(model: nn.Module, path: Path, **changes: Any) -> ExportRequest:
    return ExportRequest(checkpoint(model), path, SHAPE, **changes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = Net()
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    made = checkpoint(
        model,
        classes=("ä", "b", "c", "d"),
        preprocessing=Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    )
    write_onnx(ExportRequest(made, path, SHAPE))
    return model, path


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnxruntime_gives_the_models_outputs(exported: tuple[nn.Module, Path], batch: int) -> None:
    model, path = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(batch, *SHAPE)
    (found,) = session.run(["logits"], {"input": x.numpy()})
    with torch.no_grad():
        expected = model.eval()(x).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_file_says_what_it_is(exported: tuple[nn.Module, Path]) -> None:
    document = onnx.load(exported[1])
    about = {entry.key: entry.value for entry in document.metadata_props}
    assert document.producer_name == "cctool"
    assert document.graph.name == about["cctool.architecture"] == "net.py:net"
    assert about["cctool.input_shape"] == "3x8x8"
    assert json.loads(about["cctool.mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(about["cctool.std"]) == [0.4, 0.5, 0.6]
    assert json.loads(about["cctool.classes"]) == ["ä", "b", "c", "d"]
    assert about["cctool.source_content_sha256"] == "c" * 64
    assert about["cctool.history"] == "train"
    (entry,), (leaving,) = document.graph.input, document.graph.output
    assert [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    assert [d.dim_param or d.dim_value for d in leaving.type.tensor_type.shape.dim] == ["batch", 4]


def test_the_file_says_nothing_of_the_machine(exported: tuple[nn.Module, Path]) -> None:
    content = exported[1].read_bytes()
    assert b"stack_trace" not in content
    assert b'.py"' not in content
    assert b"torch.nn" not in content
    assert str(Path.cwd()).encode() not in content


def test_batch_norm_is_folded_and_dropout_gone(exported: tuple[nn.Module, Path]) -> None:
    kinds = {node.op_type for node in onnx.load(exported[1]).graph.node}
    assert not kinds & {"BatchNormalization", "Dropout"}


def test_equal_networks_give_equal_bytes_and_are_left_alone(
    exported: tuple[nn.Module, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Net()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (tmp_path / name for name in ("a.onnx", "b.onnx"))
    for path in (first, second):
        write_onnx(request(model, path))
    assert first.read_bytes() == second.read_bytes()
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert capfd.readouterr().out == ""


def test_agreements_are_reported(tmp_path: Path) -> None:
    samples = Samples("ten images", [torch.randn(6, *SHAPE), torch.randn(4, *SHAPE)])
    written = write_onnx(request(Net(), tmp_path / "a.onnx", samples=samples))
    random, real = written.agreements
    assert (random.inputs, random.n, random.batch_sizes) == ("random inputs", 256, (1, 5, 238))
    assert (real.inputs, real.n, real.batch_sizes) == ("ten images", 10, (4, 6))
    assert real.top1_agreement == 100.0
    assert real.max_abs_error < 1e-5
    assert written.notes == ()
    assert written.bytes == (tmp_path / "a.onnx").stat().st_size


def test_a_network_that_the_exporter_misreads_gets_no_file(tmp_path: Path) -> None:
    class Moody(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            # torch.export takes a free size to be two or more and drops this branch without a word.
            return -out if x.shape[0] == 1 else out

    with pytest.raises(ExportError, match="does not compute what the model does"):
        write_onnx(request(Moody(), tmp_path / "a.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_batch_is_the_fallback_and_is_said(tmp_path: Path) -> None:
    class OneByOne(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super(OneByOne, self).forward(image[None]) for image in x])

    samples = Samples("four images", [torch.randn(4, *SHAPE)])
    written = write_onnx(request(OneByOne(), tmp_path / "a.onnx", samples=samples))
    assert "batch size is fixed to 1" in written.notes[0]
    assert {agreement.batch_sizes for agreement in written.agreements} == {(1,)}
    assert written.agreements[1].n == 4
    dims = onnx.load(tmp_path / "a.onnx").graph.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_value == 1


def test_what_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    class Impossible(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.linalg.svdvals(x[:, :, :4, :4]).sum()

    with pytest.raises(ExportError) as caught:
        write_onnx(request(Impossible(), tmp_path / "a.onnx"))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_several_outputs_are_all_compared_and_named(tmp_path: Path) -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return {"main": out, "side": out.softmax(1)}

    write_onnx(request(Two(), tmp_path / "a.onnx"))
    assert [output.name for output in onnx.load(tmp_path / "a.onnx").graph.output] == ["main", "side"]


def test_nan_is_refused_unless_allowed(tmp_path: Path) -> None:
    model = Net()
    with torch.no_grad():
        model.head.bias[1] = torch.nan
    with pytest.raises(ExportError, match="NaN"):
        write_onnx(request(model, tmp_path / "a.onnx"))
    assert list(tmp_path.iterdir()) == []
    write_onnx(request(model, tmp_path / "a.onnx", allow_nonfinite=True))
    assert (tmp_path / "a.onnx").exists()


def test_a_constant_network_is_called_one(tmp_path: Path) -> None:
    model = Net()
    with torch.no_grad():
        model.head.weight.zero_()
    written = write_onnx(request(model, tmp_path / "a.onnx"))
    assert any("says little" in note for note in written.notes)


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        write_onnx(request(Net(), path))
    assert path.read_text() == "mine"


def test_weights_beyond_one_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_LARGEST", 100)
    with pytest.raises(ExportError, match="at most 2"):
        write_onnx(request(Net(), tmp_path / "a.onnx"))


def test_training_mode_leftovers_are_refused(tmp_path: Path) -> None:
    inputs = [
        onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("x", [1, 2]), *((v, [2]) for v in "smab"))
    ]
    node = onnx.helper.make_node("BatchNormalization", ["x", *"smab"], ["y", "c", "d"], training_mode=1)
    outputs = [
        onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("y", [1, 2]), ("c", [2]), ("d", [2]))
    ]
    graph = onnx.helper.make_graph([node], "g", inputs, outputs)
    document = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(document, tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="training mode"):
        writer._check(tmp_path / "a.onnx")


def own(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    arguments = registry.defaults(name, channels=3, classes=10)
    if "googlenet" in name:
        arguments["init_weights"] = False
    torch.manual_seed(0)
    return registry.build(name, arguments), registry.input_shape(name, arguments, (3, 32, 32))


def liven(model: nn.Module) -> None:
    """Zero-initialised scales and fresh statistics would let half of a network's faults pass."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def export_architecture(name: str, path: Path) -> None:
    model, shape = own(name)
    liven(model)
    made = checkpoint(model, architecture=name, input_shape=shape)
    written = write_onnx(ExportRequest(made, path, shape))
    assert written.agreements[0].batch_sizes[:2] == (1, 5)
    assert written.agreements[0].output_range > 0
    assert not any("fixed" in note for note in written.notes)


@pytest.mark.parametrize("name", ["lenet", "resnet20", "mobilenet_student"])
def test_own_architectures(name: str, tmp_path: Path) -> None:
    export_architecture(name, tmp_path / "a.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "alexnet", "resnet32", "preact_resnet20", "vgg11", "vgg16", "vgg19", "densenet40", "resnet110",
        "torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:densenet121",
        "torchvision:googlenet", "torchvision:shufflenet_v2_x0_5", "torchvision:inception_v3",
        "torchvision:swin_t", "torchvision:regnet_y_400mf",
    ],
)  # fmt: skip
def test_larger_architectures(name: str, tmp_path: Path) -> None:
    export_architecture(name, tmp_path / "a.onnx")


@pytest.mark.cuda
def test_a_network_on_the_gpu_gives_the_same_file(tmp_path: Path) -> None:
    model = Net()
    write_onnx(request(model, tmp_path / "cpu.onnx"))
    write_onnx(request(model.cuda(), tmp_path / "cuda.onnx"))
    assert (tmp_path / "cpu.onnx").read_bytes() == (tmp_path / "cuda.onnx").read_bytes()
