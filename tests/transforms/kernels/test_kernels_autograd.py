"""Kernels in training and on devices: gradients, precisions, autocast, export, CUDA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from cctool.base.errors import TransformError
from cctool.transforms.kernels import fourier
from cctool.transforms.kernels.blocks import block_forward, block_inverse
from cctool.transforms.kernels.by_name import coefficient_count, forward, inverse
from cctool.transforms.kernels.filter_banks import analyze, synthesize
from cctool.transforms.kernels.wavelets import Pyramid, wavedec2, waverec2

FAMILIES = ["dct", "dst", "dft", "identity", "dwt", "db2", "bior2.2"]


def doubles(*shape: int) -> Tensor:
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("kernel", FAMILIES)
def test_gradients(kernel: str, square: bool) -> None:
    assert gradcheck(lambda x: forward(x, kernel, levels=2, square=square), doubles(2, 7))
    count = coefficient_count(kernel, 7, levels=2, square=square)
    assert gradcheck(lambda c: inverse(c, kernel, 0, size=7, levels=2, square=square), doubles(count, 2))


@pytest.mark.parametrize(
    "function",
    [fourier.dct, fourier.idct, fourier.dst, fourier.idst, fourier.packed_dft, fourier.packed_idft],
)
def test_gradients_of_the_fast_transforms(function: Callable[[Tensor], Tensor]) -> None:
    for size in (1, 2, 7, 8):
        assert gradcheck(function, doubles(2, size))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("size", [12, 13])
def test_gradients_of_the_filters(size: int, square: bool) -> None:
    assert gradcheck(lambda x: analyze(x, "db2", square=square), doubles(2, size))
    low, high = analyze(doubles(2, size).detach(), "db2", square=square)
    assert gradcheck(
        lambda a, d: synthesize(a, d, "db2", size, square=square),
        (low.requires_grad_(), high.requires_grad_()),
    )


def test_gradients_of_blocks_and_pyramids() -> None:
    x = doubles(1, 2, 5, 7)
    assert gradcheck(lambda m: block_forward(m, "dct", 4), x)
    assert gradcheck(lambda m: block_inverse(m, "dst", 4), x)

    def bands(maps: Tensor) -> tuple[Tensor, ...]:
        pyramid = wavedec2(maps, "db2", 2)
        return (pyramid.approximation, *pyramid.details)

    assert gradcheck(bands, x)
    leaves = tuple(band.detach().requires_grad_() for band in bands(x))
    assert gradcheck(lambda low, *details: waverec2(Pyramid(low, details), "db2", (5, 7)), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [12, 300])
def test_half_precisions_are_computed_in_float32(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(3, size).to(dtype)
    for kernel in ("dct", "db2"):
        y = forward(x, kernel)
        assert y.dtype == dtype
        assert torch.equal(y, forward(x.float(), kernel).to(dtype))
        assert torch.equal(inverse(y, kernel, size=size), inverse(y.float(), kernel, size=size).to(dtype))
    maps = torch.randn(1, 2, 12, 10).to(dtype)
    assert torch.equal(block_forward(maps, "dct"), block_forward(maps.float(), "dct").to(dtype))
    pyramid = wavedec2(maps, "db2", 2)
    assert pyramid.approximation.dtype == pyramid.details[1].dtype == dtype
    assert waverec2(pyramid, "db2", (12, 10)).dtype == dtype


def test_autocast_does_not_reach_in() -> None:
    x = torch.randn(2, 3, 20, 12)
    plain = forward(x, "dct"), block_forward(x, "dct"), wavedec2(x, "db2", 2).approximation
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = forward(x, "dct"), block_forward(x, "dct"), wavedec2(x, "db2", 2).approximation
    assert all(torch.equal(one, other) for one, other in zip(plain, inside, strict=True))


def test_integers_are_refused() -> None:
    with pytest.raises(TransformError, match="floating-point numbers"):
        forward(torch.arange(4), "dct")


def test_what_inference_mode_made_can_be_trained_with() -> None:
    x = torch.randn(2, 43)
    with torch.inference_mode():
        forward(x, "sym5")
    weight = x.clone().requires_grad_()
    (forward(weight, "sym5") * x).sum().backward()
    assert weight.grad is not None


class Coded(nn.Module):
    """A codec without its quantizer, and a weight's transform."""

    def forward(self, x: Tensor) -> Tensor:
        pyramid = wavedec2(block_inverse(block_forward(x, "dct").round(), "dct"), "db2", 2)
        return inverse(forward(waverec2(pyramid, "db2", (18, 70)), "dst", 1), "dst", 1, size=3)


def test_exported_graphs_compute_the_same_and_keep_nothing() -> None:
    x = torch.randn(2, 3, 18, 70)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(Coded(), (x,), dynamic_shapes=(batch,)).module()
    more = torch.randn(5, 3, 18, 70)
    torch.testing.assert_close(exported(more), Coded()(more))


def test_maps_in_pieces_equal_maps_at_once() -> None:
    # Above the size of a piece, and tracked by autograd not cut into pieces.
    x = torch.randn(2, 30, 150, 121)
    assert torch.allclose(
        wavedec2(x, "haar", 1).approximation,
        wavedec2(x.clone().requires_grad_(), "haar", 1).approximation.detach(),
        atol=1e-5,
    )


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", FAMILIES)
@pytest.mark.parametrize("size", [1, 7, 64, 601])
def test_cuda_equals_cpu(kernel: str, size: int) -> None:
    x = doubles(3, size, 2).detach()
    y = forward(x, kernel, 1, levels=2)
    found = forward(x.cuda(), kernel, 1, levels=2)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), y)
    back = inverse(found, kernel, 1, size=size, levels=2)
    assert back.is_cuda
    torch.testing.assert_close(back.cpu(), x)


@pytest.mark.cuda
def test_maps_on_cuda_equal_maps_on_the_cpu() -> None:
    x = torch.randn(2, 3, 20, 70)
    found = block_forward(x.cuda(), "dct")
    torch.testing.assert_close(found.cpu(), block_forward(x, "dct"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(block_inverse(found, "dct").cpu(), x, rtol=1e-5, atol=1e-5)
    pyramid, expected = wavedec2(x.cuda(), "db2", 3), wavedec2(x, "db2", 3)
    for band, other in zip(pyramid.details, expected.details, strict=True):
        torch.testing.assert_close(band.cpu(), other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(waverec2(pyramid, "db2", (20, 70)).cpu(), x, rtol=1e-5, atol=1e-5)
