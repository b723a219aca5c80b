"""Additive powers of two against the paper's lists, and their scales against a fine grid."""

import numpy as np
import pytest

from cctool.base.errors import QuantizationError
from cctool.quantization.encodings.apot_levels import apot_levels, best_scale, default_terms

# Powers of each term, in units of the largest, for bits without the sign: what the authors' program lists.
LISTED = {
    2: [[1, 1 / 2, 1 / 4]],
    3: [[1, 1 / 2, 1 / 8], [1 / 4]],
    4: [[1, 1 / 4, 1 / 16], [1 / 2, 1 / 8, 1 / 32]],
    5: [[1, 1 / 4, 1 / 32], [1 / 2, 1 / 8, 1 / 64], [1 / 16]],
    6: [[1, 1 / 8, 1 / 64], [1 / 2, 1 / 16, 1 / 128], [1 / 4, 1 / 32, 1 / 256]],
}


@pytest.mark.parametrize("bits", LISTED)
def test_levels_are_those_of_the_paper(bits: int) -> None:
    sums = {0.0}
    for powers in LISTED[bits]:
        sums = {total + power for total in sums for power in (0.0, *powers)}
    assert default_terms(bits + 1) == len(LISTED[bits])
    assert apot_levels(bits + 1, len(LISTED[bits])).tolist() == sorted({-x for x in sums} | sums)


@pytest.mark.parametrize("bits", range(2, 9))
def test_there_are_as_many_levels_as_bits_tell_apart_but_for_the_second_zero(bits: int) -> None:
    for terms in range(1, bits):
        levels = apot_levels(bits, terms)
        assert len(levels) == 2**bits - 1
        assert np.array_equal(levels, -levels[::-1])
        assert levels[len(levels) // 2] == 0


def test_one_term_is_powers_and_one_for_each_bit_is_even() -> None:
    assert np.array_equal(apot_levels(4, 1)[8:], 2.0 ** np.arange(-6, 1))
    assert np.allclose(np.diff(apot_levels(5, 4)), 1 / 8)


@pytest.mark.parametrize(("bits", "terms"), [(1, 1), (9, 2), (4, 0), (4, 4)])
def test_other_numbers_are_refused(bits: int, terms: int) -> None:
    with pytest.raises(QuantizationError, match="additive powers of two"):
        apot_levels(bits, terms)


def error(values: np.ndarray, levels: np.ndarray, scale: float) -> float:
    return float((np.abs(values[:, None] - scale * levels).min(1) ** 2).sum())


@pytest.mark.parametrize(("bits", "terms"), [(2, 1), (3, 1), (4, 2), (4, 3), (5, 2), (8, 4)])
@pytest.mark.parametrize("tail", [3, 100])
def test_no_scale_of_a_fine_grid_is_much_better(bits: int, terms: int, tail: float) -> None:
    values, levels = np.random.default_rng(0).standard_t(tail, 400), apot_levels(bits, terms)
    found = error(values, levels, best_scale(values, levels))
    grid = np.geomspace(0.05, 2, 500) * np.abs(values).max() / levels[-1]
    assert found <= 1.02 * min(error(values, levels, scale) for scale in grid)
    assert found < error(values, levels, np.abs(values).max() / levels[-1])


@pytest.mark.parametrize("scale", [1e-30, 0.37, 1e30])
def test_values_on_a_grid_give_its_scale(scale: float) -> None:
    levels = apot_levels(4, 2)
    values = scale * np.random.default_rng(0).choice(levels, 200)
    assert best_scale(values, levels) == pytest.approx(scale, rel=1e-12)


def test_zeros_have_some_scale() -> None:
    assert best_scale(np.zeros(3), apot_levels(4, 2)) == 1
    assert best_scale(np.zeros(0), apot_levels(4, 2)) == 1
