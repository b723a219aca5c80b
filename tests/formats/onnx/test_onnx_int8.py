"""Quantized networks as ONNX files, from the network to onnxruntime's kernels."""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.base.errors import ExportError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec
from cctool.formats.onnx import write as writer
from cctool.formats.onnx.write import write_onnx
from cctool.formats.records import ExportRequest, Samples, Written
from cctool.quantization.export.network import export_network
from cctool.quantization.network.attach import attach, following_values
from cctool.quantization.network.calls import flow_of
from cctool.quantization.network.placement import plan_points
from cctool.quantization.network.points import CallPoint, WeightPoint, weight_key
from cctool.quantization.quantizers.config import QuantizerConfig

SHAPE = (3, 12, 12)


class Toy(nn.Module):
    """Residual addition, concatenation, depthwise and shared convolutions, pools, three activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.deep_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.narrow, self.narrow_norm = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(8 * 3 * 3, 16), nn.Linear(16 + 8, 5)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                with torch.no_grad():
                    module.weight[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.stem_norm(self.stem(x))), 2)
        y = F.relu6(self.deep_norm(self.deep(x)))
        y = self.shared(F.relu(self.shared(y)))
        y += x
        y = F.hardswish(self.narrow_norm(self.narrow(torch.cat((x, y), 1))))
        z = F.adaptive_avg_pool2d(y, 1).flatten(1)
        return self.head(torch.cat((F.relu(self.hidden(F.avg_pool2d(y, 2).flatten(1))), z), 1))


def quantized(model: nn.Module, bits: int = 8, method: Any = "uniform", *, signed: bool = False) -> nn.Module:
    images = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    model.eval()
    points = plan_points(flow_of(model, (images,)), "all")
    apot = method == "apot"
    weights = QuantizerConfig(method=method, bits=bits, narrow=not apot, axis=None if apot else 0)
    activations = QuantizerConfig(method="uniform", bits=bits, signed=signed, symmetric=signed)
    calls: dict[Any, dict[str, Any]] = {layer.place: {"weight": layer.weight} for layer in points.layers}
    for found in points.activations:
        calls.setdefault(found.place, {})[found.slot] = activations
    wanted = {
        layer.weight: WeightPoint(config=weights, channels=None if apot else layer.shape[0])
        for layer in points.layers
    }
    held = attach(model, wanted, {place: CallPoint(**call) for place, call in calls.items()})
    seen: dict[str, Any] = {}
    with torch.no_grad(), following_values(model, lambda key, value: seen.update({key: value.aminmax()})):
        model(images)
    for key in held.activation_keys:
        held.quantizer(key).set_range(*seen[key])  # type: ignore[union-attr]
    for name in wanted:
        held.quantizer(weight_key(name)).initialise(model.get_parameter(name))  # type: ignore[union-attr]
    return model


def request(model: nn.Module, path: Path, **changes: Any) -> ExportRequest:
    made = export_network(model, (torch.randn(2, *SHAPE),))
    checkpoint = Checkpoint(model, ModelSpec(architecture="toy", input_shape=SHAPE))
    given = {"network": made.model, "weights": made.weights, "quantized": True} | changes
    return ExportRequest(checkpoint, path, SHAPE, **given)


def samples(count: int = 128) -> Samples:
    images = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(5))
    return Samples("images", images.split(32))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Written]:
    model = quantized(Toy())
    path = tmp_path_factory.mktemp("int8") / "a.onnx"
    return model, write_onnx(request(model, path, samples=samples()))


def test_every_convolution_and_product_runs_on_integers(toy: tuple[nn.Module, Written]) -> None:
    kernels = toy[1].kernels
    assert kernels is not None
    assert (kernels.integer, kernels.floating) == (7, ())


@pytest.mark.parametrize("bits", [4, 8])
def test_signed_activations_run_on_integers_whatever_their_bits(tmp_path: Path, bits: int) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 5, 1))
    model = quantized(nn.Sequential(chain, nn.AdaptiveAvgPool2d(1), nn.Flatten()), bits, signed=True)
    file = write_onnx(request(model, tmp_path / "a.onnx", samples=samples()))
    assert file.kernels is not None
    assert (file.kernels.integer, file.kernels.floating) == (3, ())


def test_outputs_agree_within_steps_and_on_the_class(toy: tuple[nn.Module, Written]) -> None:
    random, data = toy[1].agreements[:2]
    assert random.batch_sizes == (1, 5, 238)
    assert (data.inputs, data.n) == ("images", 128)
    assert data.top1_agreement >= 99
    assert 0 < data.max_abs_error < 0.1 * data.output_range


@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_is_free(toy: tuple[nn.Module, Written], batch: int) -> None:
    session = onnxruntime.InferenceSession(toy[1].path, providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": torch.zeros(batch, *SHAPE).numpy()})[0].shape == (batch, 5)


def test_weights_are_bytes_and_biases_four(toy: tuple[nn.Module, Written]) -> None:
    model, written = toy
    document = onnx.load(written.path)
    types = {tensor.name: tensor.data_type for tensor in document.graph.initializer}
    for layer in ("stem", "deep", "shared", "narrow", "hidden", "head"):
        assert types[f"{layer}.weight.integers"] == onnx.TensorProto.INT8
        assert types[f"{layer}.bias.integers"] == onnx.TensorProto.INT32
    floats = sum(
        len(onnx.numpy_helper.to_array(tensor).reshape(-1))
        for tensor in document.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    )
    channels = sum(len(value) for name, value in model.named_parameters() if name.endswith("bias"))
    assert floats < 4 * channels
    kinds = Counter(node.op_type for node in document.graph.node)
    assert not kinds["BatchNormalization"] + kinds["Relu"] + kinds["Clip"]


def test_a_cpu_that_saturates_is_warned_about(toy: tuple[nn.Module, Written], tmp_path: Path) -> None:
    warned = any("VNNI" in note for note in toy[1].notes)
    assert warned is writer.saturating_cpu()


def test_four_bits_run_on_integers_in_bytes_and_take_half_where_asked(tmp_path: Path) -> None:
    model = quantized(Toy(), bits=4)
    whole = write_onnx(request(model, tmp_path / "a.onnx"))
    small = write_onnx(request(model, tmp_path / "b.onnx", packed=True))
    assert whole.kernels is not None
    assert (whole.kernels.integer, whole.kernels.floating) == (7, ())
    types = Counter(tensor.data_type for tensor in onnx.load(small.path).graph.initializer)
    assert types[onnx.TensorProto.INT4] >= 6
    assert onnx.load(small.path).opset_import[0].version == 21
    quarter = sum(value.numel() for name, value in model.named_parameters() if value.dim() > 1) // 4
    assert small.bytes < whole.bytes - quarter


def test_weights_on_no_grid_stay_float(tmp_path: Path) -> None:
    model = quantized(Toy(), bits=4, method="apot")
    written = write_onnx(request(model, tmp_path / "a.onnx", samples=samples()))
    assert written.agreements[1].top1_agreement >= 99


@pytest.mark.parametrize("what", ["scale", "zero"])
def test_a_wrong_number_is_noticed_and_leaves_no_file(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = writer.with_integers

    def wrong(document: Any, weights: Any, *, packed: bool) -> tuple[str, ...]:
        left = put(document, weights, packed=packed)
        name = "stem.weight.scale" if what == "scale" else "stem.bias.integers"
        for tensor in document.graph.initializer:
            if tensor.name == name:
                array = onnx.numpy_helper.to_array(tensor) * (1.5 if what == "scale" else 0)
                array = array.astype("float32" if what == "scale" else "int32")
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
        return left

    monkeypatch.setattr(writer, "with_integers", wrong)
    with pytest.raises(ExportError, match="does not compute what the model does"):
        write_onnx(request(quantized(Toy()), tmp_path / "a.onnx"))
    assert not list(tmp_path.iterdir())


def test_every_output_of_a_dict_is_compared_and_runs_on_integers(tmp_path: Path) -> None:
    class Two(Toy):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return {"out": out, "shares": [out.softmax(1)], "class": out.argmax(1)}

    file = write_onnx(request(quantized(Two()), tmp_path / "a.onnx", samples=samples()))
    assert file.kernels is not None
    assert (file.kernels.integer, file.kernels.floating) == (7, ())
    assert file.verified == "verified"
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["out", "shares.0", "class"]
    (out, shares, classes) = file.agreements[1].outputs
    assert out.max_abs_error is not None
    assert shares.max_abs_error is not None
    assert classes.elements == 128
    assert classes.different is not None
    assert classes.different < 10
