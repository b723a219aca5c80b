"""k-means of numbers against scipy's, and against searches over all partitions."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from cctool.base.errors import QuantizationError
from cctool.quantization.encodings.codebook_fit import INITIALISATIONS, initial_centres, kmeans, nearest


def squared_error(values: np.ndarray, centres: np.ndarray) -> float:
    return float((np.abs(values[:, None] - centres[None]).min(1) ** 2).sum())


def heavy_tailed(count: int = 2000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, count)


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
@pytest.mark.parametrize("entries", [2, 5, 8])
def test_centres_are_scipys_from_the_same_beginning(initialisation: str, entries: int) -> None:
    values = np.random.default_rng(1).normal(size=500)
    points, counts = np.unique(values, return_counts=True)
    start = initial_centres(points, counts, entries, initialisation, 3)
    wanted, _ = kmeans2(
        values.reshape(-1, 1), start.reshape(-1, 1), iter=300, minit="matrix", missing="raise"
    )
    np.testing.assert_allclose(kmeans(values, entries, initialisation, 3), np.sort(wanted[:, 0]), rtol=1e-12)


def test_beginnings_are_what_their_names_say() -> None:
    points, counts = np.array([0.0, 1.0, 2.0, 10.0]), np.array([1, 5, 1, 1])
    assert initial_centres(points, counts, 3, "linear", 0).tolist() == [0, 5, 10]
    # The eighths 1/8 .. 8/8 of the distribution end at 0, 1 (five times), 2 and 10.
    assert initial_centres(points, counts, 4, "density", 0).tolist() == [0, 1, 1, 2]
    drawn = initial_centres(points, counts, 3, "random", 0)
    assert set(drawn) <= set(points)
    assert initial_centres(points, counts, 8, "random", 0).tolist() == [0, 1, 1, 1, 1, 1, 2, 10]
    with pytest.raises(QuantizationError, match="linear, density, random, not 'best'"):
        initial_centres(points, counts, 3, "best", 0)


def test_the_seed_and_the_beginning_matter() -> None:
    values = heavy_tailed()
    found = [kmeans(values, 8, name, seed) for name, seed in (("linear", 0), ("density", 0), ("random", 0))]
    assert not any(np.array_equal(one, other) for one, other in combinations(found, 2))
    assert not np.array_equal(kmeans(values, 8, "random", 1), found[2])
    assert np.array_equal(kmeans(values, 8, "random", 0), found[2])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-50, 50).map(float), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from(INITIALISATIONS),
)
def test_centres_are_means_and_the_partition_cannot_be_improved_by_moving_a_value(
    numbers: list[float], entries: int, initialisation: str
) -> None:
    values = np.array(numbers)
    centres = kmeans(values, entries, initialisation)
    distinct = np.unique(values)
    if len(distinct) <= entries:
        assert centres.tolist() == distinct.tolist()
        return
    assert len(centres) == entries
    index = nearest(values, centres)
    assert set(index) == set(range(entries))
    for entry, centre in enumerate(centres):
        assert centre == pytest.approx(values[index == entry].mean())
        assert (np.abs(values[index == entry, None] - centres).argmin(1) == entry).all() or (
            # A value half-way between two centres may go to either.
            np.isin(
                np.abs(values[index == entry, None] - centres).min(1), np.abs(values[index == entry] - centre)
            )
        ).all()


def test_empty_clusters_begin_anew() -> None:
    # Evenly spaced centres leave all but the first and the last empty.
    values = np.concatenate([np.linspace(0, 1, 100), [1000.0]])
    centres = kmeans(values, 8, "linear")
    assert len(centres) == 8
    best = kmeans(values, 8, "density")
    assert squared_error(values, centres) < 2 * squared_error(values, best)


def test_two_clusters_of_few_values_are_the_best_there_are() -> None:
    values = np.array([0.0, 1.0, 2.0, 9.0, 10.0, 14.0])
    splits = [np.array([values[:i].mean(), values[i:].mean()]) for i in range(1, 6)]
    best = min(squared_error(values, centres) for centres in splits)
    assert squared_error(values, kmeans(values, 2)) == pytest.approx(best)


def test_small_values_beside_large_ones_keep_their_means() -> None:
    values = np.array([1.0, 2.0, 3.0, 1e17, 1.0000001e17])
    assert kmeans(values, 2).tolist() == [2.0, 1.00000005e17]


def test_more_than_float64_holds_is_refused() -> None:
    with pytest.raises(QuantizationError, match="larger than float64"):
        kmeans(np.array([1.5e308, 1.6e308, 1.7e308]), 2)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9, unique=True), st.floats(-2e3, 2e3))
@settings(max_examples=60, deadline=None)
def test_nearest_is_nearest(centres: list[float], value: float) -> None:
    ordered = np.sort(np.array(centres))
    found: Any = nearest(np.array([value]), ordered)[0]
    assert abs(ordered[found] - value) <= np.abs(ordered - value).min() + 1e-12
