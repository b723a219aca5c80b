from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import pywt
import scipy.fft
import torch
from numpy.typing import NDArray

from cctool.transforms.kernels.blocks import block_forward, block_inverse, block_positions, norm_scale

Array = NDArray[np.float64]
SIZES = [(8, 8), (16, 24), (7, 7), (14, 20), (1, 1), (1, 9), (72, 65), (100, 5), (3, 200), (128, 130)]


def tiles(height: int, width: int, block: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, height, block):
        for left in range(0, width, block):
            yield slice(top, min(top + block, height)), slice(left, min(left + block, width))


def oracle(x: Array, block: int, **norm: str) -> Array:
    y = np.empty_like(x)
    for rows, columns in tiles(*x.shape[2:], block):
        y[:, :, rows, columns] = scipy.fft.dctn(x[:, :, rows, columns], type=2, axes=(2, 3), **norm)
    return y


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("block", [8, 5, 100])
def test_equals_scipy_and_inverts(height: int, width: int, block: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, height, width))
    y = block_forward(torch.from_numpy(x), "dct", block)
    np.testing.assert_allclose(y, oracle(x, block, norm="ortho"), rtol=0, atol=1e-12)
    np.testing.assert_allclose(block_inverse(y, "dct", block), x, rtol=0, atol=1e-12)


def test_float32() -> None:
    x = torch.rand(2, 3, 20, 70) * 255
    y = block_forward(x, "dct")
    expected = oracle(x.double().numpy(), 8, norm="ortho")
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    torch.testing.assert_close(block_inverse(y, "dct"), x, rtol=0, atol=3e-4)


@pytest.mark.parametrize("kernel", ["dst", "dft", "identity", "dwt", "bior2.2"])
def test_every_kernel_inverts_with_strips(kernel: str) -> None:
    x = torch.randn(2, 3, 14, 75, dtype=torch.float64)
    y = block_forward(x, kernel, levels=3)
    assert y.shape == x.shape
    torch.testing.assert_close(block_inverse(y, kernel, levels=3), x)
    assert (kernel == "identity") == torch.equal(x, y)


def test_levels_of_a_wavelet_count() -> None:
    x = np.random.default_rng(0).standard_normal((1, 1, 4, 16))
    for levels in (1, 2):
        rows = np.concatenate(pywt.wavedec(x.reshape(1, 1, 4, 4, 4), "haar", level=levels), -1)
        columns = np.concatenate(pywt.wavedec(rows, "haar", level=levels, axis=2), 2)
        found = block_forward(torch.from_numpy(x), "dwt", 4, levels=levels)
        np.testing.assert_allclose(found, columns.reshape(x.shape), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(14, 20), (7, 7), (1, 1), (16, 8)])
def test_positions_say_where_each_coefficient_lies(height: int, width: int) -> None:
    positions = block_positions(height, width, 8)
    for rows, columns in tiles(height, width, 8):
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        assert (positions.row[rows, columns] == torch.arange(tall)[:, None]).all()
        assert (positions.column[rows, columns] == torch.arange(wide)).all()
        assert (positions.height[rows, columns] == tall).all()
        assert (positions.width[rows, columns] == wide).all()


def test_norm_scale_of_eight_by_eight() -> None:
    scale = norm_scale(8, 8, "dct")
    assert scale[0, 0].item() == pytest.approx(32)
    assert scale[0, 5].item() == scale[3, 0].item() == pytest.approx(22.627417)
    assert scale[1:, 1:].flatten().tolist() == pytest.approx([16] * 49)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_norm_scale_is_what_scipy_leaves_out(size: int) -> None:
    x = np.random.default_rng(0).standard_normal((size, 6))
    for kernel, function in (("dct", scipy.fft.dctn), ("dst", scipy.fft.dstn)):
        expected = function(x, type=2) / function(x, type=2, norm="ortho")
        np.testing.assert_allclose(norm_scale(size, 6, kernel), expected)
    # The DFT, along the height alone: without normalisation, by the packed orthonormal one.
    bare = np.fft.rfft(x[:, :1], axis=0)
    ours = block_forward(torch.from_numpy(x[None, None, :, :1].copy()), "dft")[0, 0].numpy()
    scaled = ours * norm_scale(size, 1, "dft").numpy()
    np.testing.assert_allclose(scaled[0], bare[0].real, atol=1e-12)
    np.testing.assert_allclose(scaled[1::2], bare[1:].real, atol=1e-12)
    np.testing.assert_allclose(scaled[2::2], bare[1 : (size + 1) // 2].imag, atol=1e-12)


def test_kernels_without_another_normalisation_have_a_scale_of_one() -> None:
    assert (norm_scale(7, 8, "dwt") == 1).all()
    assert (norm_scale(7, 8, "identity") == 1).all()


def test_the_maps_stay_as_they_are() -> None:
    x = torch.randn(1, 2, 9, 9)
    before = x.clone()
    for kernel in ("identity", "dct"):
        block_inverse(block_forward(x, kernel).mul_(2), kernel).zero_()
    assert torch.equal(x, before)
