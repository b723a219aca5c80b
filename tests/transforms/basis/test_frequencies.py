"""Rows of basis functions against scipy, numpy and the formulas themselves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import scipy.fft
import torch
from torch import Tensor

from cctool.transforms.basis.frequencies import complex_rows, real_rows, row_norms, unit_gradient

REAL = {"dct": scipy.fft.dct, "dst": scipy.fft.dst}


def rows(kernel: str, count: int, size: int, offsets: Tensor | None = None, **options: Tensor) -> Tensor:
    """The first rows, as a layer of ``count`` outputs and ``size`` inputs has them."""
    indices = torch.arange(count)
    offsets = torch.zeros(count, dtype=torch.float64) if offsets is None else offsets
    positions = options.get("positions", torch.arange(size))
    period = max(count, size)
    if kernel == "dft":
        return complex_rows(indices, offsets, positions, size=size, period=period)
    return real_rows(kernel, indices, offsets, positions, size=size, period=period)


def formula(
    kernel: str, frequencies: npt.NDArray[np.float64], size: int, period: int
) -> npt.NDArray[np.float64]:
    """Rows that are not normalised, by the definition."""
    t = np.arange(size)
    if kernel == "dct":
        return np.cos(np.pi * np.outer(frequencies, 2 * t + 1) / (2 * period))
    return np.sin(np.pi * np.outer(frequencies + 1, 2 * t + 1) / (2 * period))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 25, 64])
def test_whole_frequencies_give_the_orthonormal_transforms(size: int) -> None:
    for kernel, transform in REAL.items():
        expected = transform(np.eye(size), type=2, norm="ortho", axis=0)
        np.testing.assert_allclose(rows(kernel, size, size).numpy(), expected, atol=1e-12)
    expected = np.fft.fft(np.eye(size), norm="ortho")
    np.testing.assert_allclose(rows("dft", size, size).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("kernel", ["dct", "dst", "dft"])
@pytest.mark.parametrize(("count", "size"), [(40, 10), (11, 10), (64, 16), (16, 10), (10, 1), (10, 40)])
def test_no_row_is_zero_or_the_negative_of_another(kernel: str, count: int, size: int) -> None:
    found = rows(kernel, count, size).numpy()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    assert np.linalg.matrix_rank(found) == min(count, size)
    assert np.linalg.cond(found) < 1.5
    if size > 1:
        likeness = np.abs(found @ found.conj().T)
        np.fill_diagonal(likeness, 0)
        assert likeness.max() < 0.999
    if kernel == "dct" and count > size > 1:
        # The period N of the source has a row of zeros there.
        assert np.abs(formula("dct", np.arange(count), size, size)[size]).max() < 1e-12


@pytest.mark.parametrize("kernel", ["dct", "dst"])
def test_the_norm_follows_the_frequency_and_not_the_row(kernel: str) -> None:
    standing = rows(kernel, 8, 8)
    # Row 0 moves to frequency 3, row 3 to frequency 0, and the last to where it was.
    moved = rows(kernel, 8, 8, torch.tensor([3.0, 6, 0, -3, 0, 0, -5, 0], dtype=torch.float64))
    np.testing.assert_allclose(moved[0], standing[3], atol=1e-12)
    np.testing.assert_allclose(moved[3], standing[0], atol=1e-12)
    np.testing.assert_allclose(moved[1], standing[7], atol=1e-12)
    np.testing.assert_allclose(moved[6], standing[1], atol=1e-12)


@pytest.mark.parametrize("kernel", ["dct", "dst"])
@pytest.mark.parametrize(("count", "size"), [(12, 7), (7, 12), (9, 9), (5, 1)])
def test_norms_in_closed_form_are_those_of_the_rows(kernel: str, count: int, size: int) -> None:
    generator = np.random.default_rng(0)
    offsets = generator.normal(scale=3, size=count)
    offsets[:4] = [0, 1e-9, -1e-5, 2 * max(count, size) - 2 + 1e-7]
    frequencies = np.arange(count) + offsets
    expected = np.linalg.norm(formula(kernel, frequencies, size, max(count, size)), axis=1)
    whole = torch.arange(count) + (kernel == "dst")
    found = row_norms(kernel, whole, torch.tensor(offsets), size=size, period=max(count, size))
    large = expected > 1e-2
    np.testing.assert_allclose(found.numpy()[large], expected[large], rtol=1e-6)
    assert (found > 0).all()


@pytest.mark.parametrize("kernel", ["dct", "dst", "dft"])
def test_gradients_are_those_of_the_formula(kernel: str) -> None:
    offsets = torch.tensor([0.0, 1e-3, -0.4, 2.6, 0.0], dtype=torch.float64, requires_grad=True)

    def computed(offsets: Tensor) -> Tensor:
        return rows(kernel, 5, 7, offsets)

    assert torch.autograd.gradcheck(computed, (offsets,))


def test_a_row_of_frequency_minus_one_keeps_gradients_finite() -> None:
    offsets = torch.tensor([-1.0, -2.0, 0.0], requires_grad=True)
    rows("dst", 3, 4, offsets).square().sum().backward()
    assert offsets.grad is not None
    assert offsets.grad.isfinite().all()


@pytest.mark.parametrize("kernel", ["dct", "dst", "dft"])
def test_large_layers_are_exact_in_float32(kernel: str) -> None:
    positions = torch.tensor([0, 1, 2047, 4094, 4095])
    offsets = torch.linspace(-3, 0.5, 4096)
    found = rows(kernel, 4096, 4096, offsets, positions=positions)
    expected = rows(kernel, 4096, 4096, offsets.double(), positions=positions)
    assert found.dtype in (torch.float32, torch.complex64)
    np.testing.assert_allclose(found[-50:], expected[-50:], atol=1e-6)


def test_some_positions_are_the_same_columns() -> None:
    for kernel in ("dct", "dst", "dft"):
        some = rows(kernel, 6, 9, positions=torch.tensor([1, 4, 8]))
        np.testing.assert_array_equal(some, rows(kernel, 6, 9)[:, [1, 4, 8]])


def test_unit_gradients() -> None:
    x = torch.tensor([1.0, 2.0, 2.0], requires_grad=True)
    y = unit_gradient(x)
    torch.testing.assert_close(y, x)
    (y * torch.tensor([3.0, 0.0, 4.0])).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.6, 0.0, 0.8]))
    x.grad = None
    (unit_gradient(x) * 0).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros(3))
