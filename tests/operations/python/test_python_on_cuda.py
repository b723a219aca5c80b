"""Functions on networks and data that are on a CUDA device already, and on such that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cctool
import cuda_toys as toys
from pretended_cuda.plugin import REAL

pytestmark = pytest.mark.cuda

Data = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    toys.write_networks(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        net = "--arch net.py:classifier --arg width=8 --data digits --limit 64 --device cpu"
        toys.ran(*f"train {net} --epochs 1 -o net.pt".split())
        toys.ran(*f"transform net.pt {net} --target features --taps stem -o coded.pt".split())
        toys.ran(*f"quantize net.pt {net} --method int8 -o int8.pt".split())
    return folder


def digits() -> Data:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(n, 1, 32, 32, generator=generator), torch.arange(n) % 10)
        for name, n in (("train", 64), ("validation", 32), ("test", 32))
    }


class Loader:
    """Batches of a split, as a loader of the caller's own gives them."""

    def __init__(self, split: tuple[Tensor, Tensor]) -> None:
        self.split = split

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*(tensor.split(16) for tensor in self.split), strict=True)


def moved(data: Data, device: str) -> Data:
    return {name: (images.to(device), labels.to(device)) for name, (images, labels) in data.items()}


CALLS: dict[str, Callable[..., Any]] = {
    "train": lambda net, **given: cctool.train(net, epochs=1, lr=0.01, **given),
    "distill": lambda net, **given: cctool.distill(
        net, teacher=net, teacher_arch=net.spec.architecture, epochs=1, lr=0.01, **given
    ),
    "prune": lambda net, **given: cctool.prune(net, method="taylor", samples=32, recalibrate=32, **given),
    "prune in steps": lambda net, **given: cctool.prune(
        net, method="taylor", samples=32, recalibrate=32, steps=2, **given
    )[-1],
    "quantize": lambda net, **given: cctool.quantize(net, method="int8", calibration=32, **given),
    "transform": lambda net, **given: cctool.transform(
        net, target="features", taps=["stem"], calibration=32, **given
    ),
}


@pytest.mark.parametrize(
    ("verb", "device"), [*((verb, "cuda") for verb in CALLS), ("train", "cpu"), ("quantize", "cpu")]
)
def test_products_do_not_depend_on_where_things_are(folder: Path, verb: str, device: str) -> None:
    arch = f"{folder / 'net.py'}:classifier"
    found = []
    for place, computing in (("cpu", "cpu"), ("cuda", device)):
        net = cctool.load(folder / "net.pt", arch=arch)
        net.model.to(place)
        for data in (moved(digits(), place), {k: Loader(v) for k, v in moved(digits(), place).items()}):
            product = CALLS[verb](net, data=data, device=computing)
            product = product[0] if isinstance(product, tuple) else product
            found.append(product.model.state_dict())
        assert all(value.device.type == place for value in net.model.state_dict().values())
    for name, value in found[0].items():
        assert found[2][name].device.type == found[3][name].device.type == "cpu"
        if not REAL:
            assert torch.equal(found[2][name], value), name
            assert torch.equal(found[3][name], found[1][name]), name


@pytest.mark.parametrize("source", ["net.pt", "coded.pt", "int8.pt"])
def test_what_only_looks(folder: Path, tmp_path: Path, source: str) -> None:
    arch = f"{folder / 'net.py'}:classifier"
    found = []
    for device in ("cpu", "cuda"):
        net = cctool.load(folder / source, arch=arch)
        net.model.to(device)
        data = moved(digits(), device)
        told = cctool.evaluate(net, data=data, device=device)
        layers = cctool.analyze(net, device=device)
        cctool.export(net, output=str(tmp_path / f"{device}.safetensors"), device=device)
        found.append((told.metrics.values, layers.analysis))
    toys.assert_same(found[0][0], found[1][0])
    assert found[0][1].layers == found[1][1].layers
    assert (tmp_path / "cpu.safetensors").read_bytes() == (tmp_path / "cuda.safetensors").read_bytes()


def test_a_checkpoint_whose_network_is_on_the_device_is_saved_as_on_the_cpu(
    folder: Path, tmp_path: Path
) -> None:
    net = cctool.load(folder / "net.pt", arch=f"{folder / 'net.py'}:classifier")
    cctool.save(net, tmp_path / "cpu.pt")
    net.model.cuda()
    cctool.save(replace(net, model=net.model), tmp_path / "cuda.pt")
    assert (tmp_path / "cpu.pt").read_bytes() == (tmp_path / "cuda.pt").read_bytes()
