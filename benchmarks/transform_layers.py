"""Layers of basis functions: kernel x layers x architecture x data set, the evaluation that a thesis planned.

Each network is trained from scratch at cctool's defaults, the plain one and those whose layers are basis
functions in the same way: same images, seed, epochs and rates. Accuracy is top-1 on the test split. MACs are
those of one image in real arithmetic, a complex product counting as 4 and that of a complex and a real number
as 2; the weights of basis layers are computed once and not counted. Networks on CIFAR-10 see one epoch of a
slice of the images, which shows that they run, not how well.

Rows that the result file has already are not made again: an interrupted run goes on.

    python benchmarks/transform_layers.py --fashion-mnist DIR --cifar10 DIR
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import record
from cctool.base.runtime import Silent, resolve_device, seed_everything
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.registry import open_data
from cctool.operations.context import Context
from cctool.operations.data import measured
from cctool.operations.judge.size import stored_bytes
from cctool.operations.opening import DataShape, fresh
from cctool.operations.registries import tables
from cctool.operations.train.finetune import finetune
from cctool.operations.transform.basis import with_basis
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.train.fit import FitOptions

SEED = 0
NAME = "transform_layers"
CHANGES = [("none", "none")] + [
    (k, part) for part in ("linear", "conv", "all") for k in ("dct", "dst", "dft")
]


@dataclass(frozen=True)
class Task:
    """One network on one data set."""

    architecture: str
    data: str
    reference: str
    shape: tuple[int, int, int]
    epochs: int
    limit: int | None = None


def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Real multiplications of linear layers and convolutions for one image."""
    found = 0

    def count(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal found
        weight = layer.weight
        # An input of a real layer that is complex is taken by its magnitude.
        parts = 1 if not weight.is_complex() else 4 if inputs[0].is_complex() else 2
        found += parts * output.numel() * math.prod(weight.shape[1:])

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape, device=next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    return found


def context() -> Context:
    return Context(
        device=resolve_device("auto"),
        runtime=RuntimeOptions(seed=SEED),
        model_options=ModelOptions(),
        tables=tables(),
        user_code=frozenset(),
        reporter=Silent(),
        output=Path("unused.pt"),
        force=False,
        stamp=lambda outcome: outcome.checkpoint,
    )


def trained(task: Task, kernel: str, layers: str) -> dict[str, Any]:
    """Train one network; a row of the table."""
    seed_everything(SEED)
    where = context()
    source = open_data(task.reference, input_shape=task.shape, limit=task.limit)
    described = DataShape(task.shape, source.classes, None)
    checkpoint: Checkpoint = fresh(
        ModelOptions(arch=task.architecture, input_shape=task.shape),
        where.tables,
        frozenset(),
        described,
        None,
    )
    if kernel != "none":
        checkpoint = with_basis(checkpoint, kernel, (layers,), "--swap")
    checkpoint.model.to(where.device)
    start = time.perf_counter()
    data = DataOptions(data=task.reference, limit=task.limit)
    result = finetune(checkpoint, source, FitOptions(epochs=task.epochs), data, where, fresh=True)
    seconds = time.perf_counter() - start
    metrics = measured(result, source, data, where)
    return {
        "architecture": task.architecture,
        "data": task.data,
        "kernel": kernel,
        "layers": layers,
        "epochs": task.epochs,
        "images": len(source.split("train")),
        "n": metrics.n,
        "accuracy": round(metrics.values["top1"], 2),
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "bytes": stored_bytes(result),
        "macs": count_macs(result.model, task.shape),
        "seconds": round(seconds, 1),
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("architecture", "data", "kernel", "layers", "epochs"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fashion-mnist", required=True, metavar="DIR")
    parser.add_argument("--cifar10", required=True, metavar="DIR")
    parser.add_argument("--digits-epochs", type=int, default=20)
    parser.add_argument("--fashion-epochs", type=int, default=1)
    parser.add_argument("--cifar-images", type=int, default=2560)
    asked = parser.parse_args()
    fashion, cifar = f"fashion-mnist:{asked.fashion_mnist}", f"cifar10:{asked.cifar10}"
    colour = (3, 32, 32)
    tasks = [
        Task("lenet", "digits", "digits", (1, 32, 32), asked.digits_epochs),
        Task("lenet", "fashion-mnist", fashion, (1, 32, 32), asked.fashion_epochs),
        Task("alexnet", "cifar10", cifar, colour, 1, asked.cifar_images),
        Task("torchvision:resnet18", "cifar10", cifar, colour, 1, asked.cifar_images),
    ]
    result = Path(__file__).parent / "results" / f"{NAME}.json"
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"] if result.is_file() else []
    for task in tasks:
        for kernel, layers in CHANGES:
            done = {key(row) for row in rows}
            if (task.architecture, task.data, kernel, layers, task.epochs) in done:
                continue
            rows.append(trained(task, kernel, layers))
            options = f"--digits-epochs {asked.digits_epochs} --fashion-epochs {asked.fashion_epochs}"
            record.write(
                NAME,
                f"python benchmarks/transform_layers.py --fashion-mnist DIR --cifar10 DIR {options} "
                f"--cifar-images {asked.cifar_images}",
                SEED,
                rows,
            )


if __name__ == "__main__":
    main()
