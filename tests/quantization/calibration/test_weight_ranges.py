import math

import numpy as np
import pytest
import torch

from cctool.quantization.calibration.weight_ranges import fit_weight, least_squares_range
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.make import make_quantizer


def _heavy(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) ** 3


def _quantizer(channels=None, **settings):
    return make_quantizer(
        QuantizerConfig(method="uniform", **settings), weight=True, channels=channels
    ).eval()


def _error(values, scale, zero, low, high):
    n = np.clip(np.rint(values / scale) + zero, low, high)
    return float((((n - zero) * scale - values) ** 2).sum())


def _finest_symmetric(values, low, high):
    largest = np.abs(values).max() / max(1, -low, high) * 2
    return min(_error(values, scale, 0, low, high) for scale in np.linspace(largest / 1000, largest, 1000))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("narrow", [False, True])
def test_no_symmetric_scale_of_a_fine_search_has_a_clearly_smaller_error(bits, narrow):
    weight = _heavy(4, 100, 3, 1)
    quantizer = _quantizer(4, bits=bits, axis=0, narrow=narrow)
    fit_weight(quantizer, weight)
    low, high = quantizer.config.limits
    for row, scale in zip(weight.double().flatten(1).numpy(), quantizer.scale.tolist(), strict=True):
        assert _error(row, scale, 0, low, high) <= 1.03 * _finest_symmetric(row, low, high)


@pytest.mark.parametrize("bits", [2, 4])
def test_no_pair_of_ends_of_a_search_over_all_pairs_has_a_clearly_smaller_error(bits):
    weight = torch.where(_heavy(400) < 0, _heavy(400) * 4, _heavy(400, seed=1).abs() * 0.5)
    quantizer = _quantizer(bits=bits, symmetric=False)
    fit_weight(quantizer, weight)
    low, high = quantizer.config.limits
    values = weight.double().numpy()
    least = math.inf
    for bottom in values.min() * np.geomspace(0.01, 1, 40):
        for top in values.max() * np.geomspace(0.01, 1, 40):
            scale = (top - bottom) / (high - low)
            zero = np.clip(np.rint(low - bottom / scale), low, high)
            least = min(least, _error(values, scale, zero, low, high))
    found = _error(values, float(quantizer.scale), float(quantizer.zero_point), low, high)
    assert found <= 1.1 * least


def test_moving_the_ends_apart_is_better_than_shrinking_both_for_skewed_values():
    weight = torch.cat([torch.linspace(0, 1, 1000), torch.tensor([-3.0])])
    config = QuantizerConfig(method="uniform", bits=2, symmetric=False)
    low, high = least_squares_range(weight, config)
    assert float(low / weight.min()) < 0.5 * float(high / weight.max())


def test_with_eight_bits_the_whole_weight_is_in_range_and_with_seven_it_is_not():
    weight = torch.cat([0.1 * _heavy(2000), torch.tensor([100.0])])
    eight, few = _quantizer(bits=8), _quantizer(bits=4)
    fit_weight(eight, weight)
    fit_weight(few, weight)
    assert float(eight.scale) == pytest.approx(100 / 127)
    assert float(few.scale) * 7 < 100


def test_with_a_fold_the_error_is_that_of_the_folded_weight():
    weight = _heavy(4, 30)
    fold = torch.tensor([0.1, 5.0, -2.0, 1.0])
    folded, plain = _quantizer(bits=3), _quantizer(bits=3)
    fit_weight(folded, weight, fold)
    fit_weight(plain, weight * fold[:, None])
    assert torch.equal(folded.scale, plain.scale)


def test_a_channel_of_zeros_gets_scale_zero_and_an_empty_weight_is_left():
    weight = _heavy(3, 10)
    weight[1] = 0
    quantizer = _quantizer(3, bits=4, axis=0)
    fit_weight(quantizer, weight)
    assert float(quantizer.scale[1]) == 0
    assert bool((quantizer.scale[[0, 2]] > 0).all())
    empty = _quantizer(0, bits=4, axis=0)
    fit_weight(empty, torch.zeros(0, 3))
    assert empty.scale.shape == (0,)


def test_channels_along_dimension_one_get_the_scales_of_the_transposed_weight():
    weight = _heavy(5, 4, 3)
    along, turned = _quantizer(4, bits=3, axis=1), _quantizer(4, bits=3, axis=0)
    fit_weight(along, weight)
    fit_weight(turned, weight.transpose(0, 1))
    assert torch.allclose(along.scale, turned.scale, rtol=1e-6)


def test_a_learnt_step_begins_as_its_method_says():
    weight = _heavy(50)
    fitted, begun = (
        make_quantizer(QuantizerConfig(method="lsq", bits=4), weight=True, channels=None) for _ in range(2)
    )
    fit_weight(fitted, weight)
    begun.initialise(weight)
    assert torch.equal(fitted(weight), begun(weight))


def test_a_large_tensor_is_fitted_from_evenly_spaced_values(monkeypatch):
    weight = _heavy(2, 4000)
    weight[0, 0], weight[0, 2] = weight.max() + 1, weight.min() - 1
    config = QuantizerConfig(method="uniform", bits=4)
    expected = least_squares_range(weight.flatten()[::2], config)
    whole = least_squares_range(weight, config)
    monkeypatch.setattr("cctool.quantization.calibration.weight_ranges._MOST_VALUES", 4000)
    found = least_squares_range(weight, config)
    assert found == expected
    assert found != whole


@pytest.mark.cuda
def test_scales_on_a_gpu_are_those_of_the_cpu():
    weight = _heavy(6, 50)
    here, there = _quantizer(6, bits=3, axis=0), _quantizer(6, bits=3, axis=0).cuda()
    fit_weight(here, weight)
    fit_weight(there, weight.cuda())
    assert torch.allclose(here.scale, there.scale.cpu(), rtol=1e-5)
