"""The histogram of calibration against numpy, and its independence of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cctool.quantization.calibration.histogram import BINS, Distribution, Statistics


def distribution(*batches: torch.Tensor) -> Distribution:
    statistics = Statistics()
    for batch in batches:
        statistics.add(batch)
    return statistics.distribution()


def test_counts_are_numpys() -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 3
    x[:100] = 0
    seen = distribution(x)
    top = 2.0 ** np.ceil(np.log2(x.abs().max().item()))
    assert seen.width == top / BINS
    edges = np.concatenate((-np.arange(BINS, 0, -1), np.arange(BINS + 1))) * seen.width
    counts, _ = np.histogram(x[x != 0].double().numpy(), edges)
    zeros = seen.lower == seen.upper
    assert seen.counts[zeros].tolist() == [100]
    assert np.array_equal(seen.counts[~zeros].numpy(), counts[counts > 0])
    assert np.allclose(seen.lower[~zeros].numpy(), edges[:-1][counts > 0])
    assert np.allclose(seen.upper[~zeros].numpy(), edges[1:][counts > 0])


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_batches_do_not_matter(values: list[float], cut: int) -> None:
    x = torch.tensor(values)
    whole, parts = distribution(x), distribution(x[:cut], x[cut:])
    assert torch.equal(whole.lower, parts.lower)
    assert torch.equal(whole.upper, parts.upper)
    assert torch.equal(whole.counts, parts.counts)
    assert (whole.low, whole.high, whole.width) == (parts.low, parts.high, parts.width)
    assert parts.mean == pytest.approx(np.mean(x.double().numpy()), rel=1e-9, abs=1e-9)
    assert parts.std == pytest.approx(np.std(x.double().numpy()), rel=1e-6, abs=1e-6)
    assert parts.square == pytest.approx(np.mean(x.double().numpy() ** 2), rel=1e-9, abs=1e-9)


def test_widening_by_far_keeps_every_count() -> None:
    seen = distribution(torch.full((5,), 1e-30), torch.tensor([-1e30]), torch.zeros(2))
    assert seen.counts.tolist() == [1, 2, 5]
    assert (seen.low, seen.high) == (pytest.approx(-1e30), pytest.approx(1e-30))


def test_powers_of_two_fall_into_the_same_bin_before_and_after_widening() -> None:
    late = distribution(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([64.0]))
    assert torch.equal(late.lower, distribution(torch.tensor([64.0, 2.0, 1.0])).lower)


def test_the_largest_numbers_have_bins() -> None:
    for dtype in (torch.float32, torch.float64):
        top = torch.finfo(dtype).max
        seen = distribution(torch.tensor([-top, top], dtype=dtype))
        assert seen.counts.tolist() == [1, 1]
        assert seen.high == top


def test_memory_does_not_grow_with_the_data() -> None:
    statistics = Statistics()
    for seed in range(3):
        statistics.add(torch.randn(20_000, generator=torch.Generator().manual_seed(seed)))
    kept = [value for value in vars(statistics).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in kept) == 2 * BINS
    assert statistics.number == 60_000


def test_centers_stay_between_the_extremes() -> None:
    seen = distribution(torch.tensor([1.0, 1.00001, 3.0]))
    assert seen.centers.min() >= 1.0
    assert seen.centers.max() <= 3.0
