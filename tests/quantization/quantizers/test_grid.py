"""Uniform grids against numpy and onnxruntime's own operators."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from cctool.quantization.quantizers.grid import Grid, extremes, fitted


def whole(scale: float, zero_point: int = 0, low: int = -128, high: int = 127) -> Grid:
    return Grid(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), low, high)


def quantized_by_onnx(x: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the operators QuantizeLinear and DequantizeLinear make of x, along dimension 0, in int8."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["n"], axis=0),
        helper.make_node("DequantizeLinear", ["n", "scale", "zero"], ["y"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info("n", TensorProto.INT8, x.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape),
        ],
        [
            onnx.numpy_helper.from_array(scale.numpy(), "scale"),
            onnx.numpy_helper.from_array(zero_point.numpy().astype(np.int8), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    n, y = session.run(None, {"x": x.numpy()})
    return n, y


def test_integers_and_values_are_those_of_the_onnx_operators() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.5, 0.013, 3.0])
    zero = torch.tensor([0, -7, 100], dtype=torch.int32)
    x = torch.randn(3, 400, generator=generator) * 60 * scale[:, None]
    # Ties, where rounding before or after adding an odd zero point differ.
    x[:, :9] = (torch.arange(9) - 4.5) * scale[:, None]
    grid = Grid(scale, zero, -128, 127, 0)
    n, y = quantized_by_onnx(x, scale, zero)
    assert np.array_equal(grid.integers(x).numpy(), n)
    assert np.array_equal(grid.values(grid.integers(x)).numpy(), y)
    assert np.array_equal(grid.nearest(x).numpy(), y)
    assert len(np.unique(n)) > 100


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert whole(1.0).integers(x).tolist() == [-2, -2, 0, 0, 2, 2]
    assert whole(1.0, 3).integers(x).tolist() == [1, 1, 3, 3, 5, 5]


def test_values_beyond_the_ends_are_clamped() -> None:
    grid = whole(0.5, 1, 0, 7)
    x = torch.tensor([-9.0, -0.5, 3.0, 99.0, float("inf"), -float("inf")])
    assert grid.integers(x).tolist() == [0, 0, 7, 7, 7, 0]
    assert grid.nearest(x).tolist() == [-0.5, -0.5, 3.0, 3.0, 3.0, -0.5]


def test_a_scale_of_zero_makes_zero_of_everything() -> None:
    grid = Grid(torch.tensor([0.0, 1.0]), torch.tensor([5, 5], dtype=torch.int32), 0, 15, 1)
    x = torch.tensor([[0.0, 0.0], [3.0, 3.0], [-1e30, 1e30], [float("inf"), -float("inf")]])
    assert grid.nearest(x).tolist() == [[0.0, 0.0], [0.0, 3.0], [0.0, 10.0], [0.0, -5.0]]
    assert grid.integers(x)[:2].tolist() == [[5, 5], [5, 8]]


def test_nan_stays_nan_and_is_the_zero_point_among_integers() -> None:
    x = torch.tensor([float("nan"), 1.0])
    assert whole(1.0, 4).nearest(x).isnan().tolist() == [True, False]
    assert whole(1.0, 4).integers(x).tolist() == [4, 5]


def test_no_value_is_minus_zero() -> None:
    assert not whole(1.0).nearest(torch.tensor([-0.0, -0.2])).signbit().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_type_of_the_values_is_kept(dtype: torch.dtype) -> None:
    found = whole(0.25).nearest(torch.tensor([0.3, -1.1], dtype=dtype))
    assert found.dtype == dtype
    assert found.tolist() == [0.25, -1.0]


def test_float64_is_computed_in_float64() -> None:
    x = torch.tensor(1000.5 + 1e-9, dtype=torch.float64)
    grid = whole(1.0, 0, -32768, 32767)
    assert grid.integers(x).item() == 1001
    assert grid.integers(x.float()).item() == 1000


def test_the_table_holds_the_value_of_every_integer() -> None:
    assert whole(0.5, 1, 0, 3).table().tolist() == [-0.5, 0.0, 0.5, 1.0]
    slices = Grid(torch.tensor([1.0, 2.0]), torch.tensor([0, 1], dtype=torch.int32), 0, 2, 3)
    assert slices.table().tolist() == [[0.0, 1.0, 2.0], [-2.0, 0.0, 2.0]]


def test_inputs_are_not_written_to() -> None:
    x, n = torch.tensor([0.7]), torch.tensor([3.0])
    whole(0.5).nearest(x)
    whole(0.5).values(n)
    assert (x.item(), n.item()) == (pytest.approx(0.7), 3.0)


@pytest.mark.parametrize(
    ("low", "high", "limits", "scale"),
    [
        (-1.0, 0.5, (-128, 127), 1 / 128),
        (-1.0, 1.0, (-128, 127), 1 / 127),
        (-1.0, 0.5, (-127, 127), 1 / 127),
        (0.25, 0.5, (-128, 127), 0.5 / 127),
        (-9.0, 3.0, (0, 15), 3 / 15),
        (-9.0, -3.0, (0, 15), 0.0),
        (0.0, 0.0, (-8, 7), 0.0),
    ],
)
def test_a_symmetric_scale_is_the_least_that_holds_the_range(
    low: float, high: float, limits: tuple[int, int], scale: float
) -> None:
    found, zero = fitted(torch.tensor(low), torch.tensor(high), limits, symmetric=True)
    assert found.item() == np.float32(scale)
    assert (zero.item(), zero.dtype) == (0, torch.int32)


@pytest.mark.parametrize(
    ("low", "high", "limits", "scale", "zero"),
    [
        (-1.0, 3.0, (0, 255), 4 / 255, 64),
        (-1.0, 3.0, (-128, 127), 4 / 255, -64),
        (2.0, 3.0, (0, 255), 3 / 255, 0),
        (-3.0, -2.0, (0, 255), 3 / 255, 255),
        (0.0, 0.0, (-8, 7), 0.0, -8),
    ],
)
def test_an_asymmetric_range_reaches_from_end_to_end(
    low: float, high: float, limits: tuple[int, int], scale: float, zero: int
) -> None:
    found, point = fitted(torch.tensor(low), torch.tensor(high), limits, symmetric=False)
    assert found.item() == np.float32(scale)
    assert point.item() == zero


def test_ranges_that_are_not_numbers_become_finite_grids() -> None:
    ends = torch.tensor([float("nan"), float("inf"), 3e38])
    for symmetric in (True, False):
        for limits in ((-128, 127), (0, 1), (-32768, 32767)):
            scale, zero = fitted(-ends, ends, limits, symmetric=symmetric)
            assert scale[0] == 0
            assert torch.isfinite(Grid(scale, zero, *limits, 0).table()).all()


@given(
    st.floats(-1e6, 0, width=32),
    st.floats(0, 1e6, width=32),
    st.sampled_from([(-128, 127), (0, 255), (-2, 1), (0, 1), (-32767, 32767)]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_everything_in_the_range_comes_back_within_half_a_step(
    low: float, high: float, limits: tuple[int, int], symmetric: bool
) -> None:
    if symmetric and limits[0] == 0:
        low = 0.0
    scale, zero = fitted(torch.tensor(low), torch.tensor(high), limits, symmetric=symmetric)
    grid = Grid(scale, zero, *limits)
    x = torch.linspace(low, high, 101, dtype=torch.float64).clamp(low, high)
    # Rounding an asymmetric zero point moves the ends by half a step more; scales below float32's normal
    # numbers are rounded by up to 2^-150, and count that for every integer.
    allowed = scale.item() * (0.5 if symmetric else 1.0) + 1e-6 * max(-low, high)
    allowed += (limits[1] - limits[0] + 1) * 2.0**-149
    assert (grid.nearest(x) - x).abs().max().item() <= allowed
    assert grid.nearest(torch.zeros(1)).item() == 0
    values = grid.table()
    assert torch.equal(grid.nearest(values), values)


def test_extremes_along_an_axis_and_of_nothing() -> None:
    x = torch.tensor([[[1.0, -2.0]], [[5.0, 3.0]]])
    for axis, low, high in ((0, [-2.0, 3.0], [1.0, 5.0]), (2, [1.0, -2.0], [5.0, 3.0])):
        found = extremes(x, axis)
        assert (found[0].tolist(), found[1].tolist()) == (low, high)
    assert [end.item() for end in extremes(x, None)] == [-2.0, 5.0]
    assert [end.tolist() for end in extremes(torch.tensor([4.0, -1.0]), 0)] == [[4.0, -1.0]] * 2
    assert [end.tolist() for end in extremes(torch.zeros(3, 0), 0)] == [[0.0] * 3] * 2
    assert [end.item() for end in extremes(torch.zeros(0), None)] == [0.0, 0.0]
