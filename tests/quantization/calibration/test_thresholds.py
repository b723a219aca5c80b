"""Calibrated ranges against numpy on the raw values, brute-force searches, and published figures."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from cctool.quantization.calibration.histogram import BINS, Distribution, Statistics
from cctool.quantization.calibration.thresholds import (
    aciq_bounds,
    aciq_clip,
    entropy_bounds,
    mse_bounds,
    n_std_bounds,
    percentile_bounds,
)


def seen_of(x: Tensor) -> Distribution:
    statistics = Statistics()
    statistics.add(x)
    return statistics.distribution()


def normals(number: int = 20_000, seed: int = 0) -> Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(seed))


def laplaces(number: int = 20_000) -> Tensor:
    uniform = torch.rand(number, generator=torch.Generator().manual_seed(0)) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs() * (1 - 1e-6))


SHAPES = {
    "normal": normals(),
    "shifted": normals() * 0.5 + 0.7,
    "rectified": normals().relu(),
    "laplace": laplaces(),
    "outliers": torch.cat((normals(), torch.tensor([40.0, -3.0]))),
    "negative": -normals().abs() - 0.1,
    "few": torch.tensor([-1.0, 0.5, 2.0]),
}


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "few"])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentiles_are_numpys_to_a_bin(name: str, percentile: float) -> None:
    x = SHAPES[name]
    seen, v = seen_of(x), x.double().numpy()
    low, high = percentile_bounds(seen, percentile, symmetric=True)
    # Within a bin's width, and the gap between neighbours that numpy interpolates in.
    allowed = seen.width + np.diff(np.sort(np.abs(v))[int(len(v) * percentile / 100) - 2 :][:4]).max()
    edge = np.percentile(np.abs(v), percentile)
    assert high == pytest.approx(min(edge, v.max()), abs=allowed)
    assert low == pytest.approx(max(-edge, v.min()), abs=allowed)
    low, high = percentile_bounds(seen, percentile, symmetric=False)
    below = (100 - percentile) / 2 if v.min() < 0 < v.max() else 100 - percentile if v.min() < 0 else 0
    above = (100 - percentile) / 2 if v.min() < 0 < v.max() else 100 - percentile if v.max() > 0 else 0
    near = np.sort(v)
    for found, at in ((low, below), (high, 100 - above)):
        place = int(len(v) * at / 100)
        gap = np.diff(near[max(place - 2, 0) : place + 3]).max()
        assert found == pytest.approx(np.percentile(v, at), abs=seen.width + gap)


def test_more_percent_is_a_wider_range() -> None:
    seen = seen_of(normals())
    highs = [percentile_bounds(seen, p, symmetric=True)[1] for p in (50, 90, 99, 99.9, 100)]
    assert highs == sorted(set(highs))


@pytest.mark.parametrize("n_std", [0.5, 2.0, 50.0])
def test_standard_deviations_are_numpys(n_std: float) -> None:
    x = SHAPES["shifted"]
    v = x.double().numpy()
    low, high = n_std_bounds(seen_of(x), n_std)
    assert low == pytest.approx(max(v.mean() - n_std * v.std(), v.min()))
    assert high == pytest.approx(min(v.mean() + n_std * v.std(), v.max()))


def error_by_numpy(v: np.ndarray, low: float, high: float, limits: tuple[int, int], symmetric: bool) -> float:
    bottom, top = limits
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        scale, zero = max(low / bottom if bottom else 0.0, high / top), 0.0
    else:
        scale = (high - low) / (top - bottom)
        zero = np.clip(bottom - np.round(low / scale), bottom, top) if scale else 0.0
    if not scale:
        return float((v**2).mean())
    n = np.clip(np.round(v / scale) + zero, bottom, top)
    return float((((n - zero) * scale - v) ** 2).mean())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("limits", [(-2, 1), (-8, 7), (-7, 7), (0, 15), (-128, 127)])
def test_no_symmetric_range_errs_noticeably_less(name: str, limits: tuple[int, int]) -> None:
    x, v = SHAPES[name], SHAPES[name].double().numpy()
    found = mse_bounds(seen_of(x), limits, symmetric=True)
    size = np.abs(v).max()
    tried = [
        error_by_numpy(v, max(-t, v.min()), min(t, v.max()), limits, True)
        for t in np.linspace(size / 300, size, 300)
    ]
    mine = error_by_numpy(v, *found, limits, True)
    assert mine <= min(tried) * 1.02 + 1e-12


@pytest.mark.parametrize("name", ["normal", "shifted", "rectified", "outliers"])
@pytest.mark.parametrize("limits", [(0, 3), (-8, 7)])
def test_no_asymmetric_range_errs_noticeably_less(name: str, limits: tuple[int, int]) -> None:
    x, v = SHAPES[name][-4000:], SHAPES[name][-4000:].double().numpy()
    found = mse_bounds(seen_of(x), limits, symmetric=False)
    tried = [
        error_by_numpy(v, a * v.min(), b * v.max(), limits, False)
        for a in np.linspace(0.02, 1, 25)
        for b in np.linspace(0.02, 1, 50)
    ]
    assert error_by_numpy(v, *found, limits, False) <= min(tried) * 1.05


@pytest.mark.parametrize("name", ["shifted", "laplace", "outliers"])
def test_neither_end_alone_can_be_moved_to_err_less(name: str) -> None:
    limits = (0, 7)
    x = SHAPES[name]
    v = x.double().numpy()
    low, high = mse_bounds(seen_of(x), limits, symmetric=False)
    moves = np.linspace(0.7, 1.3, 61)
    highs = [error_by_numpy(v, low, min(high * move, v.max()), limits, False) for move in moves]
    lows = [error_by_numpy(v, max(low * move, v.min()), high, limits, False) for move in moves]
    assert error_by_numpy(v, low, high, limits, False) <= min(*highs, *lows) * 1.005


def test_fewer_bits_clip_more() -> None:
    seen = seen_of(normals())
    highs = [mse_bounds(seen, (-(2**b), 2**b - 1), symmetric=True)[1] for b in (1, 3, 5, 7)]
    assert highs == sorted(set(highs))


def divergence_by_loops(counts: list[float], n: int, levels: int) -> float:
    """KL(P || Q) for a threshold behind n bins, straight from the description."""
    p = [float(count) for count in counts[:n]]
    p[-1] += sum(counts[n:])
    q = [0.0] * n
    for level in range(levels):
        members = [j for j in range(n) if j * levels // n == level]
        filled = [j for j in members if counts[j]]
        for j in filled:
            q[j] = sum(counts[i] for i in members) / len(filled)
    total, mass = sum(p), sum(q)
    divergence = 0.0
    for a, b in zip(p, q, strict=True):
        if a:
            if not b:
                return math.inf
            divergence += a / total * math.log((a / total) / (b / mass))
    return divergence


@pytest.mark.parametrize("levels", [4, 8])
@pytest.mark.parametrize("spread", [0.004, 0.02])
def test_the_least_divergence_is_a_brute_force_searchs(levels: int, spread: float) -> None:
    # All but one value in the lowest bins, so that the loops stay short.
    x = torch.cat((normals(3000) * spread, torch.tensor([0.99 * spread * 5])))
    x = torch.cat((x, torch.zeros(500)))
    low, high = entropy_bounds(seen_of(x), levels)
    v = np.abs(x[x != 0].double().numpy())
    width = 2.0 ** np.ceil(np.log2(v.max())) / 2048
    # 2048 bins in all; the loops take every eighth threshold and the one that was found.
    counts = np.histogram(v, np.arange(2049) * width)[0].tolist()
    last = max(j for j in range(2048) if counts[j]) + 1
    mine = round(high / width) if high < x.max().item() else last
    some = sorted({mine, last, *range(levels, last, 101)})
    divergences = {n: divergence_by_loops(counts, n, levels) for n in some}
    assert divergences[mine] <= min(divergences.values()) + 1e-12
    assert low == pytest.approx(max(-mine * width, x.min().item()))


def test_entropy_depends_on_levels_and_keeps_all_where_there_are_enough() -> None:
    seen = seen_of(SHAPES["outliers"])
    highs = [entropy_bounds(seen, levels)[1] for levels in (8, 128)]
    assert highs[0] < highs[1] < 40
    assert entropy_bounds(seen, BINS)[1] == 40.0


PUBLISHED: list[tuple[Literal["gauss", "laplace"], int, float]] = [
    ("gauss", 2, 1.71),
    ("gauss", 3, 2.15),
    ("gauss", 4, 2.55),
    ("gauss", 8, 3.92),
    ("laplace", 2, 2.83),
    ("laplace", 3, 3.89),
    ("laplace", 4, 5.03),
    ("laplace", 8, 9.89),
]


@pytest.mark.parametrize(("shape", "bits", "published"), PUBLISHED)
def test_clips_are_the_published_ones(
    shape: Literal["gauss", "laplace"], bits: int, published: float
) -> None:
    assert aciq_clip(shape, bits) == pytest.approx(published, abs=0.011)


@pytest.mark.parametrize(("shape", "bits"), [("gauss", 2), ("gauss", 4), ("laplace", 2), ("laplace", 4)])
def test_clips_are_minima_of_the_integrated_error(shape: Literal["gauss", "laplace"], bits: int) -> None:
    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if shape == "gauss" else math.exp(-x) / 2

    def expected_error(a: float) -> float:
        clipping = 2 * quad(lambda x: density(x) * (x - a) ** 2, a, 60)[0]
        return float(clipping + (2 * a / 2**bits) ** 2 / 12)

    best = aciq_clip(shape, bits)
    assert expected_error(best) < min(expected_error(best - 0.01), expected_error(best + 0.01))


def test_analytical_ranges_scale_with_the_spread() -> None:
    x = SHAPES["shifted"]
    v = x.double().numpy()
    low, high = aciq_bounds(seen_of(x), "gauss", 3, signed=True, symmetric=False)
    clip = aciq_clip("gauss", 3)
    assert (low, high) == (
        pytest.approx(v.mean() - clip * v.std()),
        pytest.approx(v.mean() + clip * v.std()),
    )
    low, high = aciq_bounds(seen_of(x), "gauss", 3, signed=True, symmetric=True)
    root = np.sqrt((v**2).mean())
    assert (low, high) == (pytest.approx(max(-clip * root, v.min())), pytest.approx(clip * root))
    x = SHAPES["laplace"]
    v = x.double().numpy()
    high = aciq_bounds(seen_of(x), "laplace", 2, signed=True, symmetric=False)[1]
    spread = np.abs(v - v.mean()).mean()
    assert high == pytest.approx(v.mean() + aciq_clip("laplace", 2) * spread, rel=1e-4)


@pytest.mark.parametrize("shape", ["gauss", "laplace"])
@pytest.mark.parametrize(
    ("signed", "symmetric", "worth"), [(False, True, 5), (True, True, 4), (True, False, 5), (False, False, 5)]
)
def test_rectified_values_are_half_of_a_distribution(
    shape: Literal["gauss", "laplace"], signed: bool, symmetric: bool, worth: int
) -> None:
    x = (SHAPES["normal"] if shape == "gauss" else SHAPES["laplace"]).relu()
    low, high = aciq_bounds(seen_of(x), shape, 4, signed=signed, symmetric=symmetric)
    positive = x[x > 0].double().numpy()
    spread = np.sqrt((positive**2).mean()) if shape == "gauss" else positive.mean()
    assert low == 0
    assert high == pytest.approx(aciq_clip(shape, worth) * spread, rel=1e-3)
