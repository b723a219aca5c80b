"""Layers of coefficients: what they compute, how they train, and what is left of them after a cut."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor, nn

from cctool.base.errors import SpecError, TransformError
from cctool.checkpoint.edits.mask import add_masks, masks_of
from cctool.options.transform.choices import Axes
from cctool.transforms.layers.build import build_coefficients, check_coefficients, coefficient_layer
from cctool.transforms.layers.coefficients import (
    CoefficientConv2d,
    CoefficientLayer,
    CoefficientLinear,
    Coefficients,
)
from cctool.transforms.layers.which import transformed_axes

KERNELS = ["dct", "dst", "dft", "dwt", "db2", "bior2.2", "klt", "identity"]


@dataclass(frozen=True)
class Cut:
    dim: int
    keep: Tensor
    size: int


def coded(layer: nn.Module, kernel: str = "dct", **options: Any) -> CoefficientLayer:
    given: dict[str, Any] = {"axes": None, "block": None, "levels": None} | options
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return coefficient_layer(layer, Coefficients(axes=transformed_axes(weight, kernel, **given)))


def seeded(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layer.eval()


def linear(out: int = 6, features: int = 10) -> nn.Module:
    return seeded(nn.Linear(features, out))


def conv(**options: Any) -> nn.Module:
    return seeded(nn.Conv2d(4, 6, 3, padding=1, **options))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("make", [linear, conv, lambda: seeded(nn.Conv2d(5, 3, 1)), lambda: conv(groups=2)])
def test_all_coefficients_compute_what_the_layer_did(kernel: str, make: Any) -> None:
    layer = make()
    found = coded(layer, kernel)
    assert isinstance(found, type(layer))
    x = torch.randn(2, 10) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(found(x), layer(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found(x), layer(x), atol=1e-5, rtol=1e-5)
    plain = found.plain()
    assert type(plain) is type(layer)
    assert list(plain.state_dict()) == list(layer.state_dict())
    torch.testing.assert_close(plain.weight, layer.weight, atol=1e-6, rtol=1e-6)
    assert str(plain) == str(layer)


def test_coefficients_are_the_transform_of_the_weight() -> None:
    layer = linear()
    expected = scipy.fft.dctn(layer.weight.detach().numpy(), norm="ortho")
    np.testing.assert_allclose(coded(layer).coefficients.detach().numpy(), expected, atol=1e-5)
    filters = conv()
    expected = scipy.fft.dctn(filters.weight.detach().numpy(), norm="ortho", axes=(2, 3))
    np.testing.assert_allclose(coded(filters).coefficients.detach().numpy(), expected, atol=1e-5)
    expected = scipy.fft.dctn(filters.weight.detach().numpy(), norm="ortho")
    both = coded(filters, axes=Axes.BOTH)
    np.testing.assert_allclose(both.coefficients.detach().numpy(), expected, atol=1e-5)
    channel = coded(filters, axes=Axes.CHANNEL, block=2)
    assert [axis.dim for axis in channel.arguments.axes] == [0, 1]
    assert channel.arguments.axes[0].block == 2


def test_a_narrowed_layer_is_smaller_and_computes_with_the_corner() -> None:
    layer = linear()
    found = coded(layer)
    found.narrow([3, 5])
    assert found.coefficients.shape == (3, 5)
    corner = scipy.fft.dctn(layer.weight.detach().numpy(), norm="ortho")
    corner[3:], corner[:, 5:] = 0, 0
    expected = scipy.fft.idctn(corner, norm="ortho")
    np.testing.assert_allclose(found.weight.detach().numpy(), expected, atol=1e-5)
    mask = torch.rand(3, 5) > 0.5
    add_masks(found, {"coefficients": mask})
    found.narrow([2, 4])
    assert torch.equal(masks_of(found)["coefficients"], mask[:2, :4])


@pytest.mark.parametrize("kernel", ["dct", "klt", "bior2.2", "dwt"])
@pytest.mark.parametrize("block", [None, 4])
def test_training_multiplies_by_coefficients_and_evaluation_by_the_weight_alike(
    kernel: str, block: int | None
) -> None:
    found = coded(linear(40, 70), kernel, block=block)
    found.narrow([max(1, axis.kept // 2) for axis in found.arguments.axes])
    x = torch.randn(3, 5, 70, requires_grad=True)
    trained = found.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(x), trained, atol=1e-4, rtol=1e-4)
    gradients = torch.autograd.grad(trained.square().sum(), (x, found.coefficients, found.bias))
    plain = torch.nn.functional.linear(x, found.weight, found.bias)
    expected = torch.autograd.grad(plain.square().sum(), (x, found.coefficients, found.bias))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-3)


def test_a_step_of_training_moves_the_weight_and_evaluation_sees_it() -> None:
    found = coded(conv()).train()
    x = torch.randn(2, 4, 8, 8)
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
    with torch.no_grad():
        before = found.eval()(x)
    found.train()(x).square().mean().backward()
    assert found.coefficients.grad is not None
    assert found.coefficients.grad.abs().min() > 0
    optimizer.step()
    with torch.no_grad():
        after = found.eval()(x)
        torch.testing.assert_close(after, found.plain()(x))
    assert not torch.allclose(before, after)


def test_the_weight_is_computed_once_while_nothing_changes() -> None:
    found = coded(linear())
    with torch.no_grad():
        first = found.weight
        assert found.weight is first
        found.coefficients.mul_(2)
        torch.testing.assert_close(found.weight, 2 * first)
        found.load_state_dict({name: value * 2 for name, value in found.state_dict().items()})
        torch.testing.assert_close(found.weight, 4 * first)
        assert found.double().weight.dtype == torch.float64
    found.requires_grad_(False)
    assert found.weight is found.weight
    assert found.weight.grad_fn is None


def test_inference_mode_leaves_no_weight_behind_that_training_could_meet() -> None:
    found = coded(conv())
    x = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        found(x)
    found(x.requires_grad_()).sum().backward()
    found.requires_grad_(False)
    found(x).sum().backward()


def test_copies_files_and_types() -> None:
    found = coded(linear(), "klt")
    x = torch.randn(2, 10)
    with torch.no_grad():
        expected = found(x)
        other = copy.deepcopy(found)
        other.coefficients.zero_()
        torch.testing.assert_close(found(x), expected)
        stream = io.BytesIO()
        torch.save(found, stream)
        stream.seek(0)
        torch.testing.assert_close(torch.load(stream, weights_only=False)(x), expected)
        half = copy.deepcopy(found).to(torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(half(x.bfloat16()).float(), expected, atol=0.2, rtol=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(found(x).float(), expected, atol=0.1, rtol=0.05)
    assert list(found.state_dict()) == ["coefficients", "bias", "basis_0", "basis_1"]


def test_hooks_and_frozen_weights_are_taken_over() -> None:
    layer = linear()
    layer.weight.requires_grad_(False)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    found = coded(layer)
    x = torch.randn(2, 10)
    torch.testing.assert_close(found(x), layer(x), atol=1e-5, rtol=1e-5)
    assert not found.coefficients.requires_grad
    assert not found.plain().weight.requires_grad


def test_initialising_anew_draws_a_weight_as_the_ordinary_layer_does() -> None:
    layer = nn.Linear(10, 6)
    found = coded(layer)
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    found.reset_parameters()
    torch.testing.assert_close(found.weight, layer.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.bias, layer.bias)


CUTS = {
    "out": {"weight": (Cut(0, torch.tensor([0, 2, 5]), 6),), "bias": (Cut(0, torch.tensor([0, 2, 5]), 6),)},
    "in": {"weight": (Cut(1, torch.tensor([1, 3]), 4),)},
    "both": {
        "weight": (Cut(0, torch.tensor([1, 4]), 6), Cut(1, torch.tensor([0, 2]), 4)),
        "bias": (Cut(0, torch.tensor([1, 4]), 6),),
    },
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("axes", [Axes.SPATIAL, Axes.CHANNEL, Axes.BOTH])
@pytest.mark.parametrize(("kernel", "block"), [("dct", None), ("klt", None), ("klt", 4), ("db2", 4)])
def test_a_cut_layer_is_the_cut_ordinary_one(
    cuts: dict[str, tuple[Cut, ...]], axes: Axes, kernel: str, block: int | None
) -> None:
    found = coded(conv(), kernel, axes=axes, block=block)
    add_masks(found, {"coefficients": found.coefficients.detach().abs() > 0.3})
    weight, bias = found.weight.detach(), found.bias.detach()
    for cut in cuts["weight"]:
        weight = weight.index_select(cut.dim, cut.keep)
    for cut in cuts.get("bias", ()):
        bias = bias.index_select(cut.dim, cut.keep)
    left = found.taken(cuts)
    torch.testing.assert_close(left.weight, weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(left.bias, bias)
    assert (left.out_channels, left.in_channels, left.groups) == (*weight.shape[:2], 1)
    assert masks_of(left)["coefficients"].shape == left.coefficients.shape
    assert not left.coefficients[~masks_of(left)["coefficients"]].any()
    assert found.weight.shape == (6, 4, 3, 3)
    # Cut again, written down and built again from the cut ordinary layer.
    again = left.taken(
        {"weight": (Cut(0, torch.tensor([0]), len(weight)),), "bias": (Cut(0, torch.tensor([0]), 1),)}
    )
    torch.testing.assert_close(again.weight, weight[:1], atol=1e-6, rtol=1e-6)
    rebuilt = build_coefficients(again.plain(), again.swap("x").arguments)
    state = {name: value for name, value in again.state_dict().items() if name != "coefficients_mask"}
    rebuilt.load_state_dict(state)
    check_coefficients(rebuilt)
    torch.testing.assert_close(rebuilt.weight, weight[:1], atol=1e-6, rtol=1e-6)
    x = torch.randn(1, weight.shape[1], 5, 5)
    torch.testing.assert_close(rebuilt(x), again.plain()(x), atol=1e-5, rtol=1e-5)


def test_a_cut_linear_layer_still_trains_through_its_coefficients() -> None:
    found = coded(linear(40, 70)).taken({"weight": (Cut(1, torch.arange(0, 70, 3), 70),)})
    assert (found.in_features, found.out_features) == (24, 40)
    x = torch.randn(2, 24)
    with torch.no_grad():
        expected = found.eval()(x)
    torch.testing.assert_close(found.train()(x), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(TransformError, match="cannot be initialised"):
        found.reset_parameters()


def test_groups_go_with_their_outputs() -> None:
    found = coded(seeded(nn.Conv2d(4, 8, 3, groups=4)))
    keep = torch.tensor([0, 1, 6, 7])
    left = found.taken({"weight": (Cut(0, keep, 8),), "bias": (Cut(0, keep, 8),)})
    assert (left.groups, left.in_channels, left.out_channels) == (2, 2, 4)
    assert left(torch.randn(1, 2, 5, 5)).shape == (1, 4, 3, 3)
    within = found.taken(
        {"weight": (Cut(0, keep_one := torch.arange(0, 8, 2), 8),), "bias": (Cut(0, keep_one, 8),)}
    )
    assert (within.groups, within.in_channels, within.out_channels) == (4, 4, 4)


@pytest.mark.parametrize(("kept", "layers"), [((2, 3), 2), ((20, 30), None), ((4, 12), 3)])
def test_small_factors_compute_the_same(kept: tuple[int, int], layers: int | None) -> None:
    found = coded(linear(20, 30))
    found.narrow(kept)
    assert isinstance(found, CoefficientLinear)
    made = found.factored()
    if layers is None:
        assert made is None
        return
    assert made is not None
    assert all(type(layer) is nn.Linear for layer in made)
    assert sum(layer.weight.numel() for layer in made) < 600
    x = torch.randn(4, 30)
    with torch.no_grad():
        torch.testing.assert_close(made(x), found(x), atol=1e-4, rtol=1e-4)


def test_hostile_arguments_are_refused_before_anything_is_allocated() -> None:
    axis = {"dim": 0, "kernel": "dct", "size": 6, "kept": 6}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "axes"),
        ({"axes": []}, "axes"),
        ({"axes": [axis, axis]}, "once"),
        ({"axes": [axis | {"kernel": "os.system"}]}, "kernel"),
        ({"axes": [axis | {"size": 7}]}, "the edit says 7"),
        ({"axes": [axis | {"size": 5, "kept": 5}]}, "the edit says 5"),
        ({"axes": [axis | {"kept": 7}]}, "keeps 7"),
        ({"axes": [axis | {"kept": 3, "block": 2}]}, "keeps 3"),
        ({"axes": [axis | {"dim": 2}]}, "no dim 2"),
        ({"axes": [axis | {"kernel": "klt", "size": 9000, "kept": 6, "rows": True}]}, "at most 8192"),
        ({"axes": [axis | {"size": 2**40, "rows": True}]}, "size"),
        ({"axes": [axis | {"surprise": 1}]}, "surprise"),
        ({"axes": [axis], "surprise": 1}, "surprise"),
    ]
    for arguments, text in wrong:
        with pytest.raises(SpecError, match=text):
            build_coefficients(linear(), arguments)
    with pytest.raises(SpecError, match="not of Conv1d"):
        build_coefficients(nn.Conv1d(2, 6, 3), {"axes": [axis]})


def test_the_layer_says_what_it_is() -> None:
    assert "in_features=10" in str(coded(linear()))
    assert "0: dct 6 of 6, 1: dct 10 of 10" in str(coded(linear()))
    assert isinstance(coded(conv()), CoefficientConv2d)
