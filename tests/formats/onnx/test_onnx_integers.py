from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from cctool.formats.onnx.integers import with_integers
from cctool.quantization.export.integer_weights import IntegerWeight

SCALE, ZERO = 0.05, 128


def weight(
    name: str, shape: tuple[int, ...], *, axis: int | None = 0, bits: int = 8, signed: bool = True
) -> IntegerWeight:
    generator = torch.Generator().manual_seed(len(shape))
    low, high = (-(1 << (bits - 1)) + 1, (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    integers = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int32)
    size = () if axis is None else (shape[axis],)
    scale = torch.rand(size, generator=generator) / 100 + 0.001
    zero = torch.full(size, 0 if signed else 3, dtype=torch.int32)
    return IntegerWeight(name, integers, scale, zero, axis, low, high)


def dequantized(name: str, grid: str = "g") -> list[Any]:
    return [
        helper.make_node(
            "QuantizeLinear", [name, f"{grid}_scale", f"{grid}_zero"], [f"{name}_q"], f"{name}_q"
        ),
        helper.make_node(
            "DequantizeLinear", [f"{name}_q", f"{grid}_scale", f"{grid}_zero"], [f"{name}_dq"], f"{name}_dq"
        ),
    ]


def document(
    nodes: list[Any],
    constants: dict[str, Any],
    shape: tuple[int, ...] = (2, 3, 6, 6),
    out: int = 4,
    zero: int = ZERO,
    opset: int = 20,
) -> Any:
    given = {"g_scale": np.float32(SCALE), "g_zero": np.uint8(zero), **constants}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * out)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in given.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made)


def result(made: Any, x: Any, *, optimized: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def images(shape: tuple[int, ...] = (2, 3, 6, 6)) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def kinds(made: Any) -> Counter[str]:
    return Counter(node.op_type for node in made.graph.node)


def convolution(w: IntegerWeight, bias: Any, **attributes: Any) -> Any:
    nodes = [*dequantized("x"), helper.make_node("Conv", ["x_dq", "w", "b"], ["y"], "c", **attributes)]
    return document(nodes, {"w": w.values().numpy(), "b": bias})


def stored(made: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in made.graph.initializer}


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("signed", [True, False])
def test_a_convolution_gets_integers_that_stand_for_the_same(axis: int | None, signed: bool) -> None:
    w = weight("conv.weight", (5, 3, 3, 3), axis=axis, signed=signed)
    bias = np.linspace(-1, 1, 5, dtype=np.float32)
    made = convolution(w, bias)
    before = result(made, images())
    assert with_integers(made, [w], packed=False).missing == ()
    onnx.checker.check_model(made, full_check=True)
    tensors = stored(made)
    kept = tensors["conv.weight.integers"]
    assert kept.data_type == (TensorProto.INT8 if signed else TensorProto.UINT8)
    assert np.array_equal(numpy_helper.to_array(kept), w.integers.numpy())
    n = numpy_helper.to_array(tensors["conv.bias.integers"])
    products = np.float32(SCALE) * w.scale.numpy()
    assert n.dtype == np.int32
    assert np.array_equal(n, np.round(bias.astype(np.float64) / products))
    assert not {"w", "b"} & tensors.keys()
    assert np.abs(result(made, images()) - before).max() <= products.max() / 2 + 1e-5
    assert "conv" in {node.name for node in made.graph.node}


def test_without_a_quantized_input_the_bias_stays_float_and_outputs_equal() -> None:
    w = weight("conv.weight", (5, 3, 3, 3))
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], "c")]
    made = document(nodes, {"w": w.values().numpy(), "b": np.ones(5, np.float32)})
    before = result(made, images())
    with_integers(made, [w], packed=False)
    assert stored(made)["b"].data_type == TensorProto.FLOAT
    assert np.array_equal(result(made, images()), before)


@pytest.mark.parametrize(("kind", "transposed"), [("Gemm", False), ("Gemm", True), ("MatMul", True)])
@pytest.mark.parametrize("axis", [0, None])
def test_products_with_matrices_are_found_in_either_layout(
    kind: str, transposed: bool, axis: int | None
) -> None:
    w = weight("head.weight", (4, 6), axis=axis)
    values = w.values().numpy()
    attributes = {} if kind == "MatMul" or transposed else {"transB": 1}
    inputs = ["x_dq", "w"] if kind == "MatMul" else ["x_dq", "w", "b"]
    nodes = [*dequantized("x"), helper.make_node(kind, inputs, ["y"], "c", **attributes)]
    made = document(
        nodes, {"w": values.T.copy() if transposed else values, "b": np.ones(4, np.float32)}, (2, 6), 2
    )
    before = result(made, images((2, 6)))
    assert with_integers(made, [w], packed=False).missing == ()
    onnx.checker.check_model(made, full_check=True)
    assert np.abs(result(made, images((2, 6))) - before).max() < 1e-3
    assert np.abs(result(made, images((2, 6)), optimized=True) - before).max() < 1e-3


def test_a_weight_that_two_layers_take_is_stored_once() -> None:
    w = weight("shared.weight", (3, 3, 1, 1))
    nodes = [
        *dequantized("x"),
        helper.make_node("Conv", ["x_dq", "w"], ["h"], "c"),
        *dequantized("h"),
        helper.make_node("Conv", ["h_dq", "w"], ["y"], "d"),
    ]
    made = document(nodes, {"w": w.values().numpy()})
    before = result(made, images())
    with_integers(made, [w], packed=False)
    assert (
        sum(
            tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 4
            for tensor in made.graph.initializer
        )
        == 1
    )
    assert np.array_equal(result(made, images()), before)
    assert {"shared", "shared_1"} <= {node.name for node in made.graph.node}


def test_weights_of_equal_values_are_all_found() -> None:
    w = weight("conv.weight", (5, 3, 3, 3))
    made = convolution(w, np.zeros(5, np.float32))
    assert with_integers(made, [w, replace(w, name="twin.weight")], packed=False).missing == ()


def test_what_is_not_in_the_graph_is_told() -> None:
    made = convolution(weight("conv.weight", (5, 3, 3, 3)), np.zeros(5, np.float32))
    other = weight("other.weight", (5, 3, 3, 3), bits=4)
    assert with_integers(made, [other], packed=False).missing == ("other.weight",)
    assert stored(made)["w"].data_type == TensorProto.FLOAT


@pytest.mark.parametrize("bias", [0.0, 3.7, -1e4])
def test_a_channel_of_zeros_gives_its_bias(bias: float) -> None:
    w = weight("conv.weight", (2, 3, 1, 1))
    w.integers[0] = 0
    made = convolution(w, np.array([bias, 1.0], np.float32))
    with_integers(made, [w], packed=False)
    np.testing.assert_allclose(result(made, images())[:, 0], bias, rtol=1e-6)


def test_a_bias_beyond_32_bits_takes_larger_steps() -> None:
    w = weight("conv.weight", (2, 3, 1, 1))
    w.scale[:] = 1e-9
    made = convolution(w, np.array([100.0, 1e-9], np.float32))
    before = result(made, images())
    with_integers(made, [w], packed=False)
    np.testing.assert_allclose(result(made, images()), before, rtol=1e-6)
    assert np.abs(numpy_helper.to_array(stored(made)["conv.bias.integers"])).max() <= 2**30 + 1


@pytest.mark.parametrize("signed", [True, False])
def test_packed_integers_take_half_a_byte(signed: bool) -> None:
    w = weight("conv.weight", (5, 3, 3, 3), bits=4, signed=signed)
    nodes = [*dequantized("x"), helper.make_node("Conv", ["x_dq", "w"], ["y"], "c")]
    made = document(nodes, {"w": w.values().numpy()}, opset=21)
    before = result(made, images())
    with_integers(made, [w], packed=True)
    onnx.checker.check_model(made, full_check=True)
    kept = stored(made)["conv.weight.integers"]
    assert kept.data_type == (TensorProto.INT4 if signed else TensorProto.UINT4)
    assert len(kept.raw_data) == 68
    assert np.array_equal(numpy_helper.to_array(kept).astype(int), w.integers.numpy())
    assert np.array_equal(result(made, images()), before)


def test_what_moves_values_is_quantized_on_both_sides() -> None:
    shape = np.array([0, -1], np.int64)
    nodes = [
        *dequantized("x"),
        helper.make_node("MaxPool", ["x_dq"], ["p"], "p", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["p", "shape"], ["f"], "f"),
        helper.make_node("Gemm", ["f", "w"], ["y"], "c", transB=1),
    ]
    w = weight("head.weight", (4, 27))
    made = document(nodes, {"w": w.values().numpy(), "shape": shape}, out=2)
    before = result(made, images())
    with_integers(made, [w], packed=False)
    assert kinds(made)["QuantizeLinear"] == 3
    assert np.array_equal(result(made, images()), before)


@pytest.mark.parametrize("keepdims", [0, 1])
def test_means_over_maps_become_the_operator_with_an_integer_kernel(keepdims: int) -> None:
    nodes = [
        *dequantized("x"),
        helper.make_node("ReduceMean", ["x_dq", "axes"], ["m"], "m", keepdims=keepdims),
        *dequantized("m"),
        helper.make_node("Identity", ["m_dq"], ["y"]),
    ]
    made = document(nodes, {"axes": np.array([-1, -2], np.int64)}, out=4 if keepdims else 2)
    before = result(made, images())
    with_integers(made, [], packed=False)
    onnx.checker.check_model(made, full_check=True)
    assert kinds(made)["GlobalAveragePool"] == 1
    assert not kinds(made)["ReduceMean"]
    np.testing.assert_allclose(result(made, images()), before, atol=SCALE)
    assert result(made, images()).shape == before.shape


def test_means_over_other_dimensions_stay() -> None:
    nodes = [*dequantized("x"), helper.make_node("ReduceMean", ["x_dq", "axes"], ["y"], "m")]
    made = document(nodes, {"axes": np.array([1, 2], np.int64)})
    with_integers(made, [], packed=False)
    assert kinds(made)["ReduceMean"] == 1


@pytest.mark.parametrize(
    ("zero", "clip", "dropped"),
    [
        (0, "Relu", True),
        (1, "Relu", False),
        (0, (0.0, 13.0), True),
        (0, (0.0, 12.73), True),
        (0, (0.0, 6.0), False),
        (128, (-7.0, 7.0), True),
        (128, (-3.0, 7.0), False),
    ],
)
def test_a_clip_goes_only_where_the_integers_range_does_the_same(zero: int, clip: Any, dropped: bool) -> None:
    inputs = ["x"] if clip == "Relu" else ["x", "low", "high"]
    bounds = {} if clip == "Relu" else {"low": np.float32(clip[0]), "high": np.float32(clip[1])}
    nodes = [
        helper.make_node("Relu" if clip == "Relu" else "Clip", inputs, ["r"], "r"),
        *dequantized("r"),
        helper.make_node("Identity", ["r_dq"], ["y"]),
    ]
    made = document(nodes, bounds, zero=zero)
    x = np.linspace(-20, 20, 216, dtype=np.float32).reshape(2, 3, 6, 6)
    before = result(made, x)
    with_integers(made, [], packed=False)
    assert np.array_equal(result(made, x), before)
    assert (not kinds(made)["Relu"] + kinds(made)["Clip"]) is dropped


def test_few_bits_are_clipped_integers_which_drop_clips_too() -> None:
    nodes = [
        helper.make_node("Clip", ["x", "low", "high"], ["r"], "r"),
        helper.make_node("QuantizeLinear", ["r", "g_scale", "g_zero"], ["q"], "q"),
        helper.make_node("Clip", ["q", "none", "most"], ["n"], "n"),
        helper.make_node("DequantizeLinear", ["n", "g_scale", "g_zero"], ["y"], "d"),
    ]
    bounds = {"low": np.float32(0), "high": np.float32(6), "none": np.uint8(0), "most": np.uint8(15)}
    made = document(nodes, bounds, zero=0)
    x = np.linspace(-20, 20, 216, dtype=np.float32).reshape(2, 3, 6, 6)
    before = result(made, x)
    with_integers(made, [], packed=False)
    assert kinds(made)["Clip"] == 1
    assert np.array_equal(result(made, x), before)
