"""The codec on a CUDA device: the CPU's symbols, and reconstructions to float64's rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cctool.transforms.codec.allocate import measure_sensitivity
from cctool.transforms.codec.codec import CodecConfig, CodecState, Symbols, encode, reconstruct
from cctool.transforms.codec.figures import TapStatistics
from cctool.transforms.codec.steps import default_table
from cctool.transforms.codec.taps import CalibratedTap, TapHook, set_taps, taps_of
from cctool.transforms.codec.training import simulate, simulate_rated

pytestmark = pytest.mark.cuda

CONFIGS: list[dict[str, Any]] = [
    {"kernel": "dct"},
    {"kernel": "dct", "norm": "none", "symbol_bits": 8},
    {"kernel": "dst", "dead_zone": 0.2},
    {"kernel": "dwt", "mean_shift": True},
    {"kernel": "dwt", "original_units": True},
    {"kernel": "bior2.2", "quality": 80.0},
    {"kernel": "identity"},
    {"kernel": "klt", "channel_klt": True},
]


def made(config: dict[str, Any]) -> tuple[torch.Tensor, CodecState]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 20, 20, generator=generator).relu()
    table = () if config["kernel"] == "identity" else default_table(config["kernel"], 8, 3, 8).steps
    bases = {}
    if config["kernel"] == "klt":
        for name, size in (
            ("rows", 8),
            ("rows_rest", 4),
            ("columns", 8),
            ("columns_rest", 4),
            ("channels", 4),
        ):
            bases[name] = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return x, CodecState(CodecConfig(table=table, **config), torch.tensor([0.0, float(x.max())]), bases)


def moved(state: CodecState) -> CodecState:
    bases = {name: basis.cuda() for name, basis in state.bases.items()}
    return CodecState(state.config, state.bounds.cuda(), bases)


@pytest.mark.parametrize("config", CONFIGS)
def test_symbols_maps_and_gradients_are_the_cpus(config: dict[str, Any]) -> None:
    x, state = made(config)
    here, there = encode(x, state), encode(x.cuda(), moved(state))
    for a, b in zip(here.bands, there.bands, strict=True):
        assert b.is_cuda
        assert torch.equal(a, b.cpu())
    assert here.clamped is not None
    assert there.clamped is not None
    assert torch.equal(here.clamped, there.clamped.cpu())
    if here.means is not None:
        assert there.means is not None
        assert torch.equal(here.means, there.means.cpu())
    assert torch.allclose(reconstruct(here, state), reconstruct(there, moved(state)).cpu(), atol=1e-6)
    a, b = x.clone().requires_grad_(), x.cuda().requires_grad_()
    weights = torch.rand(x.shape)
    (simulate(a, state) * weights).sum().backward()
    (simulate(b, moved(state)) * weights.cuda()).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.allclose(a.grad, b.grad.cpu(), atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_figures_are_the_cpus(config: dict[str, Any]) -> None:
    x, state = made(config)
    found = []
    for device, codec in (("cpu", state), ("cuda", moved(state))):
        statistics = TapStatistics("tap", TapHook(codec.config, (4, 20, 20), ""))
        symbols: Symbols = encode(x.to(device), codec)
        statistics.add(symbols, x.to(device), reconstruct(symbols, codec))
        found.append(statistics.figures())
    assert found[0].bands == found[1].bands
    assert found[0].payload_bits == found[1].payload_bits
    assert found[0].sqnr_db == pytest.approx(found[1].sqnr_db, rel=1e-4)


def test_taps_move_with_their_module() -> None:
    x, state = made(CONFIGS[-1])
    model = torch.nn.Sequential(torch.nn.Identity())
    set_taps(model, {"0": CalibratedTap(state.config, (4, 20, 20), "", state.bounds, state.bases)})
    expected = model(x)
    model.cuda()
    assert torch.allclose(model(x.cuda()).cpu(), expected, atol=1e-6)
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.allclose(model(x.cuda()).cpu(), expected, atol=1e-6)
    assert torch.equal(model.cpu()(x), expected)
    assert list(taps_of(model)) == ["0"]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_rate_and_its_gradient_are_the_cpus(config: dict[str, Any]) -> None:
    x, state = made(config)
    found = []
    for maps, codec in ((x, state), (x.cuda(), moved(state))):
        leaf = maps.clone().requires_grad_()
        values, bits = simulate_rated(leaf, codec)
        (values.square().sum() + bits).backward()
        assert leaf.grad is not None
        found.append((bits.detach().cpu(), leaf.grad.cpu()))
    (bits, gradient), (bits_there, gradient_there) = found
    assert torch.allclose(bits, bits_there, rtol=1e-4)
    assert torch.allclose(gradient, gradient_there, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_sensitivities_are_the_cpus() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    images = torch.randn(8, 1, 22, 22)
    _, state = made({"kernel": "dct"})
    found = []
    for device in ("cpu", "cuda"):
        tap = CalibratedTap(state.config, (4, 20, 20), "", state.bounds.to(device))
        one = measure_sensitivity(model.to(device), {"1": tap}, [images.to(device)])["1"]
        found.append((one.means(), one.shares()))
    (means, shares), (means_there, shares_there) = found
    assert torch.allclose(means, means_there, rtol=1e-2)
    assert torch.equal(shares, shares_there)
