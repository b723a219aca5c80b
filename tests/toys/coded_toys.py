"""Small coded networks on digits, and what their taps pass on, seen by hooks of the tests' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.data.registry import open_data
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations.inspect import evaluate
from cctool.operations.registries import tables
from cctool.operations.transform import run as transform
from cctool.options.common import DataOptions, Precision, RuntimeOptions
from cctool.options.inspect.evaluate import EvaluateOptions
from cctool.options.transform.choices import TransformTarget
from cctool.options.transform.options import FeatureOptions, TransformOptions

TAPS = ("features.2", "features.5", "features.7")
"""Maps of 6 x 14 x 14, 16 x 5 x 5 and 120 x 1 x 1."""

DATA = DataOptions(data="digits", limit=40, batch_size=16)


def lenet_file(folder: Path) -> Path:
    """An untrained lenet with a file of its own."""
    torch.manual_seed(0)
    spec = ModelSpec(
        architecture="lenet",
        input_shape=(1, 32, 32),
        data="digits",
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    )
    save(Checkpoint(registry.build("lenet", {}).eval(), spec), folder / "net.pt", tables())
    return folder / "net.pt"


def transform_options(kernel: str = "dct", **features: Any) -> TransformOptions:
    features = {"taps": TAPS, "calibration": 40} | features
    return TransformOptions(
        target=TransformTarget.FEATURES, kernel=kernel, features=FeatureOptions(**features), data=DATA
    )


def transformed(source: Path, output: Path, kernel: str = "dct", **features: Any) -> pipeline.Product:
    """Run `cctool transform --target features`, and give its product."""
    request = pipeline.Request("transform", str(source), str(output), runtime=RuntimeOptions(device="cpu"))
    (product,) = pipeline.write(transform.run, transform_options(kernel, **features), request)
    return product


def evaluated(
    path: Path, *, force: bool = False, precision: Precision = Precision.FULL, **options: Any
) -> evaluate.EvaluateReport:
    """Run `cctool evaluate`, and give its report."""
    runtime = RuntimeOptions(device="cpu", precision=precision)
    request = pipeline.Request("evaluate", str(path), runtime=runtime, force=force)
    found: evaluate.EvaluateReport = pipeline.read(
        evaluate.run, EvaluateOptions(**({"data": DATA} | options)), request
    )
    return found


def images() -> list[torch.Tensor]:
    """The batches of the test split as the network gets them."""
    found = open_data("digits", input_shape=(1, 32, 32), limit=DATA.limit).split("test")
    assert found.images is not None
    # As a product and a sum, which is how batches are normalised.
    normalised = found.images.float() * (1 / (255 * 0.5)) - 1
    return list(normalised.split(DATA.batch_size))


def passed_maps(path: Path) -> dict[str, np.ndarray]:
    """What the layer behind each tap gets."""
    model = load(path, tables()).model.eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name in TAPS:
        # Registered behind the codec's hook, so it sees what that returned; a copy, for ReLUs work in place.
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.setdefault(name, []).append(output.clone())
        )
    with torch.no_grad():
        for batch in images():
            model(batch)
    return {name: torch.cat(maps).numpy() for name, maps in seen.items()}


def twice_passed() -> nn.Sequential:
    """A network that passes one module twice."""
    torch.manual_seed(1)
    shared = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
    return nn.Sequential(shared, nn.AvgPool2d(1), shared, nn.Conv2d(3, 2, 1)).eval()
