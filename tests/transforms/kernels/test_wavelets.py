from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import pywt
import torch
from numpy.typing import NDArray

from cctool.transforms.kernels.wavelets import pyramid_levels, wavedec2, waverec2

SIZES = [(8, 8), (7, 7), (14, 20), (13, 6), (1, 5), (5, 1), (2, 2), (33, 40), (3, 64)]


def oracle(x: NDArray[np.float64], name: str, levels: int) -> Sequence[NDArray[np.float64]]:
    """Approximation, then details (N, C, 3, h, w) finest first, in the order cH, cV, cD of PyWavelets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "level is too high", which periodic borders are not
        low, *details = pywt.wavedec2(x, name, "periodization", level=levels)
    return [low, *(np.stack(bands, 2) for bands in reversed(details))]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", ["haar", "db2", "bior2.2", "rbio3.9"])
def test_equals_pywavelets_and_inverts(name: str, height: int, width: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, height, width))
    for asked in (1, 3):
        levels = pyramid_levels(name, height, width, asked)
        pyramid = wavedec2(torch.from_numpy(x), name, asked)
        low, *details = oracle(x, name, levels)
        assert len(pyramid.details) == levels
        np.testing.assert_allclose(pyramid.approximation, low, rtol=0, atol=1e-11)
        for found, expected in zip(pyramid.details, details, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)
        np.testing.assert_allclose(waverec2(pyramid, name, (height, width)), x, rtol=0, atol=1e-11)


def test_bands_are_named_by_their_filters_along_width_then_height() -> None:
    rows = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    rows[..., ::2, :] = 1  # changes from row to row alone: low along the width, high along the height
    for x, band in ((rows, 0), (rows.mT, 1), (rows * rows.mT, 2)):
        energy = wavedec2(x, "dwt", 1).details[0].square().sum((0, 1, 3, 4))
        assert energy[band] > 0
        if band < 2:
            assert energy.sum() == energy[band]


def test_levels_end_at_one_sample() -> None:
    assert pyramid_levels("haar", 7, 4, 5) == 3
    assert pyramid_levels("haar", 1, 1, 3) == 0
    pyramid = wavedec2(torch.full((1, 1, 1, 1), 2.0), "haar", 3)
    assert not pyramid.details
    assert waverec2(pyramid, "haar", (1, 1)).item() == 2
    x = torch.randn(1, 2, 7, 4)
    assert len(wavedec2(x, "haar", 5).details) == 3


def test_float32() -> None:
    x = torch.randn(2, 3, 15, 22)
    pyramid = wavedec2(x, "db2", 3)
    assert pyramid.approximation.dtype == torch.float32
    torch.testing.assert_close(waverec2(pyramid, "db2", (15, 22)), x, rtol=0, atol=4e-6)


def test_the_maps_stay_as_they_are() -> None:
    x = torch.randn(1, 2, 5, 5)
    before = x.clone()
    pyramid = wavedec2(x, "haar", 2)
    waverec2(pyramid, "haar", (5, 5)).zero_()
    assert torch.equal(x, before)
    torch.testing.assert_close(waverec2(pyramid, "haar", (5, 5)), x)
