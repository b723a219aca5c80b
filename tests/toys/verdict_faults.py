"""Exports of the toys, faults planted in their ONNX files, and the code of the command that judges them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor

import cctool
import verdict_toys as toys
from cctool.base.errors import ExportError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec
from cctool.formats.onnx import write as writer
from cctool.formats.records import Agreement, ExportRequest, Samples
from cctool.formats.verdict.tally import by_place, squares

Array = np.ndarray[Any, Any]
Fault = Callable[[Any, "Exported", np.random.Generator], bool]

_LAYERS = ("Conv", "Gemm", "ConvTranspose", "MatMul")
_CLIPS = ("Relu", "Clip", "LeakyRelu")


@dataclass(frozen=True)
class Exported:
    """A written file with all that the command judged it by."""

    path: Path
    request: ExportRequest
    placed: Any
    free_batch: bool


def checkpoint(toy: str, steps: int, state: str) -> Checkpoint:
    """A toy after some steps of training, pruned, with quantizers or with a codec."""
    torch.manual_seed(1)
    model = toys.trained(toys.TOYS[toy](), steps, 0)
    architecture = f"{Path(toys.__file__).resolve()}:{type(model).__name__}"
    made = Checkpoint(model, ModelSpec(architecture=architecture, input_shape=toys.SHAPE))
    images = toys.pictures(64, 3)[0]
    if state in ("int8", "int4"):
        return cctool.quantize(made, method="int8", weight_bits=int(state[3:]), data=images, calibration=64)[
            0
        ]
    if state == "codec":
        first = next(
            n for n, m in model.named_modules() if isinstance(m, (torch.nn.ReLU, torch.nn.BatchNorm2d))
        )
        return cctool.transform(made, target="features", taps=[first], calibration=32, data=images)[0]
    if state == "pruned":
        return cctool.prune(made, method="l2", rate=0.3)[0]
    return made


def exported(made: Checkpoint, path: Path, *, data: bool = True) -> Exported:
    """Write a checkpoint as the command does, without judging the file."""
    seen: list[Exported] = []

    def record(temporary: Path, request: ExportRequest, placed: Any, *, free_batch: bool) -> list[Agreement]:
        seen.append(Exported(path, request, placed, free_batch))
        return []

    judge = writer.judge_onnx
    writer.judge_onnx = record  # type: ignore[assignment]
    try:
        cctool.export(made, output=str(path), force=True)
    finally:
        writer.judge_onnx = judge
    samples = Samples("pictures", toys.pictures(256, 11)[0].split(64)) if data else None
    return replace(seen[0], request=replace(seen[0].request, samples=samples))


def judged(made: Exported, path: Path, seed: int) -> list[Agreement] | ExportError:
    """What the command says of a file: how it agrees, or why it is refused."""
    try:
        request = replace(made.request, seed=seed)
        return writer.judge_onnx(path, request, made.placed, free_batch=made.free_batch)
    except ExportError as error:
        return error


def outputs_of(path: Path, x: Tensor) -> list[Tensor]:
    """What the file computes by the definitions of its operators, without a runtime's optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {"input": x.numpy()})]


def moved(made: Exported, path: Path, truth: list[Agreement]) -> float:
    """Largest movement of a channel that a fault makes, over the limit that was stated for the true file."""
    largest = 0.0
    inputs = {"random inputs": torch.randn(512, *toys.SHAPE), "pictures": toys.pictures(512, 77)[0]}
    for agreement in (one for one in truth if one.inputs in inputs):
        x = inputs[agreement.inputs]
        both = zip(agreement.outputs, outputs_of(made.path, x), outputs_of(path, x), strict=True)
        for output, left, right in both:
            if output.limit is None:
                continue
            apart = squares(left, right, len(x)).mean(0).sqrt()
            signals = (by_place(left, len(x)) - by_place(left, len(x)).mean(0)).square().mean((0, 2)).sqrt()
            # A limit in ulps is one of each channel's own values; others are shares of its signal.
            sizes = by_place(left, len(x)).abs().amax((0, 2)) if output.limit_from == "ulps" else signals
            share = output.limit / float(sizes[output.place] or 1.0)
            stated = (sizes * share).clamp(min=1e-30)
            largest = max(largest, float((apart / stated).max()))
    return largest


def plant(made: Exported, fault: str, path: Path, seed: int) -> bool:
    """Write a copy of a file with a fault; False where there is no place for it."""
    document = onnx.load(made.path)
    if not FAULTS[fault](document, made, np.random.default_rng(seed)):
        return False
    onnx.save(document, path)
    return True


def _constants(document: Any) -> Iterator[tuple[str, Any]]:
    for tensor in document.graph.initializer:
        yield tensor.name, tensor
    for node in document.graph.node:
        if node.op_type == "Constant":
            yield from ((node.output[0], a.t) for a in node.attribute if a.name == "value")


def _constant(document: Any, name: str) -> Any | None:
    return next((tensor for key, tensor in _constants(document) if key == name), None)


def _source(document: Any, name: str) -> Any | None:
    """The constant behind a value, through DequantizeLinear."""
    found = _constant(document, name)
    if found is not None:
        return found
    node = next((n for n in document.graph.node if name in n.output), None)
    return (
        _source(document, node.input[0]) if node is not None and node.op_type == "DequantizeLinear" else None
    )


def _put(tensor: Any, array: Array) -> None:
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        raw = onnx.helper.make_tensor(
            tensor.name, tensor.data_type, array.shape, array.astype(np.int32).ravel()
        )
        tensor.CopyFrom(raw)
        return
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _layers(document: Any, inputs: int) -> list[Any]:
    found = [n for n in document.graph.node if n.op_type in _LAYERS and len(n.input) >= inputs]
    return [n for n in found if _source(document, n.input[inputs - 1]) is not None]


def _swapped(document: Any, made: Exported, draw: np.random.Generator) -> bool:
    """Two output channels of a weight change places."""
    node = draw.choice(np.array(_layers(document, 2), dtype=object))
    tensor = _source(document, node.input[1])
    array = numpy_helper.to_array(tensor).copy()
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    axis = (
        1 if node.op_type in ("ConvTranspose", "MatMul") or (node.op_type == "Gemm" and not transposed) else 0
    )
    if array.shape[axis] < 2:
        return False
    a, b = draw.choice(array.shape[axis], 2, replace=False)
    order = np.arange(array.shape[axis])
    order[[a, b]] = order[[b, a]]
    _put(tensor, np.take(array, order, axis))
    return True


def _zero_point(document: Any, made: Exported, draw: np.random.Generator) -> bool:
    """The zero point of one DequantizeLinear is off by 2."""
    nodes = [n for n in document.graph.node if n.op_type == "DequantizeLinear" and len(n.input) > 2]
    nodes = [n for n in nodes if _constant(document, n.input[2]).data_type != onnx.TensorProto.INT32]
    if not nodes:
        return False
    node = draw.choice(np.array(nodes, dtype=object))
    tensor = _constant(document, node.input[2])
    array = numpy_helper.to_array(tensor).astype(np.int32)
    low, high = {3: (-128, 127), 2: (0, 255), 22: (-8, 7), 21: (0, 15)}[tensor.data_type]
    array = np.where(array + 2 <= high, array + 2, np.maximum(array - 2, low))
    fresh = onnx.TensorProto()
    fresh.CopyFrom(tensor)
    fresh.name = f"{node.input[2]}_off"
    if tensor.data_type in (3, 2):
        array = array.astype(np.int8 if tensor.data_type == 3 else np.uint8)
    _put(fresh, array)
    document.graph.initializer.append(fresh)
    node.input[2] = fresh.name
    return True


def _deviations(made: Exported, value: str) -> Array:
    """Standard deviation of each channel of a value of the true file, over pictures."""
    document = onnx.load(made.path)
    document.graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(document.SerializeToString(), options)
    found = session.run([value], {"input": toys.pictures(128, 21)[0].numpy()})[0]
    return found.std(axis=tuple(i for i in range(found.ndim) if i != 1))


def _bias(document: Any, made: Exported, draw: np.random.Generator) -> bool:
    """A bias is off by a quarter of the deviation of its channel's values."""
    nodes = [n for n in _layers(document, 3) if n.op_type != "MatMul"]
    if not nodes:
        return False
    node = draw.choice(np.array(nodes, dtype=object))
    tensor = _source(document, node.input[2])
    array, deviations = numpy_helper.to_array(tensor).copy(), _deviations(made, node.output[0])
    channel = int(draw.integers(len(array)))
    off = deviations[channel] / 4
    if tensor.data_type == onnx.TensorProto.INT32:
        maker = next(n for n in document.graph.node if node.input[2] in n.output)
        scale = numpy_helper.to_array(_constant(document, maker.input[1])).reshape(-1)
        off = round(off / scale[channel if len(scale) > 1 else 0])
    array[channel] += off
    _put(tensor, array)
    return True


def _activation(document: Any, made: Exported, draw: np.random.Generator) -> bool:
    """An activation that clips at least 5 % of its values is missing."""
    nodes = [n for n in document.graph.node if n.op_type in _CLIPS]
    while nodes:
        node = nodes.pop(int(draw.integers(len(nodes))))
        if _clipped(made, node) >= 0.05:
            break
    else:
        return False
    for other in document.graph.node:
        for position, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[position] = node.input[0]
    kept = [n for n in document.graph.node if node.output[0] not in n.output]
    if any(output.name == node.output[0] for output in document.graph.output):
        return False
    del document.graph.node[:]
    document.graph.node.extend(kept)
    return True


def _clipped(made: Exported, node: Any) -> float:
    document = onnx.load(made.path)
    for name in (node.input[0], node.output[0]):
        document.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(document.SerializeToString(), options)
    x = toys.pictures(64, 21)[0].numpy()
    before, after = session.run([node.input[0], node.output[0]], {"input": x})
    return float((before != after).mean())


FAULTS: dict[str, Fault] = {
    "swapped": _swapped,
    "zero point": _zero_point,
    "bias": _bias,
    "activation": _activation,
}
