from __future__ import annotations

import warnings

import numpy as np
import pytest
import pywt
import scipy.fft
import torch
from numpy.typing import NDArray
from torch import Tensor

from cctool.base.errors import TransformError, UsageError
from cctool.transforms.kernels import fourier
from cctool.transforms.kernels.by_name import (
    KERNELS,
    check_kernel,
    coefficient_count,
    forward,
    inverse,
    is_wavelet,
    kernel_matrix,
    max_levels,
)

Array = NDArray[np.float64]
SIZES = range(1, 65)
PRECISIONS = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
# PyWavelets has these filters to 11 digits.
COARSE = ("sym", "bior4.4", "bior5.5", "bior6.8", "rbio4.4", "rbio5.5", "rbio6.8")


def samples(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def packed(x: Array) -> Array:
    """Re 0, Re 1, Im 1, ... of numpy's FFT, each worth the energy that it stands for."""
    size = x.shape[-1]
    spectrum = np.fft.rfft(x, norm="ortho")
    columns = [spectrum.real[..., 0]]
    for frequency in range(1, size // 2 + 1):
        alone = 2 * frequency == size
        columns.append(spectrum.real[..., frequency] * (1 if alone else np.sqrt(2)))
        if not alone:
            columns.append(spectrum.imag[..., frequency] * np.sqrt(2))
    return np.stack(columns, -1)


ORACLES = {
    "dct": lambda x: scipy.fft.dct(x, type=2, norm="ortho"),
    "dst": lambda x: scipy.fft.dst(x, type=2, norm="ortho"),
    "dft": packed,
}
FAST = {
    "dct": (fourier.dct, fourier.idct),
    "dst": (fourier.dst, fourier.idst),
    "dft": (fourier.packed_dft, fourier.packed_idft),
}


def wavedec(x: Array, name: str, levels: int) -> Array:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "level is too high", which periodic borders are not
        bands = pywt.wavedec(x, "haar" if name == "dwt" else name, "periodization", level=levels)
    return np.concatenate(bands, -1)


def assert_close(found: Tensor, expected: Array | Tensor, tolerance: float) -> None:
    """Compare relative to the largest value."""
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    scale = np.abs(expected).max(initial=1e-30)
    assert np.abs(found.double().numpy() - expected).max(initial=0) <= tolerance * scale


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("kernel", ORACLES)
def test_equals_scipy_and_numpy(kernel: str, dtype: torch.dtype, tolerance: float) -> None:
    for size in SIZES:
        x = torch.from_numpy(samples(3, size, seed=size)).to(dtype)
        expected = ORACLES[kernel](x.double().numpy())
        y = forward(x, kernel)
        assert_close(y, expected, tolerance)
        assert_close(inverse(torch.from_numpy(expected).to(dtype), kernel, size=size), x.double(), tolerance)
        fast, fast_inverse = FAST[kernel]
        assert_close(fast(x), expected, tolerance)
        assert_close(fast_inverse(y), x.double(), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("kernel", ORACLES)
@pytest.mark.parametrize("size", [257, 600])
def test_long_axes_equal_scipy_and_numpy(
    kernel: str, size: int, dtype: torch.dtype, tolerance: float
) -> None:
    x = torch.from_numpy(samples(4, size)).to(dtype)
    expected = ORACLES[kernel](x.double().numpy())
    assert_close(forward(x, kernel), expected, tolerance)
    assert_close(forward(x.T, kernel, 0), expected.T, tolerance)
    assert_close(inverse(torch.from_numpy(expected).to(dtype), kernel, size=size), x.double(), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("kernel", ["dwt", "db2", "bior2.2"])
def test_wavelets_equal_pywavelets_at_every_size(kernel: str, dtype: torch.dtype, tolerance: float) -> None:
    for size in SIZES:
        x = torch.from_numpy(samples(2, size, seed=size)).to(dtype)
        for levels in (1, 3):
            expected = wavedec(x.double().numpy(), kernel, min(levels, max_levels(kernel, size)))
            y = forward(x, kernel, levels=levels, square=False)
            assert_close(y, expected, tolerance)
            assert y.shape[-1] == coefficient_count(kernel, size, levels=levels, square=False)
            assert_close(inverse(y, kernel, size=size, levels=levels, square=False), x.double(), tolerance)


@pytest.mark.parametrize("size", [5, 18, 64])
def test_every_wavelet_equals_pywavelets_and_inverts(size: int) -> None:
    x = samples(2, size)
    for kernel in filter(is_wavelet, KERNELS):
        y = forward(torch.from_numpy(x), kernel, levels=2, square=False)
        assert_close(y, wavedec(x, kernel, 2), 1e-12)
        exact = 1e-10 if kernel.startswith(COARSE) else 1e-12
        assert_close(inverse(y, kernel, size=size, levels=2, square=False), x, exact)


@pytest.mark.parametrize("kernel", ["db4", "bior3.5", "rbio2.4"])
def test_synthesis_of_arbitrary_coefficients_equals_pywavelets(kernel: str) -> None:
    bands = [samples(3, 6, seed=1), samples(3, 6, seed=2), samples(3, 12, seed=3)]
    expected = pywt.waverec(bands, kernel, "periodization")
    found = inverse(torch.from_numpy(np.concatenate(bands, -1)), kernel, size=24, levels=2, square=False)
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("kernel", ["dct", "dst", "dft", "identity", "dwt", "db3", "sym4", "coif1"])
def test_matrices_are_orthonormal_and_square_at_every_size(kernel: str) -> None:
    for size in SIZES:
        matrix, back = (torch.from_numpy(kernel_matrix(kernel, size, 3, True, way)) for way in (False, True))
        assert matrix.shape == (size, size)
        assert_close(matrix @ matrix.T, np.eye(size), 1e-11)
        assert_close(back, matrix.T, 1e-11)


def test_square_wavelets_have_as_many_coefficients_as_samples_and_invert() -> None:
    for kernel in ("bior2.2", "bior4.4", "rbio3.9", "db2"):
        for size in (*range(1, 20), 33, 47, 64):
            x = samples(2, size, seed=size)
            y = forward(torch.from_numpy(x), kernel, levels=9)
            assert y.shape == x.shape
            assert_close(inverse(y, kernel, size=size, levels=9), x, 1e-11)


def test_square_wavelets_hand_the_odd_sample_to_the_approximation() -> None:
    x = samples(7)
    first = wavedec(x[:6], "db2", 1)
    once = np.concatenate([first[:3], x[6:], first[3:]])
    assert_close(forward(torch.from_numpy(x), "db2"), once, 1e-12)
    second = wavedec(once[:4], "db2", 1)
    twice = np.concatenate([second, once[4:]])
    assert_close(forward(torch.from_numpy(x), "db2", levels=2), twice, 1e-12)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize(("kernel", "size"), [("dwt", 601), ("dwt", 1027), ("db2", 514), ("bior2.2", 1150)])
def test_long_wavelets_go_through_filters(kernel: str, size: int, square: bool) -> None:
    x = samples(2, size)
    for levels in (1, 2, 20):
        y = forward(torch.from_numpy(x), kernel, levels=levels, square=square)
        if square:
            expected = (kernel_matrix(kernel, size, levels, True, False) @ x.T).T
        else:
            expected = wavedec(x, kernel, min(levels, max_levels(kernel, size)))
        assert_close(y, expected, 1e-12)
        assert_close(inverse(y, kernel, size=size, levels=levels, square=square), x, 1e-12)


@pytest.mark.parametrize(("kernel", "size"), [("dct", 20), ("dft", 300), ("db2", 21), ("dwt", 601)])
def test_missing_coefficients_are_zeros(kernel: str, size: int) -> None:
    y = torch.from_numpy(samples(2, size))
    full = torch.cat((y[:, : size // 3], torch.zeros(2, size - size // 3, dtype=y.dtype)), 1)
    found = inverse(y[:, : size // 3], kernel, size=size, levels=3)
    assert_close(found, inverse(full, kernel, size=size, levels=3), 1e-12)


def test_more_coefficients_than_there_are_are_refused() -> None:
    with pytest.raises(TransformError, match="dct of 4 samples has 4 coefficients; 5 were given"):
        inverse(torch.zeros(5), "dct", size=4)


@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (3, 90, 2, 2), (300, 6), (6, 300, 2), (9,)])
def test_any_dim(shape: tuple[int, ...]) -> None:
    x = samples(*shape)
    for dim in range(-len(shape), len(shape)):
        y = forward(torch.from_numpy(x), "dct", dim)
        assert_close(y, scipy.fft.dct(x, axis=dim, norm="ortho"), 1e-12)
        assert_close(inverse(y, "dct", dim, size=shape[dim]), x, 1e-12)


def test_identity_is_a_copy() -> None:
    x = torch.ones(3)
    forward(x, "identity").zero_()
    inverse(x, "identity", size=3).zero_()
    assert x.tolist() == [1, 1, 1]


def test_levels_are_as_many_as_there_can_be() -> None:
    assert [max_levels("db2", size) for size in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]
    assert max_levels("dct", 8) == 0
    x = torch.from_numpy(samples(2, 8))
    assert torch.equal(forward(x, "db2", levels=50), forward(x, "db2", levels=3))
    assert not torch.allclose(forward(x, "db2", levels=2), forward(x, "db2", levels=3))
    assert coefficient_count("dwt", 7, levels=3, square=False) == 8
    assert coefficient_count("dct", 7) == coefficient_count("dwt", 7, levels=3) == 7


def test_dwt_is_haar() -> None:
    dwt, haar = (kernel_matrix(name, 12, 2, True, False) for name in ("dwt", "haar"))
    assert np.array_equal(dwt, haar)


def test_matrices_are_the_callers_own() -> None:
    for synthesis in (False, True):
        before = kernel_matrix("dct", 6, 1, True, synthesis)
        kernel_matrix("dct", 6, 1, True, synthesis).fill(0)
        assert np.array_equal(kernel_matrix("dct", 6, 1, True, synthesis), before)


def test_names_are_checked() -> None:
    for name in KERNELS:
        check_kernel(name)
    check_kernel("klt", klt=True)
    with pytest.raises(UsageError, match=r"--kernel klt: dct, dst, dft, .* is allowed"):
        check_kernel("klt")
    with pytest.raises(UsageError, match=r"klt, identity or a wavelet .* is allowed"):
        check_kernel("fft", klt=True)
    with pytest.raises(UsageError, match="dmey: its filters have no exact inverse"):
        check_kernel("dmey")


def test_every_discrete_wavelet_of_pywavelets_is_a_kernel_but_one() -> None:
    assert set(pywt.wavelist(kind="discrete")) - set(KERNELS) == {"dmey"}
    assert is_wavelet("dwt")
    assert not is_wavelet("dct")
