"""LSQ and PACT: values in numpy, gradients by the papers' equations written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cctool.quantization.quantizers.apot import ApotQuantizer
from cctool.quantization.quantizers.config import QuantizerConfig, QuantizerMethod
from cctool.quantization.quantizers.lsq_pact import LsqQuantizer, PactQuantizer
from cctool.quantization.quantizers.make import make_quantizer


def made(
    method: QuantizerMethod, bits: int, *, weight: bool, channels: int | None = None, **settings: Any
) -> Any:
    config = QuantizerConfig(method=method, bits=bits, **settings)
    return make_quantizer(config, weight=weight, channels=channels)


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lsq_by_numpy(
    v: np.ndarray, s: float, low: int, high: int, g: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Values, gradient of v and unscaled gradient of s: Esser 2020, equations 1, 2, 5 and 3, by loops."""
    values, dv, ds = np.zeros_like(v), np.zeros_like(v), 0.0
    for at in np.ndindex(v.shape):
        ratio = v[at] / s
        values[at] = np.round(np.clip(ratio, low, high)) * s
        if ratio <= low:
            ds += g[at] * low
        elif ratio >= high:
            ds += g[at] * high
        else:
            dv[at] = g[at]
            ds += g[at] * (np.round(ratio) - ratio)
    return values, dv, ds


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, True), (4, False), (1, False)])
@pytest.mark.parametrize("weight", [True, False])
def test_lsq_is_the_papers_equations(bits: int, signed: bool, weight: bool) -> None:
    quantizer = made("lsq", bits, weight=weight, signed=signed)
    quantizer.step.data.fill_(0.4)
    x, upstream = randoms(4, 5, 3).double().requires_grad_(), randoms(4, 5, 3, seed=1).double()
    found = quantizer(x)
    (found * upstream).sum().backward()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    step = quantizer.step.item()
    values, dx, ds = lsq_by_numpy(x.detach().numpy(), step, low, high, upstream.numpy())
    np.testing.assert_allclose(found.detach().numpy(), values, rtol=1e-12)
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), dx)
    elements = 60 if weight else 15
    assert quantizer.step.grad.item() == pytest.approx(ds / math.sqrt(elements * high), rel=1e-5)


def test_the_ends_of_lsqs_range_count_as_outside() -> None:
    quantizer = made("lsq", 3, weight=True)
    quantizer.step.data.fill_(0.5)
    w = torch.tensor([-2.0, -1.9, 1.4, 1.5], requires_grad=True)
    quantizer(w).sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [0, 1, 1, 0]
    slopes = -4 + (3.8 - 4) + (3 - 2.8) + 3
    assert quantizer.step.grad.item() == pytest.approx(slopes / math.sqrt(4 * 3), rel=1e-5)


def test_each_slice_learns_a_step() -> None:
    w, upstream = randoms(3, 4, 2).double(), randoms(3, 4, 2, seed=1).double()
    quantizer = made("lsq", 3, weight=True, axis=1, channels=4)
    quantizer.initialise(w)
    (quantizer(w) * upstream).sum().backward()
    for channel in range(4):
        alone = made("lsq", 3, weight=True)
        alone.initialise(w[:, channel])
        (alone(w[:, channel]) * upstream[:, channel]).sum().backward()
        assert quantizer.step[channel].item() == pytest.approx(alone.step.item())
        assert quantizer.step.grad[channel].item() == pytest.approx(alone.step.grad.item(), rel=1e-5)


@pytest.mark.parametrize(("bits", "signed", "top"), [(4, True, 7), (4, False, 15), (2, True, 1)])
def test_the_first_step_is_twice_the_mean_magnitude_over_the_root_of_the_top(
    bits: int, signed: bool, top: int
) -> None:
    x = randoms(6, 7)
    quantizer = made("lsq", bits, weight=not signed, signed=signed)
    quantizer.initialise(x)
    assert quantizer.step.item() == pytest.approx(2 * np.abs(x.numpy()).mean() / math.sqrt(top), rel=1e-6)


def test_lsq_takes_a_calibrated_range() -> None:
    quantizer = made("lsq", 4, weight=False, signed=False)
    quantizer.set_range(torch.tensor(0.0), torch.tensor(3.0))
    assert quantizer.step.item() == pytest.approx(0.2)


def test_a_step_below_zero_makes_zeros_and_finds_its_way_back() -> None:
    quantizer = made("lsq", 3, weight=True)
    quantizer.step.data.fill_(-0.1)
    w = torch.tensor([-2.0, 0.0, 1.0], requires_grad=True)
    found = quantizer(w)
    assert found.tolist() == [0.0, 0.0, 0.0]
    ((found - w.detach()) ** 2).sum().backward()
    assert quantizer.step.grad < 0
    assert w.grad is not None
    assert torch.isfinite(w.grad).all()


def test_training_a_step_lessens_the_error() -> None:
    w, quantizer = randoms(400), made("lsq", 3, weight=True)
    quantizer.step.data.fill_(2.0)
    errors = []
    for _ in range(60):
        loss = ((quantizer(w) - w) ** 2).mean()
        (gradient,) = torch.autograd.grad(loss, quantizer.parameters())
        quantizer.step.data -= 10 * gradient
        errors.append(loss.item())
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_pact_is_the_papers_equations(bits: int) -> None:
    quantizer = made("pact", bits, weight=False, signed=False)
    assert quantizer.alpha.item() == 8.0
    quantizer.set_range(torch.tensor(-5.0), torch.tensor(1.5))
    x, upstream = randoms(50).double(), randoms(50, seed=1).double()
    x[:3] = torch.tensor([0.0, 1.5, 9.0])
    x.requires_grad_()
    found = quantizer(x)
    (found * upstream).sum().backward()
    top, v, g = 2**bits - 1, x.detach().numpy(), upstream.numpy()
    clipped = 0.5 * (np.abs(v) - np.abs(v - 1.5) + 1.5)
    np.testing.assert_allclose(
        found.detach().numpy(), np.round(clipped * top / 1.5) * 1.5 / top, rtol=1e-6, atol=1e-9
    )
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), np.where((v >= 0) & (v < 1.5), g, 0))
    assert quantizer.alpha.grad.item() == pytest.approx(g[v >= 1.5].sum(), rel=1e-6)


def test_an_alpha_below_zero_makes_zeros_and_finds_its_way_back() -> None:
    quantizer = made("pact", 4, weight=False, signed=False)
    quantizer.alpha.data.fill_(-1.0)
    x = torch.tensor([-3.0, 0.0, 2.0], requires_grad=True)
    found = quantizer(x)
    assert found.tolist() == [0.0, 0.0, 0.0]
    (found - x.detach()).square().sum().backward()
    assert quantizer.alpha.grad < 0


def test_what_is_learned_is_a_parameter() -> None:
    for quantizer, name, kind in (
        (made("lsq", 4, weight=True), "step", LsqQuantizer),
        (made("pact", 4, weight=False, signed=False), "alpha", PactQuantizer),
        (made("apot", 4, weight=True), "alpha", ApotQuantizer),
    ):
        assert isinstance(quantizer, kind)
        assert [found for found, _ in quantizer.named_parameters()] == [name]
        assert list(quantizer.state_dict()) == [name]
