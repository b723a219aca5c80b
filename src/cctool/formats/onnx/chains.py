"""Rewrites chains of quantized activations in an ONNX graph so that onnxruntime runs them on integers.

Its integer kernels replace a node between DequantizeLinear and QuantizeLinear. So nodes that only move values
get both, a clipping that the range of the integers implies is removed, and means over feature maps become the
operator that has an integer kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cctool.formats.onnx.graph import OnnxGraph
from cctool.quantization.export.onnx_operator import ON_GRID

_MOVES = frozenset((
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Identity",
    "DepthToSpace", "SpaceToDepth",
))  # fmt: skip
_TYPES = {"b": (-128, 127), "B": (0, 255)}
Q, DQ = "QuantizeLinear", "DequantizeLinear"


def rounding() -> dict[Any, Any]:
    """How torch's exporter writes `on_grid`: QuantizeLinear, Clip where 8 bits hold more, and back."""
    from onnx import TensorProto, helper
    from onnxscript import opset18

    op: Any = opset18

    def write(x: Any, scale: float, zero_point: int, low: int, high: int) -> Any:
        if low < 0 and (low, high) not in _TYPES.values():
            # onnxruntime converts signed bytes to unsigned ones by itself, but not before a Clip.
            zero_point, low, high = zero_point + 128, low + 128, high + 128
        kind = TensorProto.UINT8 if low >= 0 else TensorProto.INT8

        def integer(value: int) -> Any:
            return op.Constant(value=helper.make_tensor("", kind, [], [value]))

        step = op.Constant(value=helper.make_tensor("", TensorProto.FLOAT, [], [scale]))
        zero = integer(zero_point)
        n = op.QuantizeLinear(x, step, zero)
        if (low, high) not in _TYPES.values():
            n = op.Clip(n, integer(low), integer(high))
        return op.DequantizeLinear(n, step, zero)

    return {ON_GRID: write}


def grid_of(graph: OnnxGraph, name: str) -> tuple[str, str] | None:
    """Names of scale and zero point of the DequantizeLinear that makes a value from 8-bit integers."""
    node = graph.maker(name)
    if node is None or node.op_type != DQ or len(node.input) < 3:
        return None
    scale, zero = graph.constant(node.input[1]), graph.constant(node.input[2])
    if scale is None or zero is None or scale.size != 1 or zero.dtype.char not in _TYPES:
        return None
    return node.input[1], node.input[2]


def quantize_moves(graph: OnnxGraph) -> None:
    """Quantize the outputs of nodes that only move quantized values, on the same grid."""
    for node in list(graph.nodes):
        if node.op_type not in _MOVES or not node.input or not _pads_zeros(graph, node):
            continue
        grid = grid_of(graph, node.input[0])
        if grid is None:
            continue
        for output in node.output:
            takers = graph.takers(output)
            if output in graph.outputs or not takers or all(taker.op_type == Q for taker in takers):
                continue
            after = _requantized(graph, output, grid)
            graph.rename(output, after[-1].output[0], takers)
            graph.insert(after, after=node)
            graph.index()


def _requantized(graph: OnnxGraph, value: str, grid: Sequence[str]) -> list[Any]:
    """A QuantizeLinear of a value, and the DequantizeLinear behind it, on a grid."""
    down = graph.node(Q, (value, *grid), f"{value}_quantized")
    return [down, graph.node(DQ, (down.output[0], *grid), f"{value}_dequantized")]


def _pads_zeros(graph: OnnxGraph, node: Any) -> bool:
    if node.op_type != "Pad" or graph.attribute(node, "mode", b"constant") != b"constant":
        return True
    value = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
    return value is not None and not value.any()


def average_pools(graph: OnnxGraph) -> None:
    """Write means over the height and width of quantized maps as GlobalAveragePool."""
    ranks = _ranks(graph)
    for node in list(graph.nodes):
        if node.op_type != "ReduceMean" or len(node.input) < 2:
            continue
        axes, grid = graph.constant(node.input[1]), grid_of(graph, node.input[0])
        output = node.output[0]
        takers = graph.takers(output)
        if axes is None or grid is None or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        if ranks.get(output) != (4 if (keeps := graph.attribute(node, "keepdims", 1)) else 2):
            continue
        pool = graph.node("GlobalAveragePool", node.input[:1], f"{output}_pooled")
        added = [pool]
        if keeps:
            pool.output[0] = output
        else:
            made = pool.output[0]
            if len(takers) == 1 and takers[0].op_type == Q and output not in graph.outputs:
                added += _requantized(graph, made, takers[0].input[1:])
                made = added[-1].output[0]
            flat = graph.node("Flatten", (made,), f"{output}_flat", axis=1)
            flat.output[0] = output
            added.append(flat)
        graph.insert(added, before=node)
        graph.nodes = [other for other in graph.nodes if other is not node]
        graph.index()


def _ranks(graph: OnnxGraph) -> dict[str, int]:
    return {
        entry.name: len(entry.type.tensor_type.shape.dim)
        for entry in (*graph.graph.value_info, *graph.graph.output)
        if entry.type.tensor_type.HasField("shape")
    }


def drop_clips(graph: OnnxGraph) -> None:
    """Remove each Relu and Clip that changes nothing, because the quantization after it clips as much."""
    for node in list(graph.nodes):
        while node.op_type == Q:
            before = graph.maker(node.input[0])
            if before is None or not _redundant(graph, before, node):
                break
            node.input[0] = before.input[0]
            graph.index()


def _redundant(graph: OnnxGraph, clip: Any, quantize: Any) -> bool:
    scale, zero = graph.constant(quantize.input[1]), graph.constant(quantize.input[2])
    if clip.op_type not in ("Relu", "Clip"):
        return False
    if len(graph.takers(clip.output[0])) != 1 or clip.output[0] in graph.outputs:
        return False
    if scale is None or zero is None or scale.size != 1 or zero.dtype.char not in _TYPES:
        return False
    bounds: list[float] = []
    for i, other in ((1, -np.inf), (2, np.inf)):
        if clip.op_type == "Relu":
            bounds.append(0.0 if i == 1 else np.inf)
        elif len(clip.input) > i and clip.input[i]:
            value = graph.constant(clip.input[i])
            if value is None:
                return False
            bounds.append(float(value))
        else:
            bounds.append(other)
    low, high = _limits(graph, quantize, zero)
    # Values clipped to a bound round to its integer, which must be at the end of the range or beyond.
    at_bounds = [np.round(np.float32(bound) / np.float32(scale)) + float(zero) for bound in bounds]
    return bool(at_bounds[0] <= low and at_bounds[1] >= high)


def _limits(graph: OnnxGraph, quantize: Any, zero: Any) -> tuple[int, int]:
    low, high = _TYPES[zero.dtype.char]
    takers = graph.takers(quantize.output[0])
    if len(takers) == 1 and takers[0].op_type == "Clip" and len(takers[0].input) == 3:
        bounds = [graph.constant(name) for name in takers[0].input[1:]]
        if bounds[0] is not None and bounds[1] is not None:
            return max(low, int(bounds[0])), min(high, int(bounds[1]))
    return low, high
