"""Post-training methods on trained networks, beside onnxruntime's own static quantization.

Each row is one run of `cctool quantize` on the same network, with 1,024 un-augmented training images where it
looks at images: bytes, and top-1 on the test split. The peer is onnxruntime's `quantize_static` (QDQ, per
channel, min-max) on the same images; "exported" is our int8 file in onnxruntime. Rows that are in the file of
--partial already are not measured again.

    python benchmarks/quantize_methods.py NETWORK CIFAR10_DIR [--arch resnet20] --partial rows.json
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import record
from cctool.base.runtime import Silent, resolve_device, seed_everything
from cctool.checkpoint.checkpoint import Checkpoint, save
from cctool.data.registry import open_data
from cctool.operations.context import Context
from cctool.operations.data import measured, serve
from cctool.operations.inspect import export
from cctool.operations.keep.calibrate import calibration_images
from cctool.operations.keep.events import stored as as_stored
from cctool.operations.opening import open_checkpoint
from cctool.operations.quantize import run as quantize
from cctool.operations.registries import tables
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.inspect.export import ExportFormat
from cctool.options.quantize.choices import QuantizeMethod, Rounding
from cctool.options.quantize.options import QuantizeOptions
from cctool.options.quantize.parts import CalibrationOptions
from onnx_int8 import Reader

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CALIBRATION = 1024
WAYS: dict[str, dict[str, Any]] = {
    "fp16": {"method": QuantizeMethod.FP16},
    "bf16": {"method": QuantizeMethod.BF16},
    "uint8": {"method": QuantizeMethod.UINT8},
    "int8": {"method": QuantizeMethod.INT8},
    "int8 --per-tensor": {"method": QuantizeMethod.INT8, "per_channel": False},
    "int8 --full-range": {
        "method": QuantizeMethod.INT8,
        "calibration": CalibrationOptions(reduce_range=False),
    },
    "int4": {"method": QuantizeMethod.INT4},
    "int4 --bias-correction": {
        "method": QuantizeMethod.INT4,
        "calibration": CalibrationOptions(bias_correction=True),
    },
    "int4 --rounding adaround": {"method": QuantizeMethod.INT4, "rounding": Rounding.ADAROUND},
    "int3 --rounding adaround": {"method": QuantizeMethod.INT3, "rounding": Rounding.ADAROUND},
    "int2 --rounding adaround": {"method": QuantizeMethod.INT2, "rounding": Rounding.ADAROUND},
    "codebook --weight-bits 4": {"method": QuantizeMethod.CODEBOOK, "weight_bits": 4},
    "apot --weight-bits 4": {"method": QuantizeMethod.APOT, "weight_bits": 4},
}

EXPORTED_SUFFIX = ", exported"
EXPORTED = ("int8, exported", "int8 --full-range, exported")


class Run:
    """One network, its data, and how it is measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        given = {"mean": MEAN, "std": STD} if arguments.foreign else {}
        named = ModelOptions(arch=arguments.arch if arguments.foreign else None, **given)
        self.context = Context(
            device=resolve_device(arguments.device),
            runtime=RuntimeOptions(device=arguments.device),
            model_options=named,
            tables=tables(),
            user_code=frozenset(),
            reporter=Silent(),
            output=Path("none.pt"),
            force=True,
            stamp=lambda outcome: outcome.checkpoint,
        )
        # Validation is of no use here, and takes as long as half a test.
        self.data = DataOptions(data=f"cifar10:{arguments.data}", batch_size=250)
        self.source = open_data(str(self.data.data), input_shape=(3, 32, 32))
        path = Path(arguments.network)
        self.checkpoint = open_checkpoint(path, named, self.context.tables, frozenset(), Silent())

    def quantized(self, given: dict[str, Any]) -> Checkpoint:
        """What `cctool quantize` makes of the network; measured by the caller alone."""
        seed_everything(0)
        calibration = replace(given.get("calibration", CalibrationOptions()), images=CALIBRATION)
        options = QuantizeOptions(**{**given, "calibration": calibration, "data": self.data})
        (outcome,) = quantize.run(self.checkpoint, options, self.context)
        return as_stored(outcome.checkpoint, self.context.tables)

    def top1(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Top-1 of a checkpoint on the test split."""
        metrics = measured(checkpoint, self.source, self.data, self.context)
        return {"n": metrics.n, "top1": round(metrics.values["top1"], 2)}

    def in_runtime(self, path: Path) -> dict[str, Any]:
        """Top-1 of an ONNX file on the test split."""
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name, right, seen = session.get_inputs()[0].name, 0, 0
        for batch in serve(self.checkpoint, self.source, "test", self.data, self.context):
            found = torch.from_numpy(session.run(None, {name: batch.images.cpu().numpy()})[0]).argmax(1)
            right, seen = right + int((found == batch.labels.cpu()).sum()), seen + len(found)
        return {"n": seen, "top1": round(100 * right / seen, 2), "bytes": path.stat().st_size}

    def images(self) -> torch.Tensor:
        """The images that `cctool quantize` calibrates on."""
        served, _ = calibration_images(self.checkpoint, self.source, CALIBRATION, self.data, self.context)
        return torch.cat([batch.cpu().clone() for batch in served])

    def exported(self, checkpoint: Checkpoint, path: Path) -> Path:
        """The path of what `cctool export` writes, compared with the network on 256 images."""
        export.export(checkpoint, ExportFormat.ONNX, path, replace(self.data, limit=256), self.context)
        return path


def measure(run: Run, name: str, folder: Path) -> dict[str, Any]:
    if name == "float":
        save(run.checkpoint, folder / "float.pt", run.context.tables, overwrite=True)
        return run.top1(run.checkpoint) | {"bytes": (folder / "float.pt").stat().st_size}
    if name == "onnxruntime, quantize_static":
        source, prepared = run.exported(run.checkpoint, folder / "float.onnx"), folder / "prepared.onnx"
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared),
            str(folder / "peer.onnx"),
            Reader(run.images()),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return run.in_runtime(folder / "peer.onnx")
    if name in EXPORTED:
        way = WAYS[name.removesuffix(EXPORTED_SUFFIX)]
        return run.in_runtime(run.exported(run.quantized(way), folder / "ours.onnx"))
    product = run.quantized(WAYS[name])
    save(product, folder / "product.pt", run.context.tables, overwrite=True)
    return run.top1(product) | {"bytes": (folder / "product.pt").stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("network", help="trained network")
    parser.add_argument("data", help="folder of CIFAR-10")
    parser.add_argument("--arch", default="resnet20", help="its name in the table; architecture if foreign")
    parser.add_argument("--foreign", action="store_true", help="a bare state dict of that architecture")
    parser.add_argument("--partial", required=True, help="JSON file of rows that were measured before")
    parser.add_argument("--only", default="", help="regular expression of the rows to measure")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    partial = Path(arguments.partial)
    rows = json.loads(partial.read_text(encoding="utf-8")) if partial.is_file() else []
    run = Run(arguments)
    names = ["float", *WAYS, *EXPORTED, "onnxruntime, quantize_static"]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            done = any(row["network"] == arguments.arch and row["method"] == name for row in rows)
            if done or not re.search(arguments.only, name):
                continue
            began = time.process_time()
            found = measure(run, name, Path(folder))
            seconds = round(time.process_time() - began)
            rows.append({"network": arguments.arch, "method": name} | found | {"cpu_seconds": seconds})
            print(f"# {time.strftime('%H:%M:%S')} {json.dumps(rows[-1])}", flush=True)
            partial.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    networks = list(dict.fromkeys(row["network"] for row in rows))
    rows.sort(key=lambda row: (networks.index(row["network"]), names.index(row["method"])))
    command = "python benchmarks/quantize_methods.py NETWORK CIFAR10_DIR --partial ROWS"
    record.write("quantize_methods", command, 0, rows)


if __name__ == "__main__":
    main()
