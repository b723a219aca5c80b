"""Command lines on the CPU and on a CUDA device, and what of their products has to be equal."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cctool.checkpoint.checkpoint import load
from cctool.cli.main import app
from cctool.operations.registries import tables
from pretended_cuda.plugin import REAL

NETWORKS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Classifier(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.side = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.BatchNorm2d(width), nn.ReLU6()
        )
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.body(x + self.side(x)).mean((2, 3)))


class Masks(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.up = nn.Upsample(scale_factor=2)
        self.out = nn.Conv2d(2 * width, num_classes, 1)

    def forward(self, x):
        x = self.down(x)
        y = self.out(torch.cat([x, self.up(self.deep(x))], 1))
        return {"out": y, "aux": y[:, :, ::2, ::2]}


def classifier(num_classes=10, width=8):
    return Classifier(num_classes, width)


def dropping(num_classes=10, width=8):
    return nn.Sequential(classifier(width, width), nn.Dropout(0.2), nn.Linear(width, num_classes))


def masks(num_classes=3, width=8):
    return Masks(num_classes, width)


def numbers(num_classes=3, width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )


def pictures(width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.ConvTranspose2d(width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 1, 3, 1, 1),
    )


def poses():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 1, 16, 16, generator=generator)
    values = torch.stack([images.mean((1, 2, 3)), images[:, 0, :8].mean((1, 2)), images[:, 0, 0, 0]], 1)
    sets = [TensorDataset(images[a:b], values[a:b]) for a, b in ((0, 32), (32, 48), (48, 64))]
    return dict(zip(("train", "validation", "test"), sets))


def mse(outputs, targets, inputs):
    return (outputs - inputs).square().mean()


def psnr(outputs, targets, inputs):
    return -10 * (outputs - inputs).square().mean().log10()


psnr.unit = "dB"
"""

_OF_THE_RUN = {
    "path", "device", "seconds", "batch_ms", "milliseconds", "median_ms", "content", "file", "sha256",
    "products", "low_ms", "high_ms", "parent", "latency", "thop", "made_with", "sources",
}  # fmt: skip
"""Keys of reports whose values are the run's: paths, times, hashes of files that hold these."""


def write_networks(folder: Path) -> None:
    """Write `NETWORKS` as ``net.py``."""
    (folder / "net.py").write_text(textwrap.dedent(NETWORKS))


def ran(*words: str, says: str | None = None) -> str:
    """Standard output of a command line; what it printed, if it has to fail and say something."""
    result = CliRunner().invoke(app, [*words, "--quiet"])
    told = " ".join((result.stdout + result.stderr).split())
    if says is not None:
        assert result.exit_code == 1, told
        assert says in told
        return told
    assert result.exit_code == 0, told
    return result.stdout


def on_both(line: str, suffix: str = ".pt", extra: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """The products of a command on both devices, in the present folder."""
    paths = Path(f"product.cpu{suffix}"), Path(f"product.cuda{suffix}")
    for path, device in zip(paths, ("cpu", "cuda"), strict=True):
        ran(*line.split(), *extra, "--device", device, "--force", "-o", str(path))
    return paths


def reports(line: str, device: str) -> Any:
    """The report of a command as JSON."""
    return json.loads(ran(*line.split(), "--device", device, "--json"))


def assert_equal_checkpoints(cpu: Path, cuda: Path, tolerance: float = 0.1) -> None:
    """The same bits of weights on the pretended device; on a real one, a share of their size on average.

    On the pretended device history tells the same of the two, too, but for paths, times and hashes.
    """
    names = ("classifier", "dropping", "masks", "numbers", "pictures")
    known = tables({"yolo.py:make", *(f"net.py:{name}" for name in names)})
    here, there = (load(path, known) for path in (cpu, cuda))
    a, b = here.model.state_dict(), there.model.state_dict()
    assert a.keys() == b.keys()
    assert all(value.device.type == "cpu" for value in b.values())
    if REAL:
        # Rounding may decide otherwise at a tie; optimizers take whole steps by the sign of tiny gradients.
        same_shapes = all(value.shape == b[name].shape for name, value in a.items())
        for name, value in a.items() if same_shapes else ():
            if value.is_floating_point() and value.numel():
                apart = (value - b[name]).abs().mean()
                assert apart <= tolerance * value.abs().mean() + 1e-2, name
        return
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    assert_same(here.history[-1].model_dump(), there.history[-1].model_dump())


def assert_same(cpu: Any, cuda: Any, where: str = "") -> None:
    """Two reports are the same but for paths, times and hashes; on a real GPU, to a tenth or five points."""
    if isinstance(cpu, Mapping):
        assert cpu.keys() == cuda.keys(), where
        for key in cpu.keys() - _OF_THE_RUN:
            assert_same(cpu[key], cuda[key], f"{where}.{key}")
    elif isinstance(cpu, list | tuple):
        assert len(cpu) == len(cuda), where
        for number, (one, other) in enumerate(zip(cpu, cuda, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    elif isinstance(cpu, float) and math.isfinite(cpu):
        close = {"rel": 0.1, "abs": 5.0} if REAL else {"rel": 1e-6}
        assert cuda == pytest.approx(cpu, **close), where
    elif not (REAL or isinstance(cpu, str)):
        assert cpu == cuda or cpu != cpu, where


def differing_bytes(folder: Path, other: Path) -> Iterator[str]:
    """Names of files of two folders that are not the same bytes."""
    names = {path.relative_to(top) for top in (folder, other) for path in top.rglob("*") if path.is_file()}
    for name in sorted(names):
        both = folder / name, other / name
        if not all(path.is_file() for path in both) or both[0].read_bytes() != both[1].read_bytes():
            yield str(name)
