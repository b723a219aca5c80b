"""Learned additive powers of two: levels and gradients by the paper's equations written out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cctool.quantization.encodings.apot_levels import apot_levels
from cctool.quantization.quantizers.apot import ApotQuantizer, unit_levels
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.make import make_quantizer


def made(bits: int, **settings: Any) -> ApotQuantizer:
    config = QuantizerConfig(method="apot", bits=bits, **settings)
    quantizer = make_quantizer(config, weight=True, channels=None)
    assert isinstance(quantizer, ApotQuantizer)
    return quantizer


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "terms"), [(2, 1), (2, 2), (1, 3), (3, 2), (2, 3)])
def test_levels_are_all_sums_of_the_papers_powers(width: int, terms: int) -> None:
    choices = [
        [0.0] + [2.0 ** -(i + j * terms) for j in range(2**width - 1)] for i in range(terms)
    ]  # equation 3: p_i in {0, 2^-i, 2^-(i+n), ..., 2^-(i+(2^k-2)n)}
    sums = np.array(sorted(sum(each) for each in itertools.product(*choices)))
    found = unit_levels((width,) * terms).numpy()
    assert len(found) == 2 ** (width * terms + 1) - 1
    np.testing.assert_allclose(found[len(found) // 2 :], sums / sums[-1], rtol=1e-15)
    np.testing.assert_array_equal(found, -found[::-1])


def test_terms_of_different_widths_have_different_sums() -> None:
    found = unit_levels((2, 1))
    assert len(found.unique()) == 15
    assert (found.min(), found.max()) == (-1, 1)


def test_levels_are_those_that_stored_weights_have() -> None:
    # Li's program deals the powers of terms of unequal widths out in another way than by turns.
    stored = apot_levels(4, 2)
    np.testing.assert_array_equal(unit_levels((2, 1)).numpy(), stored / stored[-1])
    assert (stored[8:] / stored[-1]).round(2).tolist() == [0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1]


@pytest.mark.parametrize("settings", [{"bits": 4}, {"bits": 5}, {"bits": 5, "terms": 1}, {"bits": 8}])
def test_apot_takes_the_nearest_level(settings: dict[str, Any]) -> None:
    w = randoms(200)
    quantizer = made(**settings)
    quantizer.initialise(w)
    levels = unit_levels(quantizer.config.term_bits).numpy() * quantizer.alpha.item()
    distances = np.abs(w.numpy()[:, None].astype(np.float64) - levels)
    found = quantizer(w).detach().numpy()
    np.testing.assert_allclose(np.abs(found - w.numpy()), distances.min(1), atol=1e-6)


def test_terms_change_the_levels() -> None:
    w = randoms(500)
    found = {}
    for terms in (1, 2, 4):
        quantizer = made(5, terms=terms)
        quantizer.set_range(torch.tensor(-1.0), torch.tensor(2.0))
        assert quantizer.alpha.item() == 2.0
        found[terms] = quantizer(w).detach()
    assert not torch.equal(found[1], found[2])
    assert not torch.equal(found[2], found[4])
    # Four terms of one bit are evenly spaced: 15 levels a side.
    np.testing.assert_allclose(found[4].numpy(), np.round(w.clamp(-2, 2).numpy() * 7.5) / 7.5, atol=1e-6)


def test_apots_gradients_are_those_of_the_reparameterised_clip() -> None:
    quantizer = made(4)
    quantizer.alpha.data.fill_(1.25)
    w, upstream = randoms(60).double().requires_grad_(), randoms(60, seed=1).double()
    found = quantizer(w)
    (found * upstream).sum().backward()
    v, q, g = w.detach().numpy(), found.detach().numpy(), upstream.numpy()
    inside = np.abs(v) <= 1.25
    slope = np.where(inside, q / 1.25 - v / 1.25, np.sign(v))
    assert not inside.all()
    assert w.grad is not None
    np.testing.assert_array_equal(w.grad.numpy(), np.where(inside, g, 0))
    assert quantizer.alpha.grad is not None
    assert quantizer.alpha.grad.item() == pytest.approx((g * slope).sum(), rel=1e-6)


@pytest.mark.parametrize("size", [0.5, 30.0])
def test_apots_first_alpha_is_three_times_the_root_mean_square_or_the_maximum(size: float) -> None:
    w = randoms(50)
    w[0] = size
    quantizer = made(4)
    quantizer.initialise(w)
    wide = w.numpy().astype(np.float64)
    expected = min(3 * np.sqrt((wide**2).mean()), np.abs(wide).max())
    assert quantizer.alpha.item() == pytest.approx(expected, rel=1e-6)
