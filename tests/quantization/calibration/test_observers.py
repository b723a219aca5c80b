"""Observers: batches, axes, values that are no numbers, and what each setting changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cctool.base.errors import QuantizationError
from cctool.options.quantize.choices import Observer as Kind
from cctool.quantization.calibration.observers import RangeObserver, make_observer

BATCHLESS = [kind for kind in Kind if kind is not Kind.MOVING_AVERAGE]


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ends(observer: RangeObserver, *batches: Tensor) -> tuple[float, float]:
    for batch in batches:
        observer.observe(batch)
    low, high = observer.bounds()
    assert low.dtype == high.dtype == torch.float32
    return low.item(), high.item()


def test_min_max_is_the_whole_range() -> None:
    x, y = randoms(4, 3), randoms(4, 3, seed=1)
    both = torch.cat((x, y))
    assert ends(make_observer(Kind.MIN_MAX), x, y) == (both.min().item(), both.max().item())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_min_max_along_an_axis(axis: int) -> None:
    x, y = randoms(3, 3, 3), randoms(3, 3, 3, seed=1)
    observer = make_observer(Kind.MIN_MAX, axis=axis)
    observer.observe(x)
    observer.observe(y)
    low, high = observer.bounds()
    both = np.concatenate((np.moveaxis(x.numpy(), axis, 0), np.moveaxis(y.numpy(), axis, 0)), 1)
    assert np.array_equal(low.numpy(), both.min((1, 2)))
    assert np.array_equal(high.numpy(), both.max((1, 2)))


def test_a_slice_without_numbers_has_no_range() -> None:
    observer = make_observer(Kind.MIN_MAX, axis=0)
    observer.observe(torch.tensor([[float("nan"), float("inf")], [1.0, float("nan")]]))
    low, high = observer.bounds()
    assert (low.tolist(), high.tolist()) == ([0.0, 1.0], [0.0, 1.0])
    assert observer.nonfinite == 3
    hollow = make_observer(Kind.MIN_MAX, axis=0)
    hollow.observe(torch.zeros(2, 0))
    assert hollow.bounds()[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_moving_average_is_bias_corrected(momentum: float) -> None:
    batches = [randoms(10, seed=seed) * (seed + 1) for seed in range(4)]
    sums = np.zeros(2)
    for batch in batches:
        sums = momentum * sums + (1 - momentum) * np.array([batch.min(), batch.max()])
    expected = sums / (1 - momentum ** len(batches))
    found = ends(make_observer(Kind.MOVING_AVERAGE, momentum=momentum), *batches)
    assert found == (pytest.approx(expected[0], rel=1e-6), pytest.approx(expected[1], rel=1e-6))


@pytest.mark.parametrize("kind", BATCHLESS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_batches_do_not_matter(kind: Kind, symmetric: bool) -> None:
    x = randoms(60, 7)
    x[50:] *= 9
    whole = ends(make_observer(kind, bits=4, symmetric=symmetric), x)
    parts = ends(make_observer(kind, bits=4, symmetric=symmetric), *x.split(7))
    assert whole == pytest.approx(parts, rel=1e-6)
    assert whole[0] < -1
    assert whole[1] > 1


@pytest.mark.parametrize("kind", Kind)
def test_the_same_values_give_the_same_range(kind: Kind) -> None:
    x = randoms(500)
    assert ends(make_observer(kind), x) == ends(make_observer(kind), x.clone())


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("symmetric", [True, False])
def test_infinities_and_nan_are_counted_and_left_out(kind: Kind, symmetric: bool) -> None:
    x = randoms(300)
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")])
    observer, clean = make_observer(kind, symmetric=symmetric), make_observer(kind, symmetric=symmetric)
    assert ends(observer, torch.cat((bad, x)), bad) == ends(clean, x)
    assert observer.nonfinite == 6
    assert clean.nonfinite == 0


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "batches",
    [[], [torch.zeros(0)], [torch.zeros(3, 4)], [-torch.zeros(2)], [torch.tensor([float("nan")])]],
    ids=["never", "empty", "zeros", "minus-zeros", "nan"],
)
def test_nothing_and_zeros_have_the_range_zero(kind: Kind, symmetric: bool, batches: list[Tensor]) -> None:
    assert ends(make_observer(kind, symmetric=symmetric), *batches) == (0.0, 0.0)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [3.0, -3.0, 1e-40, 1e37])
def test_a_constant_is_in_its_range(kind: Kind, symmetric: bool, value: float) -> None:
    x = torch.full((5, 2), value)
    low, high = ends(make_observer(kind, symmetric=symmetric), x)
    assert low <= x[0, 0] <= high
    assert max(abs(low), abs(high)) == pytest.approx(abs(value), rel=1e-6)


@pytest.mark.parametrize("kind", Kind)
def test_no_range_reaches_beyond_the_values(kind: Kind) -> None:
    for x in (randoms(50), randoms(50).relu(), -randoms(50).abs(), randoms(50) + 4):
        for symmetric in (True, False):
            low, high = ends(make_observer(kind, symmetric=symmetric), x)
            assert low >= min(x.min().item(), 0.0)
            assert high <= max(x.max().item(), 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_taken(dtype: torch.dtype) -> None:
    x = randoms(200).to(dtype)
    for kind in Kind:
        assert ends(make_observer(kind), x) == pytest.approx(ends(make_observer(kind), x.float()), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        (Kind.PERCENTILE, {"percentile": 99.0}, {"percentile": 90.0}),
        (Kind.PERCENTILE, {"percentile": 90.0}, {"percentile": 90.0, "symmetric": False}),
        (Kind.N_STD, {"n_std": 1.0}, {"n_std": 2.0}),
        (Kind.MOVING_AVERAGE, {"momentum": 0.1}, {"momentum": 0.9}),
        (Kind.MSE, {"bits": 3}, {"bits": 5}),
        (Kind.MSE, {"bits": 3}, {"bits": 3, "symmetric": False}),
        (Kind.MSE, {"bits": 3}, {"bits": 3, "signed": False}),
        (Kind.MSE, {"bits": 2}, {"bits": 2, "narrow": True}),
        (Kind.MSE, {"bits": 8}, {"bits": 8, "reduce_range": True}),
        (Kind.ENTROPY, {"bits": 3}, {"bits": 6}),
        (Kind.ENTROPY, {"bits": 5}, {"bits": 5, "signed": False}),
        (Kind.ACIQ_GAUSS, {"bits": 3}, {"bits": 4}),
        (Kind.ACIQ_GAUSS, {"bits": 3}, {"bits": 3, "signed": False}),
        (Kind.ACIQ_GAUSS, {"bits": 3}, {"bits": 3, "symmetric": False}),
        (Kind.ACIQ_GAUSS, {"bits": 8}, {"bits": 8, "reduce_range": True}),
        (Kind.ACIQ_LAPLACE, {"bits": 3}, {"bits": 4}),
    ],
)
def test_every_setting_changes_the_range(kind: Kind, one: dict[str, Any], other: dict[str, Any]) -> None:
    batches = [torch.cat((randoms(4000) * 1.3 + 0.4, torch.tensor([9.0]))), randoms(4000, seed=1)]
    assert ends(make_observer(kind, **one), *batches) != ends(make_observer(kind, **other), *batches)


def test_kinds_differ() -> None:
    batches = [randoms(5000) + 0.1, randoms(5000, seed=1) * 1.2]
    found = {ends(make_observer(kind, bits=4), *batches) for kind in Kind}
    assert len(found) == len(Kind)


def test_observed_tensors_are_not_written_to_and_need_no_gradient() -> None:
    x = randoms(30).requires_grad_()
    before = x.detach().clone()
    for kind in Kind:
        low, high = ends(make_observer(kind), x * 1)
        assert low < high
        make_observer(kind).observe(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        (Kind.MSE, {"axis": 0}, "one range"),
        (Kind.MOVING_AVERAGE, {"axis": 0}, "one range"),
        (Kind.PERCENTILE, {"percentile": 0.0}, "percentile"),
        (Kind.PERCENTILE, {"percentile": 100.5}, "percentile"),
        (Kind.PERCENTILE, {"percentile": float("nan")}, "percentile"),
        (Kind.N_STD, {"n_std": 0.0}, "standard deviations"),
        (Kind.N_STD, {"n_std": float("inf")}, "standard deviations"),
        (Kind.MOVING_AVERAGE, {"momentum": 1.0}, "momentum"),
    ],
)
def test_impossible_settings_are_refused(kind: Kind, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(QuantizationError, match=reason):
        make_observer(kind, **settings)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", Kind)
def test_ranges_on_cuda_are_the_cpus(kind: Kind) -> None:
    x, bad = randoms(40, 50), torch.tensor([float("nan"), float("inf")])
    here, there = make_observer(kind, bits=4), make_observer(kind, bits=4)
    expected = ends(here, x[:20], bad, x[20:])
    assert ends(there, x[:20].cuda(), bad.cuda(), x[20:].cuda()) == pytest.approx(expected, rel=1e-6)
    assert there.bounds()[0].is_cuda
    assert there.nonfinite == 2
