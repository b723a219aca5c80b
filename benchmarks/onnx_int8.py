"""Exported int8 networks against onnxruntime's own static quantization: speed, bytes, kernels.

Both get the same float network and the same calibration images: ours is quantized, exported as
`cctool export` does it, and the peer's is the float file after `quant_pre_process` and `quantize_static`
(QDQ, per channel; activations int8, its default, and uint8). All files then take turns in one process, two
threads, one image at a time.

    python benchmarks/onnx_int8.py [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torchvision
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import record
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec
from cctool.formats.onnx.kernels import saturating_cpu
from cctool.formats.onnx.write import write_onnx
from cctool.formats.records import ExportRequest, Written
from cctool.quantization.export.network import export_network
from cctool.quantization.network.attach import attach, following_values
from cctool.quantization.network.calls import flow_of
from cctool.quantization.network.placement import plan_points
from cctool.quantization.network.points import CallPoint, WeightPoint, weight_key
from cctool.quantization.quantizers.config import QuantizerConfig

SEED = 0
NETWORKS = ("resnet18", "mobilenet_v2")
SHAPE = (3, 224, 224)
IMAGES = 32
THREADS = 2


def network(name: str, images: torch.Tensor) -> torch.nn.Module:
    """Random weights, and the statistics that such weights have on the images."""
    torch.manual_seed(SEED)
    model: torch.nn.Module = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def quantize(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Eight bits everywhere, ranges from the smallest and largest values on the images."""
    points = plan_points(flow_of(model, (images[:2],)), "all")
    weights = QuantizerConfig(method="uniform", bits=8, narrow=True, axis=0)
    activations = QuantizerConfig(method="uniform", bits=8, signed=False, symmetric=False)
    calls: dict[Any, dict[str, Any]] = {}
    for layer in points.layers:
        calls.setdefault(layer.place, {})["weight"] = layer.weight
    for activation in points.activations:
        calls.setdefault(activation.place, {})[activation.slot] = activations
    held = attach(
        model,
        {layer.weight: WeightPoint(config=weights, channels=layer.shape[0]) for layer in points.layers},
        {place: CallPoint(**call) for place, call in calls.items()},
    )
    ranges: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def follow(key: str, value: torch.Tensor) -> None:
        low, high = torch.aminmax(value)
        before = ranges.get(key, (low, high))
        ranges[key] = torch.minimum(before[0], low), torch.maximum(before[1], high)

    with torch.no_grad(), following_values(model, follow):
        for image in images.split(8):
            model(image)
    for layer in points.layers:
        quantizer = held.quantizer(weight_key(layer.weight))
        assert quantizer is not None
        quantizer.initialise(model.get_parameter(layer.weight))
        ranges.pop(weight_key(layer.weight), None)
    for key, (low, high) in ranges.items():
        quantizer = held.quantizer(key)
        assert quantizer is not None
        quantizer.set_range(low, high)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Gives the calibration images one by one."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images: Iterator[torch.Tensor] = iter(images.split(1))

    def get_next(self) -> dict[str, Any] | None:
        """The next image, or None at the end."""
        image = next(self.images, None)
        return None if image is None else {"input": image.numpy()}


def peer(source: Path, target: Path, images: torch.Tensor, activations: Any) -> None:
    prepared = source.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared),
        str(target),
        Reader(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=activations,
        weight_type=QuantType.QInt8,
    )


def kernels(path: Path) -> dict[str, int]:
    """Operators of onnxruntime's optimized graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    return dict(sorted(found.items()))


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def seconds(files: dict[str, Path], image: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    sessions = {name: session(path) for name, path in files.items()}
    found: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(rounds + 2):
        for name, running in sessions.items():
            start = time.perf_counter()
            running.run(None, {"input": image.numpy()})
            if turn >= 2:  # the first turns warm up
                found[name].append(time.perf_counter() - start)
    return found


def agreement(first: Path, second: Path, images: torch.Tensor) -> float:
    """Percent of images for which two files have the same largest output."""
    left, right = (
        np.concatenate([running.run(None, {"input": image.numpy()})[0] for image in images.split(1)])
        for running in (session(first), session(second))
    )
    return 100 * float((left.argmax(1) == right.argmax(1)).mean())


def measured(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(IMAGES, *SHAPE, generator=generator)
    model = network(name, images)
    checkpoint = Checkpoint(model, ModelSpec(architecture=f"torchvision:{name}", input_shape=SHAPE))
    files = {kind: folder / f"{name}.{kind}.onnx" for kind in ("float", "ours", "static", "static_u8")}
    write_onnx(ExportRequest(checkpoint, files["float"], SHAPE))
    for kind, activations in (("static", QuantType.QInt8), ("static_u8", QuantType.QUInt8)):
        peer(files["float"], files[kind], images, activations)
    quantize(model, images)
    made = export_network(model, (images[:2],))
    written: Written = write_onnx(
        ExportRequest(
            checkpoint, files["ours"], SHAPE, network=made.model, weights=made.weights, quantized=True
        )
    )
    assert written.kernels is not None
    times = seconds(files, images[:1], rounds)

    def faster(slow: str, fast: str) -> float:
        # turn by turn, so that the machine's drift cancels
        return round(statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True)), 3)

    sizes = {kind: path.stat().st_size for kind, path in files.items()}
    return {
        "network": name,
        "saturating_cpu": saturating_cpu(),
        "rounds": rounds,
        "milliseconds": {kind: round(1000 * statistics.median(found), 2) for kind, found in times.items()},
        "bytes": sizes,
        "speedup": {kind: faster("float", kind) for kind in ("ours", "static", "static_u8")},
        "smaller": {kind: round(sizes["float"] / sizes[kind], 3) for kind in ("ours", "static", "static_u8")},
        "speed_ratio": faster("static", "ours"),
        "speed_ratio_u8": faster("static_u8", "ours"),
        "bytes_ratio": round(sizes["ours"] / sizes["static"], 4),
        "kernels": {kind: kernels(files[kind]) for kind in ("ours", "static", "static_u8")},
        "integer_layers": written.kernels.integer,
        "float_layers": [layer.name for layer in written.kernels.floating],
        "top1_with_float": {
            kind: agreement(files["float"], files[kind], images) for kind in ("ours", "static")
        },
    }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    with tempfile.TemporaryDirectory() as name:
        rows = []
        for network_name in NETWORKS:
            rows.append(measured(network_name, Path(name), rounds))
            print(rows[-1], flush=True)
    record.write("onnx_int8", " ".join(["python benchmarks/onnx_int8.py", *sys.argv[1:]]), SEED, rows)


if __name__ == "__main__":
    main()
