"""Uniform fake quantizers against numpy: values, gradients, ranges that move."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.make import make_quantizer
from cctool.quantization.quantizers.uniform import MovingUniformQuantizer, UniformQuantizer


def made(*, weight: bool = True, channels: int | None = None, **settings: Any) -> UniformQuantizer:
    config = QuantizerConfig(method="uniform", **{"bits": 8, **settings})
    quantizer = make_quantizer(config, weight=weight, channels=channels)
    assert isinstance(quantizer, UniformQuantizer)
    return quantizer


def moving(**settings: Any) -> MovingUniformQuantizer:
    quantizer = made(weight=False, **settings)
    assert isinstance(quantizer, MovingUniformQuantizer)
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
    quantizer = moving(symmetric=False, momentum=momentum)
    sums = np.zeros(2)
    for step, batch in enumerate(batches, 1):
        quantizer(batch)
        sums = momentum * sums + (1 - momentum) * np.array([batch.min(), batch.max()])
        low, high = sums / (1 - momentum**step)
        assert quantizer.range.tolist() == pytest.approx([low, high, step], rel=1e-5)
        assert quantizer.grid().scale.item() == pytest.approx((high - low) / 255, rel=1e-5)
    quantizer.eval()
    before = quantizer.range.clone()
    quantizer(batches[0])
    assert torch.equal(quantizer.range, before)


def test_momentum_changes_the_range_and_zero_takes_the_batchs() -> None:
    ranges = {}
    for momentum in (0.0, 0.5, 0.99):
        quantizer = moving(momentum=momentum)
        for size in (1.0, 4.0):
            quantizer(torch.tensor([-size, size]))
        ranges[momentum] = quantizer.range[1].item()
    assert ranges[0.0] == 4.0
    assert ranges[0.5] == pytest.approx((0.25 * 1 + 0.5 * 4) / 0.75)
    assert 2.5 < ranges[0.99] < 2.6


def test_a_moving_range_goes_on_from_a_calibrated_one() -> None:
    quantizer = moving(momentum=0.9)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    quantizer(torch.tensor([-11.0, 11.0]))
    assert quantizer.range[1].item() == pytest.approx(0.9 * 1 + 0.1 * 11)


def test_moving_ranges_of_slices() -> None:
    quantizer = moving(momentum=0.5, axis=1, channels=3)
    x = randoms(4, 3, 2)
    quantizer(x)
    assert torch.allclose(quantizer.range[:, 1], x.amax((0, 2)))
    assert torch.allclose(quantizer.range[:, 0], x.amin((0, 2)))


def test_a_batch_with_infinities_does_not_move_the_range() -> None:
    quantizer = moving(momentum=0.5)
    quantizer(torch.tensor([-1.0, 2.0]))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    for bad in (float("inf"), float("nan")):
        quantizer(torch.tensor([bad, 1.0]))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_state_is_named_and_shaped_by_the_config() -> None:
    def state(quantizer: UniformQuantizer) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (value.dtype, tuple(value.shape)) for name, value in quantizer.state_dict().items()}

    assert state(made(axis=0, channels=3)) == {"scale": (torch.float32, (3,))}
    assert state(made(weight=False, symmetric=False)) == {
        "scale": (torch.float32, ()),
        "zero_point": (torch.int32, ()),
    }
    assert state(moving(momentum=0.9)) == {"range": (torch.float32, (3,))}
    assert state(moving(momentum=0.9, axis=1, channels=2)) == {"range": (torch.float32, (2, 3))}


def test_a_moving_range_goes_on_exactly_from_a_file() -> None:
    batches = [randoms(4, 3, seed=seed) * (seed + 1) for seed in range(5)]
    whole = moving(momentum=0.7, symmetric=False)
    for batch in batches:
        whole(batch)
    begun, resumed = moving(momentum=0.7, symmetric=False), moving(momentum=0.7, symmetric=False)
    for batch in batches[:2]:
        begun(batch)
    resumed.load_state_dict(begun.state_dict())
    for batch in batches[2:]:
        resumed(batch)
    assert torch.equal(resumed.range, whole.range)


def test_the_kept_grid_is_that_of_the_present_range() -> None:
    x, other = randoms(50), moving(momentum=0.9)
    other.set_range(torch.tensor(-0.1), torch.tensor(0.1))
    quantizer = moving(momentum=0.9).eval()
    changes = {
        "calibrated": lambda: quantizer.set_range(torch.tensor(-2.0), torch.tensor(1.0)),
        "loaded": lambda: quantizer.load_state_dict(other.state_dict()),
        "assigned": lambda: quantizer.load_state_dict(
            {"range": torch.tensor([-3.0, 2.0, 1.0])}, strict=True, assign=True
        ),
        "trained": lambda: quantizer.train()(7 * x),
    }
    for name, change in changes.items():
        quantizer.eval()(x)
        held = quantizer.grid()
        assert quantizer.grid() is held
        change()
        quantizer.eval()
        low, high, _ = quantizer.range.tolist()
        assert quantizer.grid().scale.item() == pytest.approx(max(high / 127, -low / 128)), name
        assert quantizer.grid().scale != held.scale, name


def test_copies_keep_grids_of_their_own() -> None:
    quantizer = moving(momentum=0.9).eval()
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    held = quantizer.grid()
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        twin.set_range(torch.tensor(-5.0), torch.tensor(5.0))
        assert twin.grid().scale > 4 * held.scale
        assert quantizer.grid() is held


def test_a_grid_made_without_gradients_trains() -> None:
    quantizer = moving(momentum=0.9).eval()
    with torch.inference_mode():
        quantizer(randoms(4))
    x = randoms(4).requires_grad_()
    (quantizer(x) * x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("name", "value", "settings"),
    [
        ("scale", -1.0, {}),
        ("scale", float("nan"), {}),
        ("scale", float("inf"), {}),
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([float("nan"), 1.0, 1.0], "not finite"),
        ([0.0, float("inf"), 1.0], "not finite"),
        ([0.0, 1.0, float("inf")], "not finite"),
        ([1.0, -1.0, 1.0], "ends below its start"),
        ([-1.0, 1.0, -1.0], "number of batches"),
        ([-1.0, 1.0, 0.5], "number of batches"),
    ],
)
def test_ranges_that_are_none_are_refused(values: list[float], message: str) -> None:
    quantizer = moving(momentum=0.9)
    quantizer.check()
    quantizer.range.copy_(torch.tensor(values))
    with pytest.raises(CorruptCheckpointError, match=message):
        quantizer.check()
