"""Weights of an ONNX graph as integers: initializers of 8 or 4 bits with a DequantizeLinear.

Weights are found by their values, bit for bit, which are those of the exported network: names and layouts
differ between versions of the exporter, which may also transpose a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cctool.formats.onnx.chains import DQ, average_pools, drop_clips, grid_of, quantize_moves
from cctool.formats.onnx.graph import OnnxGraph
from cctool.quantization.export.integer_weights import IntegerWeight

Array = np.ndarray[Any, Any]

PACKED_OPSET = 21
"""The first opset whose initializers may be integers of 4 bits."""

_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")
_FINE = 7
"""Bits that narrower integers are scaled up to: the steps of biases become finer, and 7 never saturate."""

_LARGEST_BIAS = 2.0**30  # in steps: an int32 with a bit to spare
_TINY = 1e-30  # least scale, which must not become 0 in float32
_BIAS_DIGITS = 2.0**24
"""Steps of a bias if its channel's weights are all 0, so that the scale is free."""


@dataclass(frozen=True, eq=False)
class Placed:
    """What became of the weights of a graph.

    Attributes:
        missing: names of the weights that were not found in the graph and stay in floating point.
        changed: constants of the network whose values are others in the file, because it holds them as
            integers: before and after, float32 of one shape.
    """

    missing: tuple[str, ...] = ()
    changed: tuple[tuple[Array, Array], ...] = ()


def with_integers(document: Any, weights: Sequence[IntegerWeight], *, packed: bool) -> Placed:
    """Replace float weights by integers, in place, and bring activations into the form of integer kernels.

    Args:
        document: what torch's exporter made of an export network.
        weights: of that network.
        packed: whether integers of 4 bits and fewer take half a byte, which needs opset 21.
    """
    graph = OnnxGraph(document)
    average_pools(graph)
    quantize_moves(graph)
    drop_clips(graph)
    weighing = _Weights(graph, weights, packed=packed)
    missing = weighing.place()
    graph.close()
    return Placed(missing, tuple(weighing.changed))


def _values_of(weight: IntegerWeight) -> tuple[tuple[int, ...], bytes]:
    """Shape and bytes of a weight, by which a constant is recognised."""
    values = weight.values().numpy()
    return values.shape, values.tobytes()


class _Weights:
    def __init__(self, graph: OnnxGraph, weights: Sequence[IntegerWeight], *, packed: bool) -> None:
        self.graph, self.weights, self.packed = graph, weights, packed
        self.changed: list[tuple[Array, Array]] = []
        self._known: dict[bytes, str] = {}

    def place(self) -> tuple[str, ...]:
        constants = self._matched()
        for node in list(self.graph.nodes):
            for position, name in enumerate(node.input):
                if name in constants and node.op_type != "Constant":
                    self._replace(node, position, *constants[name])
        self.graph.index()
        # Weights of equal values, such as zeros, are one constant to the graph.
        found = {_values_of(weight) for weight, _ in constants.values()}
        return tuple(dict.fromkeys(w.name for w in self.weights if _values_of(w) not in found))

    def _matched(self) -> dict[str, tuple[IntegerWeight, bool]]:
        """Float constants that are weights, by their name in the graph; whether each is transposed there."""
        known: dict[tuple[tuple[int, ...], bytes], tuple[IntegerWeight, bool]] = {}
        for weight in self.weights:
            values = weight.values().numpy()
            known[_values_of(weight)] = weight, False
            if values.ndim == 2:
                known.setdefault((values.T.shape, values.T.tobytes()), (weight, True))
        found = {}
        for name, array in self.graph.floats():
            match = known.get((array.shape, array.tobytes()))
            # A constant of one element could equal a weight by chance.
            if match is not None and array.size > 1:
                found[name] = match
        return found

    def _replace(self, node: Any, position: int, weight: IntegerWeight, transposed: bool) -> None:
        half, given = self.packed and weight.bits <= 4, weight.values()
        weight = weight if half else weight.finer(_FINE)
        title = weight.name.removesuffix(".weight")
        grid = grid_of(self.graph, node.input[0]) if position == 1 else None
        biased = position == 1 and node.op_type in _WITH_BIAS and len(node.input) > 2
        bias = self.graph.constant(node.input[2]) if biased and node.input[2] else None
        whole = bias is not None and self.graph.attribute(node, "alpha", 1.0) == 1.0
        # onnxruntime computes layers with 4-bit weights in floating point, and so their bias.
        whole = whole and self.graph.attribute(node, "beta", 1.0) == 1.0 and not half
        if grid is not None and whole and bias is not None:
            step = self.graph.constant(grid[0])
            assert step is not None
            weight = _holding(weight, bias, float(step))
        else:
            weight = _positive(weight)
        if not torch.equal(weight.values(), given):
            self.changed.append((given.numpy(), weight.values().numpy()))
        axis = weight.axis if weight.axis is None or not transposed else 1 - weight.axis
        integers, scale = weight.integers.numpy(), weight.scale.numpy()
        inputs = [
            self._integers(f"{weight.name}.integers", integers.T if transposed else integers, weight),
            self._constant(f"{weight.name}.scale", scale),
            self._zero(f"{weight.name}.zero_point", weight),
        ]
        node.input[position] = self._dequantized(node, inputs, weight.name, axis)
        if grid is not None and whole and bias is not None and bias.ndim == 1:
            self._bias(node, title, bias, grid[0], scale)
        if position == 1 and node.op_type in (*_WITH_BIAS, "MatMul"):
            node.name = self.graph.fresh(title or node.op_type)

    def _dequantized(self, node: Any, inputs: list[str], name: str, axis: int | None) -> str:
        made = self.graph.node(DQ, inputs, f"{name}.dequantized", **({} if axis is None else {"axis": axis}))
        self.graph.insert([made], before=node)
        output: str = made.output[0]
        return output

    def _bias(self, node: Any, title: str, bias: Array, step: str, scale: Array) -> None:
        """Store a bias as int32 in steps of the products, the scale of an integer kernel's accumulator."""
        given = self.graph.constant(step)
        assert given is not None
        products = (given.reshape(()) * scale).astype(np.float32)
        integers = np.round(bias.astype(np.float64) / products).astype(np.int32)
        self.changed.append((bias, integers.astype(np.float32) * products))
        inputs = [
            self.graph.add_constant(f"{title}.bias.integers", integers),
            self._constant(f"{title}.bias.scale", products),
            self._constant("zero", np.zeros(products.shape, np.int32)),
        ]
        node.input[2] = self._dequantized(node, inputs, f"{title}.bias", 0 if products.ndim else None)

    def _integers(self, name: str, integers: Array, weight: IntegerWeight) -> str:
        if self.packed and weight.bits <= 4:
            return self._half_bytes(name, integers, signed=weight.low < 0)
        return self._constant(name, integers.astype(np.int8 if weight.low < 0 else np.uint8))

    def _zero(self, name: str, weight: IntegerWeight) -> str:
        zero = weight.zero_point.numpy()
        if self.packed and weight.bits <= 4:
            return self._half_bytes(name, zero, signed=weight.low < 0)
        # One for each use: onnxruntime's mode without saturation fails on shared ones.
        return self.graph.add_constant(name, zero.astype(np.int8 if weight.low < 0 else np.uint8))

    def _constant(self, name: str, array: Array) -> str:
        """An initializer of these values; an existing one if type and values are equal."""
        key = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        if key not in self._known:
            self._known[key] = self.graph.add_constant(name, array)
        return self._known[key]

    def _half_bytes(self, name: str, array: Array, *, signed: bool) -> str:
        from onnx import TensorProto, helper

        codes = (array.reshape(-1) & 15).astype(np.uint8)
        codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
        raw = (codes[::2] | codes[1::2] << 4).tobytes()
        key = f"{signed}half{array.shape}".encode() + raw
        if key not in self._known:
            kind = TensorProto.INT4 if signed else TensorProto.UINT4
            tensor = helper.make_tensor(self.graph.fresh(name), kind, list(array.shape), raw, raw=True)
            self._known[key] = self.graph.add_tensor(tensor)
        return self._known[key]


def _positive(weight: IntegerWeight) -> IntegerWeight:
    """The weight with scales of 0 replaced by 1, and integers there that mean 0."""
    dead = weight.scale == 0
    if not bool(dead.any()):
        return weight
    return _rescaled(weight, torch.where(dead, 1.0, weight.scale))


def _holding(weight: IntegerWeight, bias: Array, step: float) -> IntegerWeight:
    """The weight with larger scales where the bias would not fit in 32 bits; free scales suit the bias.

    Args:
        weight: of one layer.
        bias: float32 [C].
        step: quantization step of the layer's input.
    """
    size = torch.from_numpy(np.abs(bias)).double()
    alive = _aligned(weight, weight.scale) > 0
    steps = (weight.integers - _aligned(weight, weight.zero_point)).abs() * alive
    if weight.axis is None:
        size, empty = size.amax(), ~steps.any()
    else:
        empty = steps.movedim(weight.axis, 0).flatten(1).amax(1) == 0
    least = size / (step * _LARGEST_BIAS)
    free = torch.where(size > 0, (size / (step * _BIAS_DIGITS)).clamp(min=_TINY), 1.0)
    scale = torch.where(empty, free, torch.maximum(weight.scale.double(), least)).float()
    return weight if torch.equal(scale, weight.scale) else _rescaled(weight, scale)


def _rescaled(weight: IntegerWeight, scale: torch.Tensor) -> IntegerWeight:
    """The nearest integers for other scales and the same zero points."""
    zero = _aligned(weight, weight.zero_point)
    steps = (weight.integers - zero).double() * _aligned(weight, weight.scale.double())
    n = (steps / _aligned(weight, scale.double())).round() + zero
    return replace(weight, integers=n.clamp(weight.low, weight.high).int(), scale=scale)


def _aligned(weight: IntegerWeight, state: torch.Tensor) -> torch.Tensor:
    if weight.axis is None:
        return state
    return state.reshape([-1 if dim == weight.axis else 1 for dim in range(weight.integers.dim())])
