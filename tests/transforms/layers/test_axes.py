"""One axis in a transform domain: blocks, corners and bases against scipy, pywt and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import scipy.fft
import torch
from pydantic import ValidationError
from torch import Tensor

from cctool.transforms.layers.axes import (
    TransformedAxis,
    analysed,
    basis_matrix,
    coefficient_norms,
    count,
    is_orthonormal,
    narrowed,
    synthesised,
)
from cctool.transforms.layers.klt import klt_bases


def axis(**values: object) -> TransformedAxis:
    given = {"dim": 1, "kernel": "dct", "size": 10, "kept": 10} | values
    return TransformedAxis.model_validate(given)


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_an_axis_is_transformed_as_scipy_does() -> None:
    x = values(3, 10, 2)
    expected = scipy.fft.dct(x.numpy(), norm="ortho", axis=1)
    np.testing.assert_allclose(analysed(x, axis()).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(synthesised(torch.from_numpy(expected), axis()).numpy(), x.numpy(), atol=1e-12)


def test_blocks_are_transformed_apart_and_the_rest_by_its_own_size() -> None:
    x = values(3, 10)
    blocks = [
        scipy.fft.dct(x[:, part].numpy(), norm="ortho") for part in (slice(4), slice(4, 8), slice(8, 10))
    ]
    found = analysed(x, axis(block=4, kept=4))
    np.testing.assert_allclose(found.numpy(), np.concatenate(blocks, 1), atol=1e-12)
    torch.testing.assert_close(synthesised(found, axis(block=4, kept=4)), x)


def test_a_corner_keeps_the_lowest_frequencies_of_each_block() -> None:
    x, whole, corner = values(3, 10), axis(block=4, kept=4), axis(block=4, kept=3)
    # 3 of 4, 3 of 4, and of the last 2 places the same share, rounded up.
    assert (count(whole), count(corner)) == (10, 8)
    full = analysed(x, whole)
    cut, smaller = narrowed(full, whole, 3)
    assert smaller == corner
    torch.testing.assert_close(cut, full[:, [0, 1, 2, 4, 5, 6, 8, 9]])
    torch.testing.assert_close(analysed(x, corner), cut)
    zeroed = full.clone()
    zeroed[:, [3, 7]] = 0
    torch.testing.assert_close(synthesised(cut, corner), synthesised(zeroed, whole))


@pytest.mark.parametrize("kernel", ["dct", "dst", "dft", "dwt", "db3", "bior2.2", "identity"])
@pytest.mark.parametrize("size", [2, 7, 600])
def test_every_kernel_comes_back_and_a_corner_of_a_long_axis_is_a_part_of_it(kernel: str, size: int) -> None:
    x = values(2, size)
    whole = axis(kernel=kernel, size=size, kept=size, levels=2 if kernel[:2] in ("dw", "db", "bi") else None)
    c = analysed(x, whole)
    assert c.shape == x.shape
    torch.testing.assert_close(synthesised(c, whole), x)
    half = max(1, size // 2)
    part, smaller = narrowed(c, whole, half)
    torch.testing.assert_close(synthesised(part, smaller), part @ basis_matrix(whole, x)[:, :half].T)


def test_rows_select_places() -> None:
    x, rows = values(3, 10), torch.tensor([1, 2, 7], dtype=torch.int32)
    c = analysed(x, axis(rows=True))
    torch.testing.assert_close(synthesised(c, axis(rows=True), rows=rows), x[:, [1, 2, 7]])
    torch.testing.assert_close(basis_matrix(axis(rows=True), x, rows=rows) @ c[0], x[0, [1, 2, 7]])


def test_bases_of_biorthogonal_wavelets_have_the_norms_of_their_functions() -> None:
    found = axis(kernel="bior2.2", size=8, kept=8, levels=1)
    assert not is_orthonormal(found)
    assert is_orthonormal(axis(kernel="db2", levels=1))
    assert coefficient_norms(axis(kernel="db2", levels=1)) is None
    functions = []
    for place in range(8):
        unit = np.eye(8)[place]
        functions.append(pywt.idwt(unit[:4], unit[4:], "bior2.2", mode="periodization"))
    norms = coefficient_norms(found)
    assert norms is not None
    np.testing.assert_allclose(norms.numpy(), np.linalg.norm(functions, axis=1), atol=1e-9)
    blocked = coefficient_norms(axis(kernel="bior2.2", size=24, block=8, kept=8, levels=1))
    assert blocked is not None
    torch.testing.assert_close(blocked, norms.repeat(3))


def klt_basis(x: Tensor, of: TransformedAxis) -> Tensor:
    return klt_bases(x, (of.model_copy(update={"kernel": "klt"}),))[of.dim]


def test_a_klt_decorrelates_and_sorts_by_energy() -> None:
    x = values(6, 10) * torch.linspace(1, 5, 10)
    basis = klt_basis(x, axis())
    torch.testing.assert_close(basis.T @ basis, torch.eye(10, dtype=torch.float64))
    c = analysed(x, axis(), basis)
    gram = c.T @ c
    singular = np.linalg.svd(x.numpy(), compute_uv=False)
    np.testing.assert_allclose(gram.diagonal().numpy()[:6], singular**2, rtol=1e-9)
    assert float((gram - gram.diagonal().diag()).abs().max()) < 1e-9
    torch.testing.assert_close(synthesised(c, axis(), basis), x)


def test_a_klt_of_blocks_has_a_basis_for_each() -> None:
    x, blocked = values(6, 10), axis(block=4, kept=4)
    basis = klt_basis(x, blocked)
    assert basis.shape == (10, 4)
    assert not basis[8:, 2:].any()
    torch.testing.assert_close(basis[4:8], klt_basis(x[:, 4:8], axis(size=4, kept=4)))
    torch.testing.assert_close(synthesised(analysed(x, blocked, basis), blocked, basis), x)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8), (1, 5)])
def test_the_klt_of_a_matrix_is_its_singular_value_decomposition(shape: tuple[int, int]) -> None:
    x = values(*shape)
    axes = tuple(axis(dim=dim, kernel="klt", size=size, kept=size) for dim, size in enumerate(shape))
    bases = klt_bases(x, axes)
    for dim, size in enumerate(shape):
        torch.testing.assert_close(bases[dim].T @ bases[dim], torch.eye(size, dtype=torch.float64))
    found = bases[0].T @ x @ bases[1]
    singular = np.linalg.svd(x.numpy(), compute_uv=False)
    expected = np.zeros(shape)
    np.fill_diagonal(expected, singular)
    np.testing.assert_allclose(found.abs().numpy(), expected, atol=1e-9)


def test_a_weight_that_is_not_finite_gets_unit_vectors() -> None:
    x = values(6, 10)
    x[0, 0] = torch.nan
    basis = klt_basis(x, axis())
    torch.testing.assert_close(basis @ basis.T, torch.eye(10, dtype=torch.float64))


@pytest.mark.parametrize("kernel", ["dct", "db2", "bior2.2"])
def test_gradients_reach_coefficients(kernel: str) -> None:
    found = axis(kernel=kernel, size=7, block=4, kept=2, levels=1 if kernel != "dct" else None)
    c = values(2, count(found)).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: synthesised(c, found), c)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 0}, {"kept": 0}, {"block": 1}, {"dim": 4}, {"levels": 0}, {"size": True}, {"size": 2**40}],
)
def test_malformed_axes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        axis(**wrong)
