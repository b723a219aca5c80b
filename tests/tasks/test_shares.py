"""Intervals and tests of shares, against scipy and the formulas written out."""

import numpy as np
import pytest
from scipy.stats import binomtest

from cctool.tasks.base import Measure
from cctool.tasks.shares import difference_interval, interval_of, mcnemar, shown, wilson


@pytest.mark.parametrize(("right", "n"), [(0, 36), (36, 36), (1, 3), (8947, 10_000), (137, 360), (1, 1)])
def test_wilson_is_scipys(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_nothing_is_known_of_no_samples() -> None:
    assert wilson(0, 0) == (0, 100)


def test_the_ends_are_exact() -> None:
    assert wilson(0, 7)[0] == 0
    assert wilson(7, 7)[1] == 100


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (3, 12), (12, 3), (50, 50), (400, 470)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    n = first + second
    expected = binomtest(first, n, 0.5).pvalue if n else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_newcombes_example() -> None:
    """Table II of the paper, case (a), 56/70 and 48/80: method 10 gives 0.0524 to 0.3339."""
    low, high = difference_interval(100 * 48 / 80, 80, 100 * 56 / 70, 70)
    assert (low, high) == pytest.approx((5.24, 33.39), abs=0.01)


def test_an_interval_covers_what_it_claims() -> None:
    drawn = np.random.default_rng(0).binomial(200, 0.9, 4000)
    covered = np.mean([low <= 90 <= high for low, high in (wilson(int(right), 200) for right in drawn)])
    assert 0.935 < covered < 0.965


def test_values_as_people_read_them() -> None:
    share = Measure("top1", "top-1", "%", share=True)
    assert shown(share, 89.47, 10_000) == "89.47 % (88.85..90.06, n = 10,000)"
    assert shown(Measure("miou", "mean IoU", "%"), 61.239, 5) == "61.24 %"
    assert shown(Measure("psnr", "PSNR", "dB"), 31.41592, 5) == "31.42 dB"
    assert shown(Measure("loss", "loss"), 0.123456, 5) == "0.1235"
    assert interval_of(50, 4) == wilson(2, 4)
