import itertools

import numpy as np
import pytest
import torch
from torch import nn

from cctool.quantization.calibration.weight_ranges import fit_weight
from cctool.quantization.network.calls import flow_of
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.make import make_quantizer
from cctool.quantization.refine.im2col import geometry_of, outputs_at, rows_at
from cctool.quantization.refine.rounding import Rows, WeightRounding, learn


def _quantizer(weight, **settings):
    config = QuantizerConfig(method="uniform", **settings)
    channels = None if config.axis is None else weight.shape[config.axis]
    quantizer = make_quantizer(config, weight=True, channels=channels).eval()
    fit_weight(quantizer, weight)
    return quantizer


def _rows(layer, x):
    (call,) = [call for call in flow_of(layer, (x,)).calls if call.weight]
    geometry, y = geometry_of(call), layer(x).detach()
    places = y[0].numel() // y.shape[1 if geometry.dims else -1]
    images, where = torch.arange(len(x)).repeat_interleave(places), torch.arange(places).repeat(len(x))
    return Rows(rows_at(x, geometry, images, where), outputs_at(y, geometry, images, where), geometry)


def _same(y):
    return y


def _learn(rounding, rows, bias=None, after=_same, steps=200):
    return learn(rounding, rows, bias, after, steps=steps, generator=torch.Generator().manual_seed(0))


def _correlated(count, width, *, noise=0.1):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(2, width, generator=generator)
    return torch.randn(count, 2, generator=generator) @ mix + 0.1 * torch.randn(
        count, width, generator=generator
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_learned_rounding_is_in_the_best_eighth_of_all(symmetric):
    torch.manual_seed(1)
    layer, x = nn.Linear(8, 1, bias=False), _correlated(400, 8, noise=0.5)
    weight = layer.weight.detach()
    quantizer = _quantizer(weight, bits=3, symmetric=symmetric)
    rounding, rows = WeightRounding(weight, quantizer, None, None), _rows(layer, x)
    found = _learn(rounding, rows, steps=60)
    scale, zero = float(quantizer.scale), int(quantizer.zero_point)
    low, high = quantizer.config.limits
    inputs, wanted, w = x.double().numpy(), rows.outputs.double().numpy()[:, 0], weight.double().numpy()[0]
    base = np.floor(w / scale) + zero
    errors = {
        ups: float((((np.clip(base + ups, low, high) - zero) * scale @ inputs.T - wanted) ** 2).mean())
        for ups in itertools.product((0, 1), repeat=8)
    }
    nearest = tuple((np.rint(w / scale) + zero > base).astype(int).tolist())
    chosen = rounding.chosen(found.up).double().numpy()[0]
    reached = float(((inputs @ chosen - wanted) ** 2).mean())
    assert reached < 0.6 * errors[nearest]
    assert sum(error < 0.999 * reached for error in errors.values()) < 32
    assert found.kept
    assert found.changed > 0


def test_nearest_rounding_is_kept_where_nothing_better_is_learned():
    layer = nn.Linear(6, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1, 2, -3, 1, 3], [1, 1, -3, 0, 2, 0]]))
    rounding = WeightRounding(layer.weight.detach(), _quantizer(layer.weight.detach(), bits=8), None, None)
    found = _learn(rounding, _rows(layer, _correlated(100, 6)), steps=1)
    assert not found.kept
    assert found.changed == 0


def test_what_clipping_hides_counts_for_nothing():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 3), _correlated(300, 8)
    weight = layer.weight.detach()
    rounding = WeightRounding(weight, _quantizer(weight, bits=3), None, None)
    rows = _rows(layer, x)
    bias = layer.bias.detach()
    assert _learn(rounding, rows, bias, lambda y: (y - 1e3).clamp(min=0), steps=20).nearest == 0
    bare, clipped = _learn(rounding, rows, bias, steps=50), _learn(rounding, rows, bias, torch.relu, steps=50)
    assert clipped.nearest < bare.nearest
    assert clipped.learned < bare.learned


def test_the_bias_of_now_and_not_of_then_is_reckoned_with():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 2), _correlated(300, 8) + 1
    weight = layer.weight.detach()
    rounding, rows = WeightRounding(weight, _quantizer(weight, bits=3), None, None), _rows(layer, x)
    bias = layer.bias.detach()
    shifted, right = (_learn(rounding, rows, b, steps=50) for b in (bias + 3, bias))
    assert shifted.nearest > right.nearest + 5
    assert not torch.equal(shifted.up, right.up)


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), (20, 4, 6, 6), 0),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, bias=False), (20, 4, 4, 4), None),
        (nn.ConvTranspose1d(6, 3, 3, bias=False), (40, 6, 5), 1),
        (nn.Conv3d(3, 8, 3, bias=False), (20, 3, 5, 5, 5), 0),
    ],
)
def test_outputs_of_convolutions_get_closer_than_with_nearest_rounding(layer, shape, axis):
    torch.manual_seed(2)
    nn.init.normal_(layer.weight)
    x = torch.relu(torch.randn(shape) + 0.5)
    weight = layer.weight.detach()
    quantizer = _quantizer(weight, bits=3, axis=axis)
    rounding = WeightRounding(weight, quantizer, None, None)
    found = _learn(rounding, _rows(layer, x))
    with torch.no_grad():
        wanted = layer(x)
        layer.weight.copy_(quantizer(weight))
        nearest = float((layer(x) - wanted).square().mean())
        layer.weight.copy_(rounding.chosen(found.up))
        learned = float((layer(x) - wanted).square().mean())
        assert torch.equal(quantizer(layer.weight), layer.weight)
    assert learned < 0.9 * nearest


def test_with_a_fold_the_quantizer_leaves_the_chosen_values_as_they_are():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    fold = torch.tensor([0.3, -2.0, 0.0, 1.7, 0.01])
    quantizer = _quantizer(weight, bits=4)
    fit_weight(quantizer, weight, fold)
    rounding = WeightRounding(weight, quantizer, fold, None)
    up = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.5
    values = rounding.chosen(up)
    assert torch.equal(quantizer(values, fold), values)
    assert torch.equal(rounding.chosen(rounding.nearest), quantizer(weight, fold))
    assert not torch.equal(values, rounding.chosen(rounding.nearest))


def test_masked_weights_stay_zero_and_channels_without_a_scale_too():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(24).reshape(4, 6) % 3 > 0
    weight = weight * mask
    weight[2] = 0
    rounding = WeightRounding(weight, _quantizer(weight, bits=4, axis=0, symmetric=False), None, mask)
    values = rounding.chosen(torch.ones(4, 6, dtype=torch.bool))
    assert not values[~mask].any()
    assert not values[2].any()
    assert values[mask & (weight != 0)].all()
