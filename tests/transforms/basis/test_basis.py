"""Real layers of basis functions: formulas, counts, ranks, gradients, and what a cut leaves of them."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from basis_toys import basis, convolved, filters, numbers, rows, swapped
from cctool.base.errors import SpecError
from cctool.checkpoint.edits.thin import Cut
from cctool.models.registry import build
from cctool.transforms.basis.conv import BasisConv2d
from cctool.transforms.basis.linear import BasisLinear
from cctool.transforms.swap import SWAPS

REAL = ["dct", "dst"]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kernel", REAL)
def test_a_linear_layer_has_the_rows_of_its_frequencies(kernel: str) -> None:
    for inputs, outputs in ((12, 5), (5, 12), (7, 7)):
        layer = basis(nn.Linear(inputs, outputs), kernel)
        frequencies = np.arange(outputs) + 10 * numbers(layer.frequency_offsets)
        expected = rows(kernel, frequencies, inputs, max(inputs, outputs))
        np.testing.assert_allclose(numbers(layer.weight), expected, atol=1e-6)
        np.testing.assert_allclose(numbers(layer.frequencies), frequencies, atol=1e-5)
        x = torch.randn(3, inputs)
        expected = numbers(x) @ expected.T + numbers(layer.bias)
        np.testing.assert_allclose(numbers(layer(x)), expected, atol=1e-5)
        assert isinstance(layer, nn.Linear)
        assert count(layer) == 2 * outputs


@pytest.mark.parametrize("kernel", REAL)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_is_the_formula(kernel: str, groups: int) -> None:
    layer = basis(nn.Conv2d(4, 8, (3, 2), stride=2, padding=1, groups=groups), kernel)
    weight = filters(layer)
    np.testing.assert_allclose(numbers(layer.weight), weight, atol=1e-5)
    x = torch.randn(2, 4, 7, 7)
    expected = convolved(numbers(x), weight, stride=2, padding=1, groups=groups)
    np.testing.assert_allclose(numbers(layer(x)), expected + numbers(layer.bias)[:, None, None], atol=1e-4)
    assert isinstance(layer, nn.Conv2d)
    assert count(layer) == 8 + 3 + 2 + 8 * 3 * 2 + 8


def test_fresh_layers_begin_with_whole_frequencies() -> None:
    layer = basis(nn.Linear(9, 9), moved=False)
    torch.testing.assert_close(layer.frequencies, torch.arange(9.0))
    assert 0.2 < float(basis(nn.Linear(9, 900), moved=False).bias.detach().std()) < 0.8
    grouped = basis(nn.Conv2d(8, 12, 3, groups=4), moved=False)
    # Each group is a basis of its own inputs.
    torch.testing.assert_close(grouped.frequencies, torch.arange(3.0).repeat(4))
    assert float(grouped.bias.detach().abs().max()) == 0
    assert basis(nn.Conv2d(8, 12, 3, bias=False), moved=False).bias is None


def test_counts_of_the_thesis() -> None:
    counts = {
        ("lenet", "dct", "linear"): 50_880,
        ("lenet", "dst", "conv"): 14_878,
        ("lenet", "dct", "all"): 4_052,
        # The bias of a linear layer is complex there.
        ("lenet", "dft", "linear"): 50_974,
        ("lenet", "dft", "conv"): 14_878,
        ("lenet", "dft", "all"): 4_146,
        ("alexnet", "dct", "linear"): 2_267_988,
        ("alexnet", "dst", "conv"): 21_033_384,
        ("alexnet", "dct", "all"): 29_106,
    }
    for (name, kernel, layers), expected in counts.items():
        model = build(name, {})
        swapped(model, kernel, layers, (1, 32, 32) if name == "lenet" else (3, 32, 32))
        assert count(model) == expected, (name, kernel, layers)


@pytest.mark.parametrize("kernel", REAL)
def test_filters_differ_in_more_than_a_factor(kernel: str) -> None:
    # Without the permutation of the separable transform every filter was a multiple of one matrix.
    layer = basis(nn.Conv2d(6, 16, 5), kernel, moved=False)
    spatial = numbers(layer.weight)[:, 0].reshape(16, 25)
    assert np.linalg.matrix_rank(spatial) == 16
    assert np.linalg.matrix_rank(numbers(layer.weight)[:, :, 2, 2]) == 6
    # All coefficients of a filter count, each in a way of its own.
    double = basis(nn.Conv2d(2, 3, 5).double(), kernel)

    jacobian = _delta_jacobian(double)
    for filter_, block in enumerate(jacobian):
        assert np.linalg.matrix_rank(block[filter_]) == 25


def _delta_jacobian(layer: Any) -> Any:
    """(Cout, Cout, Cin * kH * kW, kH * kW): the weight of each filter by the coefficients of each."""
    outputs = layer.out_channels

    def weight(delta: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(layer, {"delta": delta}):
            return layer.compute_weight()

    found = torch.autograd.functional.jacobian(weight, layer.delta.detach())
    return found.reshape(outputs, -1, outputs, layer.delta[0].numel()).permute(0, 2, 1, 3).numpy()


def test_variance_is_kept_through_deep_networks() -> None:
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for _ in range(12):
        blocks += [basis(nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"), moved=False), nn.ReLU()]
    x = torch.randn(4, 32, 16, 16)
    with torch.no_grad():
        deep = nn.Sequential(*blocks)(x)
    assert 0.05 < float(deep.square().mean().sqrt() / x.square().mean().sqrt()) < 20


@pytest.mark.parametrize("kernel", REAL)
@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 7), lambda: nn.Conv2d(2, 4, 3, groups=2)])
def test_gradients_are_those_of_the_layer(kernel: str, make: Any) -> None:
    layer = basis(make().double(), kernel)
    x = torch.randn(2, 5) if isinstance(layer, nn.Linear) else torch.randn(1, 2, 4, 4)
    x = x.double()
    names = [name for name, _ in layer.named_parameters()]
    layer.train()

    def computed(*values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return out

    values = tuple(parameter.detach().requires_grad_() for parameter in layer.parameters())
    assert torch.autograd.gradcheck(computed, values)


def test_the_plain_layer_computes_the_same() -> None:
    for layer in (basis(nn.Linear(6, 9)), basis(nn.Conv2d(4, 6, 3, stride=2, groups=2, dilation=2), "dst")):
        x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 9, 9)
        plain = layer.plain()
        assert type(plain) in (nn.Linear, nn.Conv2d)
        torch.testing.assert_close(plain(x), layer(x))
        assert list(plain.state_dict()) == ["weight", "bias"]


def cut(layer: Any, dim: int, keep: list[int]) -> dict[str, list[Cut]]:
    found = [Cut(dim, torch.tensor(keep), layer.weight.shape[dim])]
    return {"weight": found, "bias": found} if dim == 0 else {"weight": found}


@pytest.mark.parametrize("kernel", REAL)
def test_a_cut_layer_has_what_is_left_of_the_weight(kernel: str) -> None:
    for layer in (basis(nn.Linear(9, 7), kernel), basis(nn.Conv2d(9, 7, 3), kernel)):
        once = layer.taken(cut(layer, 0, [0, 3, 4, 6]))
        both = once.taken(cut(once, 1, [1, 2, 5, 8]))
        twice = both.taken(
            {
                **cut(both, 0, [1, 3]),
                "weight": [*cut(both, 0, [1, 3])["weight"], *cut(both, 1, [0, 3])["weight"]],
            }
        )
        torch.testing.assert_close(once.weight, layer.weight[[0, 3, 4, 6]])
        torch.testing.assert_close(both.weight, layer.weight[[0, 3, 4, 6]][:, [1, 2, 5, 8]])
        torch.testing.assert_close(twice.weight, layer.weight[[3, 6]][:, [1, 8]])
        torch.testing.assert_close(twice.bias, layer.bias[[3, 6]])
        assert count(once) < count(layer)
        names = (
            ("out_features", "in_features")
            if isinstance(layer, nn.Linear)
            else ("out_channels", "in_channels")
        )
        assert [getattr(twice, name) for name in names] == [2, 2]
        assert layer.arguments.cut == ()
        # The edit makes the same layer out of the thinned one.
        thinned = nn.Linear(2, 2) if isinstance(layer, nn.Linear) else nn.Conv2d(2, 2, 3)
        edit = twice.swap("x")
        built = SWAPS[edit.layer].build(thinned, edit.arguments)
        built.load_state_dict(twice.state_dict())
        torch.testing.assert_close(built.weight, twice.weight)


def test_groups_go_whole_or_become_narrower() -> None:
    depthwise = basis(nn.Conv2d(6, 6, 3, groups=6))
    left = depthwise.taken(cut(depthwise, 0, [1, 4, 5]))
    assert (left.groups, left.in_channels, left.out_channels) == (3, 3, 3)
    x = torch.randn(1, 6, 5, 5)
    torch.testing.assert_close(left(x[:, [1, 4, 5]]), depthwise(x)[:, [1, 4, 5]])
    grouped = basis(nn.Conv2d(4, 8, 3, groups=2))
    narrow = grouped.taken(cut(grouped, 0, [0, 3, 5, 6]))
    assert (narrow.groups, narrow.in_channels, narrow.out_channels) == (2, 4, 4)
    torch.testing.assert_close(narrow(x[:, :4]), grouped(x[:, :4])[:, [0, 3, 5, 6]])


def test_the_weight_of_an_evaluation_follows_its_parameters() -> None:
    layer = basis(nn.Linear(6, 4))
    with torch.no_grad():
        first = layer.weight
        assert layer.weight is first
        layer.frequency_offsets.add_(0.1)
        assert not torch.equal(layer.weight, first)
    assert layer.weight.requires_grad
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.frequency_offsets.zero_()
        assert not torch.equal(copied.weight, layer.weight)
    assert "weight" not in layer.state_dict()


def test_half_precision_computes_frequencies_in_float32() -> None:
    layer = basis(nn.Linear(300, 200))
    expected = layer.weight.detach()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight.dtype is torch.bfloat16
    assert float((half.weight.float() - expected).detach().abs().mean()) < 0.1 * float(expected.abs().mean())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 300)).dtype is torch.bfloat16
        torch.testing.assert_close(layer.weight, expected)


def test_maps_of_width_two_stay_real() -> None:
    # The source took a last dim of 2 for a complex number.
    layer = basis(nn.Conv2d(3, 4, (3, 1), padding=(1, 0)))
    x = torch.randn(2, 3, 5, 2)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=(1, 0)))
    assert layer(x).shape == (2, 4, 5, 2)
    linear = basis(nn.Linear(2, 3))
    torch.testing.assert_close(linear(x[:, :, 0]), x[:, :, 0] @ linear.weight.T + linear.bias)


def test_normalised_gradients_have_norm_one_in_copies_and_files_too() -> None:
    layer = basis(nn.Conv2d(3, 4, 3), normalize_gradients=True)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    edit = layer.swap("x")
    loaded = SWAPS[edit.layer].build(nn.Conv2d(3, 4, 3), edit.arguments)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(loaded.weight, layer.weight)
    for made in (layer, copy.deepcopy(layer), loaded):
        made(torch.randn(2, 3, 6, 6)).square().sum().backward()
        for name, parameter in made.named_parameters():
            norm = float(parameter.grad.norm())
            assert (norm == pytest.approx(1, abs=1e-4)) == (name != "bias"), name
    # In the thesis' units: frequencies as they are, and the mean of N(0, 1) coefficients.
    fresh = basis(nn.Conv2d(3, 40, 5), normalize_gradients=True, moved=False)
    assert 0.9 < float(fresh.delta.detach().std()) < 1.1
    np.testing.assert_allclose(
        numbers(fresh.weight), filters(fresh, unit=1.0) / 10 / np.sqrt(2 / 25) / 25, atol=1e-6
    )


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", ["dct", "dst", "dft"])
def test_layers_compute_the_same_on_cuda(kernel: str) -> None:
    for layer in (nn.Linear(70, 90), nn.Conv2d(6, 8, 3, groups=2)):
        made = basis(layer, kernel)
        x = torch.randn(2, 70) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 9, 9)
        expected = made(x)
        expected.abs().sum().backward()
        gradient = made.frequency_offsets.grad.clone()
        made.zero_grad()
        found = made.cuda()(x.cuda())
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
        found.abs().sum().backward()
        torch.testing.assert_close(made.frequency_offsets.grad.cpu(), gradient, atol=1e-1, rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kernel": "dwt"}, "kernel"),
        ({"outputs": 3}, "dim 0"),
        ({"outputs": 5}, "dim 0"),
        ({"inputs": 7}, "dim 1"),
        ({"inputs": 2**40}, "inputs"),
        ({"cut": [0, 1, 0]}, "cut"),
        ({"cut": [2]}, "cut"),
        ({"normalize_gradients": "yes"}, "normalize_gradients"),
        ({"hook": "print"}, "hook"),
        ({"ends": True}, "real"),
        ({"kernel": "dft", "cut": [0]}, "not cut"),
        ({"outputs": 0}, "outputs"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], problem: str) -> None:
    given = {"kernel": "dct", "outputs": 4, "inputs": 6} | changes
    with pytest.raises(SpecError, match=problem):
        SWAPS["basis"].build(nn.Linear(6, 4), given)


def test_only_linear_layers_and_convolutions_are_replaced() -> None:
    with pytest.raises(SpecError, match="ConvTranspose2d"):
        SWAPS["basis"].build(nn.ConvTranspose2d(4, 6, 3), {"kernel": "dct", "outputs": 4, "inputs": 6})
    assert isinstance(basis(nn.Linear(3, 2)), BasisLinear)
    assert isinstance(basis(nn.Conv2d(3, 2, 1)), BasisConv2d)
