"""DoReFa and WRPN against the papers' formulas in numpy, and gradients worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError
from cctool.quantization.quantizers.base import Quantizer
from cctool.quantization.quantizers.config import QuantizerConfig, QuantizerMethod
from cctool.quantization.quantizers.dorefa_wrpn import DorefaWeightQuantizer
from cctool.quantization.quantizers.make import make_quantizer


def weights(method: QuantizerMethod, bits: int) -> Quantizer:
    return make_quantizer(QuantizerConfig(method=method, bits=bits), weight=True, channels=None)


def activations(method: QuantizerMethod, bits: int) -> Quantizer:
    config = QuantizerConfig(method=method, bits=bits, signed=False)
    return make_quantizer(config, weight=False, channels=None)


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def q_k(x: np.ndarray, bits: int) -> np.ndarray:
    return np.round((2**bits - 1) * x) / (2**bits - 1)


@pytest.mark.parametrize("method", ["dorefa", "pact"])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 12])
def test_dorefa_weights_are_the_formula(method: QuantizerMethod, bits: int) -> None:
    w = randoms(6, 5, 3)
    t = np.tanh(w.numpy().astype(np.float64))
    expected = 2 * q_k(t / (2 * np.abs(t).max()) + 0.5, bits) - 1
    quantizer = weights(method, bits)
    np.testing.assert_allclose(quantizer(w).numpy(), expected, atol=1e-6)
    assert quantizer.state_dict()["maximum"].item() == pytest.approx(np.abs(t).max())


def test_dorefa_weights_of_one_bit_are_signs_times_the_mean_magnitude() -> None:
    w = torch.tensor([-3.0, 0.0, -0.0, 1.0], requires_grad=True)
    found = weights("dorefa", 1)(w)
    assert found.tolist() == [-1.0, 1.0, 1.0, 1.0]
    (found * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_dorefas_gradient_goes_through_tanh_and_the_maximum() -> None:
    w, upstream = randoms(7).double().requires_grad_(), randoms(7, seed=1).double()
    (weights("dorefa", 3)(w) * upstream).sum().backward()
    # Of 2 Q(t / 2m + 1/2) - 1 with Q' = 1: t'_i (g_i / m - [i is the largest] sign(t_i) sum(g t) / m^2).
    t = np.tanh(w.detach().numpy())
    largest = int(np.abs(t).argmax())
    m, g = abs(t[largest]), upstream.numpy()
    expected = g / m
    expected[largest] -= np.sign(t[largest]) * (g * t).sum() / m**2
    expected *= 1 - t**2
    assert w.grad is not None
    np.testing.assert_allclose(w.grad.numpy(), expected, rtol=1e-9)


def test_dorefas_maximum_is_the_weights_while_training_and_kept_after() -> None:
    quantizer = weights("dorefa", 3)
    w = randoms(20)
    expected = quantizer(w)
    quantizer.eval()
    largest = int(w.abs().argmax())
    kept = [place for place in range(20) if place != largest]
    assert torch.equal(quantizer(w[kept]), expected[kept])
    quantizer.train()
    assert not torch.equal(quantizer(w[kept]), expected[kept])


def test_dorefa_grids_are_odd_integers_where_they_fit_eight_bits() -> None:
    w = randoms(200)
    for bits in (1, 2, 7):
        quantizer = weights("dorefa", bits)
        found = quantizer(w)
        grid = quantizer.grid()
        assert grid is not None
        assert (grid.low, grid.high) == (-(2**bits - 1), 2**bits - 1)
        n = grid.integers(found)
        assert torch.equal(grid.values(n), found)
        assert (n % 2 != 0).all()
        assert grid.scale.item() == pytest.approx(w.abs().mean().item() if bits == 1 else 1 / (2**bits - 1))
    assert weights("dorefa", 8).grid() is None


def test_a_maximum_that_is_none_is_refused() -> None:
    quantizer = weights("dorefa", 4)
    assert isinstance(quantizer, DorefaWeightQuantizer)
    quantizer.check()
    quantizer.maximum.fill_(-1.0)
    with pytest.raises(CorruptCheckpointError, match="negative"):
        quantizer.check()


@pytest.mark.parametrize("method", ["dorefa", "wrpn"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_activations_are_clamped_to_one_and_rounded(method: QuantizerMethod, bits: int) -> None:
    x = randoms(300) + 0.4
    found = activations(method, bits)(x)
    np.testing.assert_allclose(
        found.numpy(), q_k(np.clip(x.numpy().astype(np.float64), 0, 1), bits), atol=1e-6
    )
    assert len(found.unique()) <= 2**bits


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_wrpn_weights_have_equal_levels_to_either_side(bits: int) -> None:
    w = randoms(300) * 0.7
    n = 2 ** (bits - 1) - 1
    expected = np.round(np.clip(w.numpy().astype(np.float64), -1, 1) * n) / n
    np.testing.assert_allclose(weights("wrpn", bits)(w).numpy(), expected, atol=1e-6)


def test_gradients_of_clamps() -> None:
    x = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.4, 1.0, 1.01], requires_grad=True)
    activations("dorefa", 2)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 0, 1, 1, 1, 0]
    x.grad = None
    weights("wrpn", 3)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_fixed_ranges_have_no_state() -> None:
    assert not weights("wrpn", 4).state_dict()
    assert not activations("dorefa", 4).state_dict()
