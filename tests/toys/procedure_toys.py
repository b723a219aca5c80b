"""A small network on digits with all that the procedures around a cut are handed."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cctool.base.runtime import Silent
from cctool.checkpoint.checkpoint import Checkpoint, save
from cctool.checkpoint.edits.thin import thinned
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.data.records import DataSource
from cctool.data.registry import open_data
from cctool.models import registry
from cctool.operations.context import Context
from cctool.operations.registries import tables
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.prune.choices import PruneMethod
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.planner import thin
from cctool.pruning.cut.report import ThinResult

DIGITS = DataOptions(data="digits", batch_size=32)
ARGUMENTS = {"in_channels": 1, "base": 4}


class Listening(Silent):
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(text)


def context(seed: int = 0, device: str = "cpu", **model: Any) -> Context:
    arch = model.get("arch")
    named = frozenset({arch} if arch and ".py:" in arch else ())
    return Context(
        device=torch.device(device),
        runtime=RuntimeOptions(seed=seed, device=device),
        model_options=ModelOptions(**model),
        tables=tables(named),
        user_code=named,
        reporter=Listening(),
        output=Path("out.pt"),
        force=False,
        stamp=lambda outcome: outcome.checkpoint,
    )


def digits(limit: int = 128, shape: tuple[int, int, int] = (1, 32, 32)) -> DataSource:
    return open_data("digits", input_shape=shape, limit=limit)


def plain_network(seed: int = 0) -> nn.Sequential:
    """Two convolutions with batch norm and a classifier: trains in milliseconds a step."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=4, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def plain_checkpoint(seed: int = 0) -> Checkpoint:
    """`plain_network` under a name that nobody builds."""
    spec = ModelSpec(
        architecture="plain",
        input_shape=(1, 32, 32),
        preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)),
    )
    return Checkpoint(plain_network(seed), spec)


def residual_checkpoint(seed: int = 0, **arguments: Any) -> Checkpoint:
    """A narrow resnet20 as it was initialised."""
    torch.manual_seed(seed)
    given = {**ARGUMENTS, **arguments}
    spec = ModelSpec(
        architecture="resnet20",
        arguments=given,
        input_shape=(given["in_channels"], 32, 32),
        preprocessing=Preprocessing(mean=(0.5,) * given["in_channels"], std=(0.25,) * given["in_channels"]),
    )
    return Checkpoint(registry.build("resnet20", given).eval(), spec)


def lenet_checkpoint(seed: int = 0) -> Checkpoint:
    """A network of the registry that takes milliseconds a step, and no batch norm."""
    torch.manual_seed(seed)
    spec = ModelSpec(
        architecture="lenet",
        input_shape=(1, 32, 32),
        preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)),
    )
    return Checkpoint(registry.build("lenet", {}).eval(), spec)


def saved(checkpoint: Checkpoint, path: Path, handed: Context | None = None) -> Path:
    save(checkpoint, path, handed.tables if handed else tables(), overwrite=True)
    return path


def shaken(checkpoint: Checkpoint, seed: int = 1) -> Checkpoint:
    """The same network with other weights and statistics, as if it had been trained."""
    torch.manual_seed(seed)
    copied = replace(checkpoint, model=deepcopy(checkpoint.model))
    with torch.no_grad():
        for value in copied.model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
            else:
                value.add_(7)
    return copied


def cut(checkpoint: Checkpoint, rate: float = 0.5, **options: Any) -> tuple[Checkpoint, ThinResult]:
    """A thinned copy, its widths recorded."""
    copied = replace(checkpoint, model=deepcopy(checkpoint.model))
    wanted = PruneOptions(**{"method": PruneMethod.L2, "rate": rate, **options})
    found = thin(copied.model, (torch.randn(2, *checkpoint.spec.input_shape),), wanted)
    attributes = [(module, name) for module, values in found.plan.attributes.items() for name in values]
    spec = thinned(copied.spec, copied.model, found.plan.tensors, attributes)
    return replace(copied, spec=spec), found
