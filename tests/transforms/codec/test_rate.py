"""The stand-in for the rate against the code's own lengths."""

from __future__ import annotations

import torch
from torch import nn

from cctool.coding.symbols import code_lengths, to_unsigned
from cctool.transforms.codec.calibrate import calibrate
from cctool.transforms.codec.codec import CodecConfig
from cctool.transforms.codec.sites import Site
from cctool.transforms.codec.taps import collecting_rates, set_taps, taps_of
from cctool.transforms.codec.training import soft_bits, soft_bits_slope


def test_it_meets_the_code_of_order_1_and_is_never_above_it() -> None:
    symbols = torch.arange(-200, 201, dtype=torch.int32)
    lengths = code_lengths(500, 1)[to_unsigned(symbols)].double()
    found = soft_bits(symbols.double())
    assert (found <= lengths + 1e-9).all()
    assert (found > lengths - 2).all()
    meeting = torch.isin(symbols.abs(), torch.tensor([0, 1, 3, 7, 15, 31, 63, 127]))
    assert torch.allclose(found[meeting], lengths[meeting])


def test_its_slope_is_its_derivative() -> None:
    z = torch.linspace(-5, 5, 200, dtype=torch.float64, requires_grad=True)
    soft_bits(z).sum().backward()
    assert z.grad is not None
    assert torch.allclose(soft_bits_slope(z.detach()), z.grad)
    assert float(soft_bits_slope(torch.zeros(()))) == 0


def test_rates_weigh_taps_by_their_values_and_are_forgotten() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 5, 3), nn.ReLU())
    images = torch.randn(4, 1, 10, 10)
    sites = [Site("1", (2, 10, 10)), Site("3", (5, 8, 8))]
    config = CodecConfig(kernel="dct", table=(4.0,))
    set_taps(model, calibrate(model, sites, {site.name: config for site in sites}, [images], "now"))
    with collecting_rates(model) as rates:
        assert rates.per_element() is None
        with torch.no_grad():
            model(images)
        assert rates.per_element() is None
        model(images)
        (first, second), counts = zip(*rates.passes, strict=True)
        assert counts == (4 * 200, 4 * 320)
        found = rates.per_element()
        assert found is not None
        assert float(found.detach()) == float(((first + second) / (4 * 520)).detach())
        assert rates.per_element() is None
        found.backward()
        assert model[0].weight.grad is not None
        assert model[0].weight.grad.abs().max() > 0
    assert all(hook.rates is None for hook in taps_of(model).values())
