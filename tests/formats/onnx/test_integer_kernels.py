from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import cctool
from cctool.base.errors import ExportError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec
from cctool.formats.onnx import kernels
from cctool.formats.onnx.kernels import kernels_of, saturating_cpu


def written(path: Path, *, quantized_input: bool, quantized_output: bool, integers: bool) -> Path:
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {"s": np.float32(0.1), "z": np.uint8(0), "wz": np.int8(0)}
    constants["w"] = rng.integers(-9, 9, (4, 3, 3, 3)).astype(np.int8 if integers else np.float32)
    nodes, x, w, y = [], "x", "w", "y"
    if quantized_input:
        nodes.append(helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]))
        nodes.append(helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]))
        x = "xd"
    if integers:
        nodes.append(helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["wd"]))
        w = "wd"
    nodes.append(helper.make_node("Conv", [x, w], ["h" if quantized_output else y], "first"))
    if quantized_output:
        nodes.append(helper.make_node("QuantizeLinear", ["h", "s", "z"], ["hq"]))
        nodes.append(helper.make_node("DequantizeLinear", ["hq", "s", "z"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 6, 6))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4, 4, 4))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_a_layer_between_integers_runs_on_them(tmp_path: Path) -> None:
    found = kernels_of(
        written(tmp_path / "a.onnx", quantized_input=True, quantized_output=True, integers=True)
    )
    assert (found.integer, found.floating) == (1, ())


@pytest.mark.parametrize(
    ("ways", "reason"),
    [
        ((True, False, False), "its weight is in floating point"),
        ((False, True, True), "its input is not quantized"),
        ((True, False, True), "its output is not quantized"),
    ],
)
def test_what_runs_in_floating_point_is_named_with_the_reason(
    tmp_path: Path, ways: tuple[bool, bool, bool], reason: str
) -> None:
    names = ("quantized_input", "quantized_output", "integers")
    found = kernels_of(written(tmp_path / "a.onnx", **dict(zip(names, ways, strict=True))))
    assert found.integer == 0
    ((name, why),) = [(layer.name, layer.reason) for layer in found.floating]
    assert name == "first"
    assert why.startswith(reason)


class Tokens(nn.Module):
    """A layer over tokens, which is a matrix product in the file."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x[:, 0]).relu().mean(1))


@pytest.mark.parametrize("method", ["int4", "int8"])
def test_a_layer_whose_weight_alone_has_integers_is_compared_with_float_inputs(
    tmp_path: Path, method: str
) -> None:
    """Onnxruntime rounds the inputs of matrix products with such weights, which the file does not say."""
    spec = ModelSpec(architecture="tokens.py:Tokens", input_shape=(1, 8, 8))
    made, _ = cctool.quantize(Checkpoint(Tokens().eval(), spec), method=method, weight_only=True)
    _, report = cctool.export(made, output=str(tmp_path / "a.onnx"))
    (file,) = report.files
    assert file.verified == "verified"
    assert file.kernels is not None
    reasons = {layer.reason for layer in file.kernels.floating}
    rounded = "onnxruntime rounds its input to 8 bits unless session.qdq_matmulnbits_accuracy_level is 1"
    images = torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        expected = made.model(images)
    apart = {}
    for level in ("default", "1"):
        options = onnxruntime.SessionOptions()
        if level != "default":
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
        session = onnxruntime.InferenceSession(tmp_path / "a.onnx", options)
        (found,) = session.run(None, {"input": images.numpy()})
        apart[level] = float(abs(torch.from_numpy(found) - expected).max())
    assert apart["1"] < 1e-6
    # Versions before 1.25 or so have no such kernel for 8 bits.
    assert (apart["default"] > 1e-5) == (rounded in reasons)
    assert any("compared on inputs in floats" in note for note in file.notes) == (rounded in reasons)


def test_a_file_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="cannot optimize"):
        kernels_of(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "fpu avx2", True),
        ("x86_64", "fpu avx2 avx512_vnni", False),
        ("x86_64", "fpu avx_vnni", False),
        ("x86_64", None, False),
        ("aarch64", "fpu", False),
    ],
)
def test_cpus_that_saturate_are_known_by_their_flags(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: str | None, expected: bool
) -> None:
    text = "processor : 0\n" if flags is None else f"processor : 0\nflags\t\t: {flags}\n"
    monkeypatch.setattr(kernels.platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    saturating_cpu.cache_clear()
    try:
        assert saturating_cpu() is expected
    finally:
        saturating_cpu.cache_clear()
