"""Layers that compute with complex numbers, against numpy and formulas."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from basis_toys import basis, convolved, filters, numbers, rows
from cctool.base.errors import SpecError, TransformError
from cctool.transforms.basis.build import counterpart
from cctool.transforms.basis.complex import Cardioid, magnitude
from cctool.transforms.swap import SWAPS


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def made(layer: nn.Module, **options: Any) -> nn.Module:
    found = counterpart(layer, **options)
    assert found is not None
    return found


def test_a_linear_layer_is_the_complex_product() -> None:
    layer = basis(nn.Linear(6, 9), "dft")
    weight = rows("dft", np.arange(9) + 10 * numbers(layer.frequency_offsets), 6, 9)
    bias = numbers(layer.bias) + 1j * numbers(layer.bias_imaginary)
    for x in (values(4, 6), torch.randn(4, 6)):
        np.testing.assert_allclose(numbers(layer(x)), numbers(x) @ weight.T + bias, atol=1e-5)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 3 * 9
    assert isinstance(layer, nn.Linear)
    assert basis(nn.Linear(6, 9, bias=False), "dft")(values(4, 6)).is_complex()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_is_the_complex_product_with_groups(groups: int) -> None:
    # The source dropped the imaginary input, ignored groups and added the bias to both parts.
    layer = basis(nn.Conv2d(4, 8, (3, 2), stride=2, padding=1, groups=groups), "dft")
    weight = filters(layer, gain=8 / 3)
    np.testing.assert_allclose(numbers(layer.weight), weight, atol=1e-5)
    for x in (values(2, 4, 7, 7), torch.randn(2, 4, 7, 7)):
        expected = convolved(numbers(x), weight, stride=2, padding=1, groups=groups)
        expected = expected + numbers(layer.bias)[:, None, None]
        np.testing.assert_allclose(numbers(layer(x)), expected, atol=1e-4)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 8 + 3 + 2 + 8 * 6 + 8


def test_real_maps_of_width_two_are_real_numbers() -> None:
    layer = basis(nn.Conv2d(3, 4, 1), "dft")
    x = torch.randn(2, 3, 5, 2)
    expected = convolved(numbers(x), filters(layer, gain=8 / 3)) + numbers(layer.bias)[:, None, None]
    assert layer(x).shape == (2, 4, 5, 2)
    np.testing.assert_allclose(numbers(layer(x)), expected, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 4), lambda: nn.Conv2d(2, 2, 2)])
def test_gradients_are_those_of_the_layer(make: Any) -> None:
    layer = basis(make().double(), "dft", ends=True).train()
    x = torch.randn(2, 3) if isinstance(layer, nn.Linear) else torch.randn(1, 2, 3, 3)
    names = [name for name, _ in layer.named_parameters()]

    def computed(z: Tensor, *parameters: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (z,))
        return out

    parameters = tuple(parameter.detach().requires_grad_() for parameter in layer.parameters())
    z = torch.complex(x.double(), x.double().flip(0)).requires_grad_()
    assert torch.autograd.gradcheck(computed, (z, *parameters))


def test_a_layer_at_the_end_puts_out_magnitudes() -> None:
    for layer in (nn.Linear(5, 4), nn.Conv2d(5, 4, 1)):
        complex_, real = basis(layer, "dft"), basis(layer, "dft", ends=True)
        z = values(2, 5) if isinstance(layer, nn.Linear) else values(2, 5, 3, 3)
        assert not real(z).is_complex()
        torch.testing.assert_close(real(z), complex_(z).abs())


def test_complex_layers_are_not_cut_and_have_no_plain_form() -> None:
    layer = basis(nn.Linear(5, 4), "dft")
    assert layer.plain() is None
    with pytest.raises(TransformError, match="prune before"):
        layer.taken({})


def test_half_precision_and_autocast() -> None:
    layer = basis(nn.Conv2d(3, 4, 3), "dft")
    x = torch.randn(2, 3, 6, 6)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x), expected, atol=0.05, rtol=0.05)
        assert layer(values(2, 3, 6, 6)).dtype is torch.complex64
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(x.to(torch.bfloat16)).dtype is torch.complex64


def test_the_cardioid() -> None:
    z = values(50)
    expected = numbers(z) * (1 + np.cos(np.angle(numbers(z)))) / 2
    np.testing.assert_allclose(numbers(Cardioid()(z)), expected, atol=1e-6)
    real = torch.linspace(-2, 2, 9)
    torch.testing.assert_close(Cardioid()(real.to(torch.complex64)), F.relu(real).to(torch.complex64))
    torch.testing.assert_close(Cardioid()(real), F.relu(real))
    for layer in (nn.ReLU(inplace=True), nn.GELU(), nn.Hardswish()):
        assert isinstance(made(layer), Cardioid)
    torch.testing.assert_close(made(nn.ReLU(), ends=True)(z), Cardioid()(z).abs())


@pytest.mark.parametrize("function", [magnitude, Cardioid()])
def test_gradients_at_and_near_zero_are_finite(function: Any) -> None:
    tiny = [0, 1e-45, 1e-39, 1e-25, 1e-19, 1e-13, 1e-12, 1e-8, 1]
    z = torch.tensor([complex(a, b) for a in tiny for b in (-tiny[3], 0, 1e-12, a)], requires_grad=True)
    out = function(z)
    assert out.isfinite().all()
    (out.abs() if out.is_complex() else out).sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert float(z.grad.abs().max()) < 3
    assert abs(complex(z.grad[1])) < 1e-6 or out.is_complex()


@pytest.mark.parametrize("function", [magnitude, Cardioid()])
def test_gradients_away_from_zero(function: Any) -> None:
    z = torch.randn(6, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(function, (z,))


def test_the_magnitude() -> None:
    z = values(40)
    np.testing.assert_allclose(numbers(magnitude(z)), np.abs(numbers(z)), rtol=1e-6)
    assert float(magnitude(torch.zeros(1, dtype=torch.complex64))) < 1e-6
    real = torch.randn(3)
    assert magnitude(real) is real


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, padding=1), nn.AdaptiveMaxPool2d(2)])
def test_max_pooling_picks_by_magnitude(pool: nn.Module) -> None:
    z = values(2, 3, 8, 8)
    found = made(pool)(z)
    sizes = pool(z.abs())
    torch.testing.assert_close(found.abs(), sizes)
    flat = z.flatten().tolist()
    assert all(value in flat for value in found.flatten().tolist())
    # A negative number is larger than a smaller positive one, unlike in real pooling.
    pair = torch.tensor([[-3.0, 1.0], [0.5, 0.5]])[None, None]
    assert complex(made(nn.MaxPool2d(2))(pair.to(torch.complex64)).squeeze()) == -3
    torch.testing.assert_close(made(pool)(z.real), pool(z.real))
    leaf = values(1, 1, 4, 4).requires_grad_()
    made(nn.MaxPool2d(2))(leaf).abs().sum().backward()
    assert int((leaf.grad != 0).sum()) == 4
    assert counterpart(nn.MaxPool2d(2, return_indices=True)) is None


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((3, 2)), nn.AdaptiveAvgPool2d(1)])
def test_average_pooling_takes_both_parts(pool: nn.Module) -> None:
    z = values(2, 3, 6, 6)
    torch.testing.assert_close(made(pool)(z), torch.complex(pool(z.real), pool(z.imag)))
    torch.testing.assert_close(made(pool, ends=True)(z), torch.complex(pool(z.real), pool(z.imag)).abs())


def test_batch_norm_normalises_both_parts() -> None:
    norm = made(nn.BatchNorm2d(3)).train()
    z = 5 * values(40, 3, 4, 4) + (2 - 7j)
    out = numbers(norm(z))
    np.testing.assert_allclose(out.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(out.real.var((0, 2, 3)), 0.5, rtol=1e-3)
    np.testing.assert_allclose(out.imag.var((0, 2, 3)), 0.5, rtol=1e-3)
    names = {name for name, _ in norm.named_parameters()}
    assert names == {"real.weight", "real.bias", "imaginary.weight", "imaginary.bias"}
    flat = made(nn.BatchNorm1d(3)).train()
    assert flat(values(8, 3)).shape == (8, 3)


def test_dropout_takes_whole_values() -> None:
    drop = made(nn.Dropout(0.5, inplace=True)).train()
    z = values(4000)
    out = drop(z)
    gone = out == 0
    assert 0.4 < float(gone.float().mean()) < 0.6
    torch.testing.assert_close(out[~gone], 2 * z[~gone])
    torch.testing.assert_close(drop.eval()(z), z)
    maps = made(nn.Dropout2d(0.5)).train()(values(50, 4, 3, 3))
    assert ((maps == 0).flatten(2).float().mean(2) % 1 == 0).all()


def test_what_has_no_counterpart_is_refused() -> None:
    build = SWAPS["complex"].build
    with pytest.raises(SpecError, match="GroupNorm has no counterpart"):
        build(nn.GroupNorm(2, 4), {})
    with pytest.raises(SpecError, match="ends"):
        build(nn.ReLU(), {"ends": 1})
    with pytest.raises(SpecError, match="no counterpart"):
        build(build(nn.ReLU(), {}), {})


def test_real_layers_take_magnitudes() -> None:
    linear, conv = nn.Linear(4, 3), nn.Conv2d(4, 3, 3, padding=1)
    z = values(2, 4, 5, 5)
    torch.testing.assert_close(made(conv)(z), conv(z.abs()))
    torch.testing.assert_close(made(linear)(z[..., 0, 0]), linear(z[..., 0, 0].abs()))
    torch.testing.assert_close(made(linear)(z.real[..., 0, 0]), linear(z.real[..., 0, 0]))
    assert made(linear).weight is linear.weight
