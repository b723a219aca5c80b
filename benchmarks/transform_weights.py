"""A trained AlexNet whose linear layers keep a share of their coefficients, against low-rank factors by SVD.

The network (`alexnet` in its CIFAR form, 21 of its 23 million parameters in linear layers) is trained from
scratch. Each way starts from the same weights, is measured, and fine-tuned with the same loop, images and
seed; the epoch of best validation accuracy counts. The peer is plain linear algebra, written here without
cctool: each linear layer becomes two of rank r by its singular values, r as large as the share's bytes allow,
which for a matrix of n x m are 4 r (n + m) bytes. Coefficients that are masked take 4 bytes each and a bit a
place on top.

Every row is written as soon as it is there, and a second run goes on where the first ended.

    python benchmarks/transform_weights.py fashion-mnist:DIR [--keep 0.25] [--images 2000] [--epochs 8]
"""

from __future__ import annotations

import argparse
import json
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import record
from cctool.base.runtime import Silent, resolve_device, seed_everything
from cctool.checkpoint.checkpoint import Checkpoint, save
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.data.registry import open_data
from cctool.models.registry import build
from cctool.operations.context import Context
from cctool.operations.data import measured
from cctool.operations.judge.size import stored_bytes
from cctool.operations.keep.masks import stored_with_masks
from cctool.operations.registries import load, tables
from cctool.operations.train.finetune import finetune
from cctool.operations.transform import weights as transform_weights
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.train.fit import FitOptions
from cctool.options.transform.choices import Select
from cctool.options.transform.options import TransformOptions, WeightOptions

WAYS: list[tuple[str, Select | None]] = [
    ("dct", Select.ENERGY),
    ("dct", Select.CORNER),
    ("dwt", Select.ENERGY),
    ("dwt", Select.CORNER),
    ("klt", Select.ENERGY),
    ("klt", Select.CORNER),
    ("SVD", None),
]


class Run:
    """What all ways share: the trained network, the data, the settings."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.context = Context(
            device=resolve_device(arguments.device),
            runtime=RuntimeOptions(device=arguments.device, seed=arguments.seed),
            model_options=ModelOptions(),
            tables=tables(),
            user_code=frozenset(),
            reporter=Silent(),
            output=Path("none.pt"),
            force=False,
            stamp=lambda outcome: outcome.checkpoint,
        )
        self.data = DataOptions(data=arguments.data, batch_size=64)
        channels = open_data(arguments.data, limit=1).shape[0]
        shape = (channels, 32, 32)
        self.source = open_data(arguments.data, input_shape=shape, limit=arguments.images)
        self.test = open_data(arguments.data, input_shape=shape, limit=arguments.test_images)
        self.spec = ModelSpec(
            architecture="alexnet",
            arguments={"in_channels": channels, "num_classes": len(self.source.classes)},
            input_shape=shape,
            preprocessing=Preprocessing(mean=self.source.mean, std=self.source.std),
        )

    def trained(self) -> Checkpoint:
        """The network from scratch, or as the last run wrote it."""
        path = self.arguments.work / f"alexnet.{self.arguments.images}.{self.arguments.epochs}.pt"
        if not path.is_file():
            seed_everything(self.arguments.seed)
            fresh = Checkpoint(build("alexnet", self.spec.arguments).to(self.context.device), self.spec)
            options = FitOptions(epochs=self.arguments.epochs, lr=self.arguments.lr)
            dense = finetune(fresh, self.source, options, self.data, self.context, fresh=True)
            dense.model.to("cpu")
            save(dense, path, self.context.tables)
        return load(path)

    def accuracy(self, checkpoint: Checkpoint) -> tuple[float, int]:
        """Top-1 on the test split, in percent, and on how many images."""
        metrics = measured(checkpoint, self.test, self.data, self.context)
        return round(metrics.values["top1"], 2), metrics.n

    def finetuned(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same network after three epochs."""
        seed_everything(self.arguments.seed)
        options = FitOptions(epochs=self.arguments.finetune_epochs, lr=self.arguments.lr)
        return finetune(checkpoint, self.source, options, self.data, self.context)


def coded(start: Checkpoint, kernel: str, select: Select, run: Run) -> Checkpoint:
    """Linear layers as coefficients, a share of them kept."""
    weights = WeightOptions(layers=("linear",), keep=run.arguments.keep, select=select)
    unmeasured = replace(start, spec=start.spec.model_copy(update={"data": None}))
    options = TransformOptions(kernel=kernel, weights=weights)
    (outcome,) = transform_weights.run(unmeasured, options, run.context)
    return outcome.checkpoint


def low_rank(start: Checkpoint, keep: float) -> Checkpoint:
    """Linear layers as two of the rank whose numbers are that share of the weight's."""
    for name, layer in list(start.model.named_modules()):
        if isinstance(layer, nn.Linear):
            owner, _, leaf = name.rpartition(".")
            start.model.get_submodule(owner)._modules[leaf] = _factors(layer, keep)
    return start


@torch.no_grad()
def _factors(layer: nn.Linear, keep: float) -> nn.Sequential:
    n, m = layer.weight.shape
    rank = max(1, int(keep * n * m / (n + m)))
    u, s, v = torch.linalg.svd(layer.weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    first, second = nn.Linear(m, rank, bias=False), nn.Linear(rank, n)
    first.weight.copy_(root[:, None] * v[:rank])
    second.weight.copy_(u[:, :rank] * root)
    second.bias.copy_(layer.bias)
    return nn.Sequential(first, second)


def linear_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all that the classifier's weights are stored as, biases included."""
    parts: dict[int, torch.Tensor] = {}
    for name, tensor in checkpoint.model.state_dict().items():
        if name.startswith("classifier."):
            form = checkpoint.stored.get(name)
            for part in [tensor] if form is None else form.parts.values():
                parts[id(part)] = part
    return sum(part.numel() * part.element_size() for part in parts.values())


def row(kernel: str, select: Select | None, dense: Checkpoint, run: Run) -> dict[str, Any]:
    """One way: sizes, and accuracy before and after fine-tuning."""
    began = time.perf_counter()
    start = replace(dense, model=deepcopy(dense.model).to(run.context.device))
    keep = run.arguments.keep
    changed = low_rank(start, keep) if select is None else coded(start, kernel, select, run)
    seconds = time.perf_counter() - began
    changed.model.to(run.context.device)
    before, n = run.accuracy(changed)
    tuned = stored_with_masks(run.finetuned(changed))
    after, _ = run.accuracy(tuned)
    tuned.model.to("cpu")
    return {
        "kernel": kernel,
        "select": None if select is None else str(select),
        "keep": run.arguments.keep,
        "linear_bytes": linear_bytes(tuned),
        "network_bytes": stored_bytes(tuned),
        "file_bytes": file_bytes(tuned, run) if select is not None else None,
        "transform_seconds": round(seconds, 1),
        "top1_after": before,
        "top1_finetuned": after,
        "n": n,
    }


def file_bytes(checkpoint: Checkpoint, run: Run) -> int:
    """Size of the checkpoint as a file."""
    path = run.arguments.work / "measured.pt"
    save(checkpoint, path, run.context.tables, overwrite=True)
    size = path.stat().st_size
    path.unlink()
    return size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--test-images", type=int, default=4_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--finetune-epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("transform_weights_work"))
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    run = Run(arguments)
    dense = run.trained()
    rows_file = arguments.work / f"rows.{arguments.images}.{arguments.epochs}.{arguments.keep}.json"
    rows = json.loads(rows_file.read_text()) if rows_file.is_file() else []
    done = {(found["kernel"], found["select"]) for found in rows}
    if not done:
        top1, n = run.accuracy(replace(dense, model=dense.model.to(run.context.device)))
        dense.model.to("cpu")
        rows = [
            {
                "kernel": "dense",
                "select": None,
                "keep": 1.0,
                "linear_bytes": linear_bytes(dense),
                "network_bytes": stored_bytes(dense),
                "file_bytes": file_bytes(dense, run),
                "top1_after": top1,
                "n": n,
                "data": arguments.data.partition(":")[0],
                "images": len(run.source.split("train")),
                "epochs": arguments.epochs,
                "finetune_epochs": arguments.finetune_epochs,
                "lr": arguments.lr,
            }
        ]
        rows_file.write_text(json.dumps(rows))
    for kernel, select in WAYS:
        if (kernel, None if select is None else str(select)) not in done:
            rows.append(row(kernel, select, dense, run))
            rows_file.write_text(json.dumps(rows))
            print(f"# {rows[-1]}", flush=True)
    command = f"python benchmarks/transform_weights.py {arguments.data.partition(':')[0]}:DIR"
    for name in ("keep", "images", "test_images", "epochs", "finetune_epochs", "lr", "device"):
        if getattr(arguments, name) != parser.get_default(name):
            command += f" --{name.replace('_', '-')} {getattr(arguments, name)}"
    record.write("transform_weights", command, arguments.seed, rows)


if __name__ == "__main__":
    main()
