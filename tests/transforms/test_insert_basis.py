"""Networks with basis layers: which modules follow to complex numbers, and that they train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from basis_toys import swapped
from cctool.base.errors import TransformError
from cctool.models.registry import build
from cctool.transforms.basis.complex import (
    Cardioid,
    ComplexAverage,
    ComplexBatchNorm,
    MagnitudeConv2d,
    MagnitudeLinear,
)
from cctool.transforms.basis.linear import BasisLinear

GREY, COLOUR = (1, 32, 32), (3, 32, 32)


def step(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """One step of training; every parameter gets a finite gradient, and the loss can be computed."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, *shape), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    # Axes of size 1 have rows that no frequency changes.
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.endswith("frequency_offsets") for name in moved)
    with torch.no_grad():
        assert model.eval()(images).isfinite().all()


@pytest.mark.parametrize("kernel", ["dct", "dst", "dft"])
@pytest.mark.parametrize("layers", ["linear", "conv", "all"])
def test_every_kernel_trains_every_kind_of_layer(kernel: str, layers: str) -> None:
    model = build("lenet", {"in_channels": 2})
    swapped(model, kernel, layers, (2, 32, 32))
    step(model, (2, 32, 32))


@pytest.mark.parametrize("kernel", ["dct", "dst", "dft"])
@pytest.mark.parametrize("name", ["alexnet", "torchvision:resnet18"])
def test_larger_networks_take_a_step(kernel: str, name: str) -> None:
    model = build(name, {"num_classes": 10} if name == "alexnet" else {})
    if name == "alexnet":
        # The hidden layers of 4096 are tried by the benchmark.
        model.classifier = nn.Linear(1024, 10)
    swapped(model, kernel, "all", COLOUR)
    step(model, COLOUR)


def test_what_stands_between_complex_layers_follows() -> None:
    model = build("lenet", {})
    edits = swapped(model, "dft", "all", GREY)
    assert {edit.module for edit in edits} == {
        "features.1", "features.2", "features.4", "features.5", "features.7", "classifier.1",
    }  # fmt: skip
    assert isinstance(model.classifier[1], Cardioid)
    assert model.classifier[2].arguments.ends
    assert not model.classifier[0].arguments.ends
    logits = model.eval()(torch.randn(3, *GREY))
    assert not logits.is_complex()
    assert (logits >= 0).all()


def test_the_complex_part_begins_at_the_first_layer_and_ends_before_a_real_one() -> None:
    linear = build("lenet", {})
    edits = swapped(linear, "dft", "linear", GREY)
    assert [edit.module for edit in edits] == ["classifier.1"]
    assert isinstance(linear.features[1], nn.ReLU)
    conv = build("lenet", {})
    edits = swapped(conv, "dft", "conv", GREY)
    assert isinstance(conv.classifier[0], MagnitudeLinear)
    assert type(conv.classifier[1]) is nn.ReLU
    first = build("lenet", {})
    swapped(first, "dft", "features.0", GREY)
    assert isinstance(first.features[3], MagnitudeConv2d)
    assert type(first.features[4]) is nn.ReLU
    for model in (linear, conv, first):
        assert not model.eval()(torch.randn(2, *GREY)).is_complex()


def test_residual_networks_follow_with_their_norms_and_sums() -> None:
    model = build("resnet20", {"base": 4})
    edits = swapped(model, "dft", "all", COLOUR)
    kinds = [type(model.get_submodule(edit.module)) for edit in edits]
    assert ComplexBatchNorm in kinds
    assert ComplexAverage in kinds
    step(model, COLOUR)


def test_a_network_that_ends_in_pooling_ends_there_in_magnitudes() -> None:
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    edits = swapped(model, "dft", "conv", GREY)
    assert {edit.module: edit.arguments for edit in edits} == {"1": {}, "2": {"ends": True}}
    assert not model(torch.randn(2, *GREY)).is_complex()


def test_shared_modules_are_replaced_under_each_name() -> None:
    relu = nn.ReLU()
    conv = nn.Conv2d(2, 2, 3, padding=1)
    model = nn.Sequential(conv, relu, conv, relu, nn.Flatten(), nn.Linear(2 * 64, 4))
    swapped(model, "dft", "all", (2, 8, 8))
    assert model[0] is model[2]
    assert model[1] is model[3]
    assert isinstance(model[3], Cardioid)
    step(model, (2, 8, 8))


class Functional(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("function", "name"),
    [(F.relu, "relu"), (torch.relu, "relu"), (lambda x: F.max_pool2d(x, 2), "max_pool2d")],
)
def test_functions_that_fail_on_complex_numbers_are_named(function: Any, name: str) -> None:
    model = nn.Sequential(nn.Identity(), Functional(function))
    with pytest.raises(TransformError, match=rf"1 \(Functional\) calls {name}.*complex"):
        swapped(model, "dft", "conv", (1, 8, 8))
    assert type(model[1].first) is nn.Conv2d
    swapped(model, "dct", "conv", (1, 8, 8))


def test_modules_without_a_counterpart_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3))
    with pytest.raises(TransformError, match=r"1 \(GroupNorm\)"):
        swapped(model, "dft", "conv", (1, 8, 8))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        return self.one(x), self.two(x)


def test_several_complex_outputs_are_refused() -> None:
    with pytest.raises(TransformError, match="outputs of the network stay complex"):
        swapped(TwoHeads(), "dft", "all", (1, 2, 2))


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(x)))


def test_a_norm_of_real_and_complex_values_is_refused() -> None:
    with pytest.raises(TransformError, match="norm meets complex and real values"):
        swapped(SharedNorm(), "dft", "conv", (1, 4, 4))


def test_a_complex_network_is_not_changed_again() -> None:
    model = build("lenet", {})
    swapped(model, "dft", "features.0", GREY)
    with pytest.raises(TransformError, match="already"):
        swapped(model, "dft", "linear", GREY)
    # Its real part may still become basis functions, and the layers that take magnitudes stay as they are.
    swapped(model, "dct", "all", GREY)
    assert isinstance(model.features[3], MagnitudeConv2d)
    assert isinstance(model.classifier[0], BasisLinear)
    step(model, GREY)


def test_real_basis_functions_do_not_take_complex_values() -> None:
    model = build("lenet", {})
    swapped(model, "dct", "linear", GREY)
    with pytest.raises(TransformError, match=r"classifier.0 \(BasisLinear\) calls linear"):
        swapped(model, "dft", "conv", GREY)
