"""The pretended CUDA device: what it refuses, what it lets pass, and faults of cctool that it has to find."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cuda_toys as toys
from cctool.quantization.quantizers import grid
from cctool.tasks.classification import Classification
from cctool.training import evaluate
from cctool.transforms.basis import linear
from cctool.transforms.kernels import matmul
from pretended_cuda import pretended
from pretended_cuda.plugin import REAL

pytestmark = pytest.mark.skipif(REAL, reason="a GPU is here: nothing is pretended")


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretended():
        yield torch.device("cuda")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5)
    )


# What `here`, of the CPU, and `there`, of the device, must not do together.
MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda here, there: here + there,
    "in place": lambda here, there: here.add_(there),
    "number in place": lambda here, there: here.sum().add_(there.sum()),
    "matrix product": lambda here, there: here @ there,
    "convolution": lambda here, there: F.conv1d(there[None], here[None]),
    "concatenation": lambda here, there: torch.cat([here, there]),
    "stack of numbers": lambda here, there: torch.stack([here.sum(), there.sum()]),
    "mask": lambda here, there: there.masked_fill(here > 0, 0.0),
    "choice": lambda here, there: torch.where(here > 0, there, there),
    "gathered": lambda here, there: there.gather(0, here.long()),
    "selected": lambda here, there: there.index_select(0, torch.tensor([0])),
    "assigned by index": lambda here, there: there.__setitem__([0, 1], here[:2]),
    "added by index": lambda here, there: there.index_add_(0, torch.tensor([0]), there[:1]),
    "loss": lambda here, there: F.cross_entropy(there, torch.tensor([0, 1, 0])),
    "gradient": lambda here, there: setattr(there, "grad", here),
    "equality": lambda here, there: torch.equal(here, there),
    "batch norm": lambda here, there: nn.BatchNorm1d(3)(there),
    "counts": lambda here, there: torch.bincount(there.long().flatten(), weights=here.flatten()),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_mixtures_are_refused(device: torch.device, mix: Callable[[Tensor, Tensor], object]) -> None:
    here, there = torch.ones(3, 3), torch.ones(3, 3, device=device)
    with pytest.raises(RuntimeError, match="device"):
        mix(here, there)


ALLOWED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "number": lambda here, there: there * here.sum(),
    "python's number": lambda here, there: 2 - there,
    "indices": lambda here, there: there[torch.tensor([0, 2])],
    "mask as index": lambda here, there: there[here > 0],
    "number by index": lambda here, there: there.index_put((torch.tensor([0]),), torch.tensor(3.0)),
    "copied into": lambda here, there: there.copy_(here),
    "slice": lambda here, there: there[:2].copy_(here[:2]),
    "new": lambda here, there: there.new_tensor([1.0]) + there,
    "like": lambda here, there: torch.zeros_like(here, device=there.device) + there,
    "made": lambda here, there: torch.tensor([1.0], device="cuda") + there,
    "one-hot": lambda here, there: F.one_hot(there.long(), 4).float(),
    "views": lambda here, there: there.t().reshape(9).detach().view(3, 3),
    "upsampled": lambda here, there: F.interpolate(there[None, None], scale_factor=2, mode="bilinear"),
    "as the other": lambda here, there: here.to(there) + there,
}


@pytest.mark.parametrize("mix", ALLOWED.values(), ids=ALLOWED)
def test_what_a_gpu_takes_passes_with_the_cpus_values(
    device: torch.device, mix: Callable[[Tensor, Tensor], Tensor]
) -> None:
    found = mix(torch.ones(3, 3), torch.full((3, 3), 2.0, device=device))
    assert found.is_cuda
    assert found.device == torch.device("cuda", 0) != device
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(found)
    expected = torch.full((3, 3), 2.0)
    if mix is not ALLOWED["made"]:
        assert torch.equal(found.cpu(), mix(torch.ones(3, 3), expected))


def test_training_is_the_cpus_bit_by_bit(device: torch.device) -> None:
    states = []
    for place in ("cpu", device):
        model, x = network().to(place), torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(place)), torch.arange(8, device=place) % 5).backward()
            optimizer.step()
        assert all(p.grad is not None and p.grad.device.type == p.device.type for p in model.parameters())
        states.append({name: value.cpu() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_gradients_come_back_to_the_device_of_their_tensor(device: torch.device) -> None:
    x = torch.ones(3, requires_grad=True)
    (2 * (3 * x).to(device)).cpu().sum().backward()
    assert x.grad is not None
    assert not x.grad.is_cuda
    assert x.grad.tolist() == [6.0, 6.0, 6.0]


def test_copies_and_files_keep_the_device(device: torch.device) -> None:
    model = network().to(device)
    twin = copy.deepcopy(model)
    assert all(value.is_cuda for module in (model, twin) for value in module.state_dict().values())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert torch.load(file)["0.weight"].is_cuda
    file.seek(0)
    assert not torch.load(file, map_location="cpu")["0.weight"].is_cuda


def test_the_devices_generator_is_its_own(device: torch.device) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = torch.rand(4, device=device)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(drawn.cpu(), torch.rand(4))
    state = torch.cuda.get_rng_state()
    again = F.dropout(torch.ones(64, device=device))
    torch.cuda.set_rng_state(state)
    assert torch.equal(F.dropout(torch.ones(64, device=device)), again)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(4, device=device, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(4, generator=torch.Generator(device))
    drawing = torch.Generator(device).manual_seed(0)
    assert drawing.device.type == "cuda"
    assert torch.rand(4, device=device, generator=drawing).is_cuda


def test_what_cuda_does_not_have_is_refused(device: torch.device) -> None:
    whole = torch.ones(3, 3, dtype=torch.long, device=device)
    with pytest.raises(RuntimeError, match="not implemented"):
        whole @ whole
    with pytest.raises(RuntimeError, match="ordinal"):
        torch.zeros(2, device="cuda:1")
    with pytest.raises(RuntimeError, match="device-side assert"):
        F.cross_entropy(torch.ones(2, 3, device=device), torch.tensor([0, 3], device=device))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.histc(torch.ones(3, device=device))
        torch.histc(torch.ones(3))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(3, device=device).sum().item()


def test_export_on_the_device_is_skipped_and_on_the_cpu_is_not(device: torch.device) -> None:
    x = torch.zeros(2, 3, 8, 8)
    torch.export.export(network().eval(), (x,), strict=False)
    with pytest.raises(pytest.skip.Exception, match=r"torch\.export"):
        torch.export.export(network().eval().to(device), (x.to(device),), strict=False)


def test_nothing_of_it_stays() -> None:
    before = {**vars(Tensor), **vars(torch.cuda)}
    with pretended():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()
    after = {**vars(Tensor), **vars(torch.cuda)}
    assert [name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)] == []


def left_on_the_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **keywords: make(*arguments, **keywords).cpu()


def by_numpy(self: Any, outputs: Any, targets: Tensor, *, training: bool = False) -> Any:
    return {"top1": torch.tensor(float((outputs.detach().numpy().argmax(1) == targets.numpy()).sum()))}


class ForgetsItsDevice(evaluate._EvaluationSums):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._sums = torch.zeros(3, dtype=torch.float64)


NET = "--arch net.py:classifier --limit 32"
INT8 = f"quantize class.pt {NET} --method int8 --calibration 16 -o x.pt"
PLANTED: dict[str, tuple[str, object, str, object, str]] = {
    "a buffer of the network stays on the CPU": (
        "train --arch faulty.py:make --data digits --limit 32 --epochs 1 -o x.pt",
        torch, "pi", 3.14, "device",
    ),
    "decoded values come back to the CPU": (
        INT8, grid.Grid, "decoded", left_on_the_cpu(grid.Grid.decoded), "device",
    ),
    "a numpy call": (f"evaluate class.pt {NET}", Classification, "sums", by_numpy, "numpy"),
    "a forgotten device": (
        f"evaluate class.pt {NET}", evaluate, "_EvaluationSums", ForgetsItsDevice, "device",
    ),
    "a cached matrix of the CPU": (
        f"transform class.pt {NET} --keep 0.5 -o x.pt",
        matmul, "_kept", left_on_the_cpu(matmul._made), "device",
    ),
}  # fmt: skip

FAULTY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.shift = nn.Conv2d(1, 10, 3), torch.zeros(10)

    def forward(self, x):
        return self.body(x).mean((2, 3)) + self.shift

def make():
    return Net()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    toys.write_networks(folder)
    (folder / "faulty.py").write_text(FAULTY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        toys.ran(*f"train {NET} --data digits --epochs 1 --device cpu -o class.pt".split())
    return folder


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_end_a_command_on_the_device_only(
    inputs: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, owner, name, replacement, says = PLANTED[fault]
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(owner, name, replacement)
    toys.ran(*line.split(), "--device", "cpu", *(["--force"] if "-o" in line else []))
    with pretended():
        toys.ran(*line.split(), "--device", "cuda", *(["--force"] if "-o" in line else []), says=says)


def test_weights_drawn_on_the_device_are_seen(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    line = f"transform class.pt {NET} --mode basis --layers linear"
    with pretended():
        toys.assert_equal_checkpoints(*toys.on_both(line))
    monkeypatch.setattr(linear, "init_normal", lambda parameter, std: nn.init.normal_(parameter, std=std))
    with pretended(), pytest.raises(AssertionError, match=r"head\."):
        toys.assert_equal_checkpoints(*toys.on_both(line))
