"""`cctool export` of quantized networks and of weights that checkpoints store as integers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from cctool.base.errors import UsageError
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.spec import ModelSpec
from cctool.formats.records import Written
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations.inspect.export import run
from cctool.operations.registries import tables
from cctool.options.common import RuntimeOptions
from cctool.options.inspect.export import ExportFormat, ExportOptions
from cctool.quantization.encodings.intn import INTN
from cctool.quantization.encodings.masked import MASKED
from cctool.quantization.encodings.uint8 import AFFINE_U8
from cctool.quantization.export.network import made_weights
from cctool.quantization.network.attach import attach, following_values
from cctool.quantization.network.calls import flow_of
from cctool.quantization.network.edit import with_quantizers
from cctool.quantization.network.placement import plan_points
from cctool.quantization.network.points import CallPoint, WeightPoint, weight_key
from cctool.quantization.quantizers.config import QuantizerConfig

SPEC = ModelSpec(architecture="lenet", input_shape=(1, 32, 32))


def network() -> Any:
    torch.manual_seed(0)
    return registry.build("lenet", {}).eval()


def stored(path: Path, encoding: Any, parameters: dict[str, Any]) -> Path:
    model, forms = network(), {}
    for name, value in model.named_parameters():
        if value.dim() > 1:
            forms[name] = encoding.encode(value, parameters)
            value.data = encoding.decode(forms[name])
    save(Checkpoint(model, SPEC, stored=forms), path, tables())
    return path


def quantized(path: Path, bits: int = 8) -> Path:
    model, images = network(), torch.randn(4, 1, 32, 32)
    points = plan_points(flow_of(model, (images,)), "all")
    weights = QuantizerConfig(method="uniform", bits=bits, narrow=True, axis=0)
    activations = QuantizerConfig(method="uniform", bits=8, signed=False, symmetric=False)
    calls: dict[Any, dict[str, Any]] = {layer.place: {"weight": layer.weight} for layer in points.layers}
    for found in points.activations:
        calls.setdefault(found.place, {})[found.slot] = activations
    wanted = {layer.weight: WeightPoint(config=weights, channels=layer.shape[0]) for layer in points.layers}
    held = attach(model, wanted, {place: CallPoint(**call) for place, call in calls.items()})
    seen: dict[str, Any] = {}
    with torch.no_grad(), following_values(model, lambda key, value: seen.update({key: value.aminmax()})):
        model(images)
    for key in held.activation_keys:
        held.quantizer(key).set_range(*seen[key])  # type: ignore[union-attr]
    for name in wanted:
        held.quantizer(weight_key(name)).initialise(model.get_parameter(name))  # type: ignore[union-attr]
    save(Checkpoint(model, with_quantizers(SPEC, model)), path, tables())
    return path


def exported(source: Path, **options: Any) -> Written:
    request = pipeline.Request(verb="export", source=str(source), runtime=RuntimeOptions(device="cpu"))
    (file,) = pipeline.read(run, ExportOptions(**options), request).files
    return file


@pytest.mark.parametrize("axis", [None, 0])
def test_stored_integers_stay_integers(tmp_path: Path, axis: int | None) -> None:
    parameters = {"bits": 8, "symmetric": True, "axis": axis, "group": None}
    source = stored(tmp_path / "a.pt", INTN, parameters)
    file = exported(source)
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(file.path).graph.initializer}
    integers = [name for name, kind in kinds.items() if kind == onnx.TensorProto.INT8 and "integers" in name]
    weights = [name for name, value in load(source, tables()).model.named_parameters() if value.dim() > 1]
    assert len(integers) == len(weights)
    assert file.bytes < 1.2 * sum(value.numel() for value in network().parameters())
    assert file.kernels is not None
    assert {layer.reason for layer in file.kernels.floating} == {"its input is not quantized"}


def test_masked_weights_that_are_stored_as_integers_are_integers(tmp_path: Path) -> None:
    inner = {"inner": "intn", "axis": 0, "bits": 8, "symmetric": True, "group": None}
    file = exported(stored(tmp_path / "a.pt", MASKED, inner))
    assert file.bytes < 1.2 * sum(value.numel() for value in network().parameters())
    assert not any("written in floating point" in note for note in file.notes)


def test_weights_behind_quantizers_are_not_called_floating_point(tmp_path: Path) -> None:
    model = load(quantized(tmp_path / "a.pt"), tables())
    weight = made_weights(model.model)["features.3.weight"]
    model.model.get_parameter("features.3.weight").data = weight
    form = MASKED.encode(weight, {"inner": None, "axis": None})
    save(replace(model, stored={"features.3.weight": form}), tmp_path / "b.pt", tables())
    file = exported(tmp_path / "b.pt")
    assert file.kernels is not None
    assert not file.kernels.floating
    assert not any("written in floating point" in note for note in file.notes)


def test_other_stored_forms_are_float_and_named(tmp_path: Path) -> None:
    file = exported(stored(tmp_path / "a.pt", AFFINE_U8, {"axis": None}))
    assert any("written in floating point" in note for note in file.notes)
    assert file.bytes > 4 * sum(value.numel() for value in network().parameters())


def test_quantized_networks_get_integer_kernels_and_halves_of_bytes_where_asked(tmp_path: Path) -> None:
    source = quantized(tmp_path / "a.pt", bits=4)
    file = exported(source, output=str(tmp_path / "a.onnx"))
    assert file.kernels is not None
    assert file.kernels.integer >= 4
    assert not file.kernels.floating
    small = exported(source, output=str(tmp_path / "b.onnx"), int4=True)
    assert small.bytes < 0.7 * file.bytes


def test_programs_and_bare_tensors_hold_what_the_quantizers_make(tmp_path: Path) -> None:
    source = quantized(tmp_path / "a.pt", bits=4)
    made = made_weights(load(source, tables()).model)
    program = exported(source, format=ExportFormat.PT2)
    assert Path(program.path) == tmp_path / "a.pt2"
    assert torch.export.load(program.path).state_dict.keys() >= made.keys()
    bare = exported(source, format=ExportFormat.STATE_DICT)
    tensors = torch.load(bare.path, weights_only=True)
    assert tensors.keys() == network().state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in made.items())
    assert any("in floating point here" in note for note in bare.notes)


def test_half_bytes_are_for_onnx_and_need_few_bits(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--int4 is for ONNX"):
        ExportOptions(output="a.pt2", int4=True)
    file = exported(quantized(tmp_path / "a.pt"), int4=True)
    assert any("--int4: the network has no weights" in note for note in file.notes)
