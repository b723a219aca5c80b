"""Uniform fake quantizers against numpy: values, gradients, ranges that move."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cctool.errors import CorruptCheckpointError
from cctool.quantization.configs import QuantizerConfig
from cctool.quantization.quantizers import UniformQuantizer, make_quantizer


def made(*, weight: bool = True, channels: int | None = None, **settings: Any) -> UniformQuantizer:
    config = QuantizerConfig(method="uniform", **{"bits": 8, **settings})
    quantizer = make_quantizer(config, weight=weight, channels=channels)
    assert isinstance(quantizer, UniformQuantizer)
    return quantizer


def by_numpy(x: np.ndarray, low: float, high: float, scale: float, zero: int = 0) -> np.ndarray:
    n = np.clip(np.round(x.astype(np.float64) / scale) + zero, low, high)
    return (n - zero) * scale


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("narrow", [False, True])
def test_signed_weights_are_the_formula(bits: int, narrow: bool) -> None:
    w = randoms(5, 4, 3, 3)
    quantizer = made(bits=bits, narrow=narrow)
    quantizer.initialise(w)
    top = 2 ** (bits - 1) - 1
    bottom = -top if narrow else -top - 1
    scale = float(np.float32(max(w.min().item() / bottom, w.max().item() / top)))
    np.testing.assert_allclose(
        quantizer(w).detach().numpy(), by_numpy(w.numpy(), bottom, top, scale), atol=1e-6
    )


def test_each_slice_has_a_scale_of_its_own() -> None:
    w = randoms(3, 4, 2, 2) * torch.tensor([1.0, 0.0, 50.0, 1e-3]).view(1, 4, 1, 1)
    quantizer = made(bits=4, channels=4, axis=1)
    quantizer.initialise(w)
    found = quantizer(w)
    for channel in range(4):
        alone = made(bits=4)
        alone.initialise(w[:, channel])
        assert torch.equal(found[:, channel], alone(w[:, channel]))
        assert quantizer.scale[channel] == alone.scale
    assert not found[:, 1].any()


def test_asymmetric_activations_are_the_formula_and_keep_zero() -> None:
    x = randoms(6, 5).abs() + 0.5
    x[0, 0] = -0.25
    quantizer = made(weight=False, signed=False, symmetric=False)
    quantizer.set_range(torch.tensor(-0.25), torch.tensor(3.0))
    scale = float(np.float32(3.25 / 255))
    zero = round(0.25 / scale)
    assert quantizer.zero_point.item() == zero
    np.testing.assert_allclose(quantizer(x).numpy(), by_numpy(x.numpy(), 0, 255, scale, zero), atol=1e-6)
    assert quantizer(torch.zeros(1)).item() == 0


def test_reduced_range_is_that_of_seven_bits() -> None:
    w = randoms(40)
    reduced, seven = made(reduce_range=True), made(bits=7)
    reduced.initialise(w)
    seven.initialise(w)
    assert torch.equal(reduced(w), seven(w))
    assert len(reduced(w).unique()) > 20


def test_the_gradient_is_one_where_the_nearest_integer_is_in_the_grid_and_zero_elsewhere() -> None:
    quantizer = made(bits=2, weight=False)
    quantizer.set_range(torch.tensor(-2.0), torch.tensor(1.0))
    x = torch.tensor([-9.0, -2.6, -2.4, -2.0, 0.3, 1.0, 1.4, 1.6, 9.0], requires_grad=True)
    (quantizer(x) * torch.arange(1.0, 10.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 7, 0, 0]


def test_the_ends_of_a_weights_own_range_have_a_gradient() -> None:
    for seed in range(20):
        w = randoms(30, seed=seed).requires_grad_()
        quantizer = made(bits=8, momentum=0.0)
        quantizer(w).sum().backward()
        assert w.grad is not None
        assert (w.grad == 1).all()


def test_a_live_range_follows_the_weight_in_training_only() -> None:
    live, still = made(momentum=0.9), made()
    w = randoms(20)
    for quantizer in (live, still):
        quantizer.initialise(w)
        quantizer.train()
        quantizer(3 * w)
    assert live.scale == pytest.approx(3 * still.scale.item())
    live.eval()
    before = live.scale.clone()
    live(10 * w)
    assert live.scale == before


def test_moving_range_is_the_bias_corrected_average() -> None:
    momentum, batches = 0.8, [randoms(4, 3, seed=seed) * (seed + 1) for seed in range(6)]
    quantizer = made(weight=False, symmetric=False, momentum=momentum)
    sums = np.zeros(2)
    for step, batch in enumerate(batches, 1):
        quantizer(batch)
        sums = momentum * sums + (1 - momentum) * np.array([batch.min(), batch.max()])
        low, high = sums / (1 - momentum**step)
        assert quantizer.low.item() == pytest.approx(low, rel=1e-5)
        assert quantizer.high.item() == pytest.approx(high, rel=1e-5)
        assert quantizer.scale.item() == pytest.approx((high - low) / 255, rel=1e-5)
    assert quantizer.steps_seen.item() == 6
    quantizer.eval()
    quantizer(batches[0])
    assert quantizer.steps_seen.item() == 6


def test_momentum_changes_the_range_and_zero_takes_the_batchs() -> None:
    ranges = {}
    for momentum in (0.0, 0.5, 0.99):
        quantizer = made(weight=False, momentum=momentum)
        for size in (1.0, 4.0):
            quantizer(torch.tensor([-size, size]))
        ranges[momentum] = quantizer.high.item()
    assert ranges[0.0] == 4.0
    assert ranges[0.5] == pytest.approx((0.25 * 1 + 0.5 * 4) / 0.75)
    assert 2.5 < ranges[0.99] < 2.6


def test_a_moving_range_goes_on_from_a_calibrated_one() -> None:
    quantizer = made(weight=False, momentum=0.9)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    quantizer(torch.tensor([-11.0, 11.0]))
    assert quantizer.high.item() == pytest.approx(0.9 * 1 + 0.1 * 11)


def test_moving_ranges_of_slices() -> None:
    quantizer = made(weight=False, momentum=0.5, axis=1, channels=3)
    x = randoms(4, 3, 2)
    quantizer(x)
    assert torch.allclose(quantizer.high, x.amax((0, 2)))
    assert torch.allclose(quantizer.low, x.amin((0, 2)))


def test_a_batch_with_infinities_does_not_move_the_range() -> None:
    quantizer = made(weight=False, momentum=0.5)
    quantizer(torch.tensor([-1.0, 2.0]))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    for bad in (float("inf"), float("nan")):
        quantizer(torch.tensor([bad, 1.0]))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_state_is_named_and_shaped_by_the_config() -> None:
    shapes = {name: tuple(v.shape) for name, v in made(axis=0, channels=3).state_dict().items()}
    assert shapes == {"scale": (3,), "zero_point": (3,)}
    moving = made(weight=False, momentum=0.9).state_dict()
    assert set(moving) == {"scale", "zero_point", "low", "high", "steps_seen"}
    assert moving["zero_point"].dtype == torch.int32


@pytest.mark.parametrize(
    ("name", "value", "settings"),
    [
        ("scale", -1.0, {}),
        ("scale", float("nan"), {}),
        ("scale", float("inf"), {}),
        ("zero_point", 1, {}),
        ("zero_point", 256, {"symmetric": False, "signed": False}),
        ("zero_point", -1, {"symmetric": False, "signed": False}),
    ],
)
def test_state_that_is_no_quantizers_is_refused(name: str, value: float, settings: dict[str, Any]) -> None:
    quantizer = made(**settings)
    quantizer.check()
    getattr(quantizer, name).fill_(value)
    with pytest.raises(CorruptCheckpointError):
        quantizer.check()
