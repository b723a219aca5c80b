"""The search for a quality, on a curve that is known in closed form."""

import pytest

from cctool.errors import TransformError
from cctool.operations.tap_search import Trial, search_quality


def curve(quality: float) -> Trial:
    ratio = 20 / (1 + quality / 10)
    return Trial(quality, ratio, 8 / ratio)


@pytest.mark.parametrize("ratio", [2.0, 4.0, 8.0, 15.0])
def test_the_ratio_is_reached_and_hardly_exceeded(ratio: float) -> None:
    found, tried = search_quality(ratio, curve)
    assert ratio <= found.ratio <= ratio * 1.006
    assert found.quality == pytest.approx(10 * (20 / ratio - 1), rel=0.02)
    assert found in tried
    assert len(tried) < 15


def test_what_the_finest_reaches_is_not_made_coarser() -> None:
    found, tried = search_quality(1.5, curve)
    assert (found.quality, len(tried)) == (100, 1)


def test_what_cannot_be_reached_is_refused() -> None:
    with pytest.raises(TransformError, match=r"quality 1 compresses 18\.2 times only"):
        search_quality(19, curve)


def test_a_staircase_ends_too() -> None:
    found, tried = search_quality(5, lambda quality: Trial(quality, 10 if quality < 33.3 else 2, 1))
    assert found.quality == pytest.approx(33.3, abs=0.06)
    assert len(tried) < 16
