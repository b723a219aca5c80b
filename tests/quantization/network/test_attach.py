"""Quantizers that act on the calls of a network, and the edit that brings them back."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.base.errors import CorruptCheckpointError, SpecError
from cctool.checkpoint.edits.mask import add_masks
from cctool.checkpoint.spec import ModelSpec
from cctool.quantization.network.attach import attach, detach, following_values, only, quantizers_of
from cctool.quantization.network.calls import CallSite
from cctool.quantization.network.edit import QUANTIZE, with_quantizers
from cctool.quantization.network.points import CallPoint, Quantize
from cctool.quantization.quantizers.config import QuantizerConfig
from quantizing_toys import ACTIVATION, WEIGHT, Functional, Residual, images, made, quantized


def by_hand(model: Any, x: Tensor) -> Tensor:
    """What `Residual` computes with its quantizers, written out."""
    held = quantizers_of(model)

    def q(key: str, value: Tensor) -> Tensor:
        return held.quantizer(key)(value)

    def convolved(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, key: str) -> Tensor:
        y = F.conv2d(x, q(key, conv.weight), padding=1)
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    x = q("input#0:output", x)
    x = q("relu/relu#0:output", convolved(x, model.conv1, model.bn1, "conv1/weight").relu())
    y = q("bn2/batch_norm#0:output", convolved(x, model.conv2, model.bn2, "conv2/weight"))
    x = q("relu/relu#1:output", (y + x).relu())
    x = q("adaptive_avg_pool2d#0:output", F.adaptive_avg_pool2d(x, 1))
    return F.linear(x.flatten(1), q("fc/weight", model.fc.weight), model.fc.bias)


def test_a_pass_quantizes_weights_and_activations_at_their_places() -> None:
    model, x = made(Residual), images()
    plain = model(x)
    quantized(model)
    assert torch.equal(model(x), by_hand(model, x))
    assert not torch.equal(model(x), plain)
    assert float((model(x) - plain).detach().abs().max()) < 0.1


def test_gradients_reach_the_float_weights() -> None:
    model = quantized(made(Residual)).train()
    model(images(4)).square().sum().backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        for name, parameter in model.named_parameters()
        if name.endswith("weight")
    )


def test_without_its_quantizers_the_network_is_what_it_was() -> None:
    model, x = made(Residual), images()
    plain, names = model(x), list(model.state_dict())
    quantized(model)
    assert detach(model)
    assert torch.equal(model(x), plain)
    assert list(model.state_dict()) == names
    for hooks in (model._forward_hooks, model._forward_pre_hooks, model._forward_hooks_always_called):
        assert not hooks
    assert not detach(model)


def test_copies_have_quantizers_of_their_own() -> None:
    model, x = quantized(made(Functional)), images()
    before = model(x)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), before)
    held = quantizers_of(other)
    assert held is not None
    for _, quantizer in held.named():
        quantizer.set_range(torch.zeros_like(quantizer.scale), torch.ones_like(quantizer.scale) * 1e-3)
    assert not torch.equal(other(x), before)
    assert torch.equal(model(x), before)


def test_a_pass_that_raises_leaves_nothing_behind() -> None:
    model = quantized(made(Residual))
    expected = model(images())
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 5, 8, 8))
    x = torch.ones(3)
    assert torch.equal(x.relu(), x)
    assert torch.equal(model(images()), expected)
    assert not torch.nn.modules.module._global_forward_hooks


def test_networks_in_other_threads_do_not_meet() -> None:
    models = [quantized(made(Residual, seed)) for seed in range(2)]
    expected = [model(images()) for model in models]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def run(number: int) -> None:
        for _ in range(10):
            found[number].append(models[number](images()))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert all(torch.equal(value, expected[number]) for value in found[number])


def test_a_container_that_runs_its_modules_in_turn_runs_as_before() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))

    model = made(build)
    plain = model(images())
    quantized(model)
    assert float((model(images()) - plain).detach().abs().max()) < 0.05
    assert not torch.equal(model(images()), plain)


def test_values_are_shown_before_they_are_quantized() -> None:
    model, seen = quantized(made(Residual)), dict[str, Tensor]()
    plain = copy.deepcopy(model)
    detach(plain)
    with following_values(model, lambda key, value: seen.update({key: value.detach().clone()})):
        output = model(images())
    assert torch.equal(output, plain(images()))
    assert torch.equal(seen["input#0:output"], images())
    assert torch.equal(seen["conv1/weight"], model.conv1.weight)
    with following_values(model, lambda key, value: None, quantized=True):
        assert not torch.equal(model(images()), output)


def test_only_some_quantizers_work() -> None:
    model = quantized(made(Residual))
    plain = copy.deepcopy(model)
    detach(plain)
    with only(model, []):
        assert torch.equal(model(images()), plain(images()))
    with only(model, ["fc/weight"]):
        assert torch.equal(model(images())[:, 0] == plain(images())[:, 0], torch.zeros(2, dtype=torch.bool))


def test_masked_weights_stay_zero_where_the_grid_has_no_zero() -> None:
    model = made(Residual)
    mask = torch.rand(model.conv1.weight.shape) > 0.5
    add_masks(model, {"conv1.weight": mask})
    quantized(model, weight=QuantizerConfig(method="dorefa", bits=2))
    model.train()
    model(images(4)).sum().backward()
    assert bool((model.conv1.weight.grad[~mask] == 0).all())
    # A level of DoReFa's is never 0, so what a mask takes away would come back with a sign.
    model.eval().conv1.weight.data[~mask] = 7.0
    first = model(images())
    model.conv1.weight.data[~mask] = -7.0
    assert torch.equal(model(images()), first)
    model.conv1.weight.data[mask] *= -1
    assert not torch.equal(model(images()), first)


def test_the_edit_says_all_that_brings_quantizers_back() -> None:
    model = quantized(made(Residual))
    spec = with_quantizers(ModelSpec(architecture="toy", input_shape=(3, 8, 8)), model)
    other = made(Residual, seed=5)
    for edit in spec.edits:
        QUANTIZE.apply(other, Quantize.model_validate(edit))
    other.load_state_dict(model.state_dict())
    for edit in spec.edits:
        QUANTIZE.check(other, Quantize.model_validate(edit))
    assert torch.equal(other(images()), model(images()))
    assert with_quantizers(spec, other) == spec
    detach(other)
    assert with_quantizers(spec, other).edits == ()


@pytest.mark.parametrize(
    "edit",
    [
        {"module": "nothing"},
        {"module": "conv1", "calls": {"conv2d": {}}},
        {"module": "conv1", "calls": {"conv2d#x": {}}},
        {"module": "conv1", "calls": {"__import__('os')#0": {}}},
        {
            "module": "conv1",
            "weights": {"weight": {"config": {"method": "uniform", "bits": 8}, "norm": "no"}},
        },
    ],
)
def test_edits_that_fit_no_network_are_refused(edit: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        QUANTIZE.apply(made(Residual), Quantize.model_validate({"kind": "quantize"} | edit))


def test_scales_that_do_not_fit_their_weight_are_refused() -> None:
    model = made(Residual)
    edit = Quantize.model_validate(
        {
            "kind": "quantize",
            "module": "conv1",
            "weights": {"weight": {"config": WEIGHT.model_dump(), "channels": 3}},
        }
    )
    QUANTIZE.apply(model, edit)
    with pytest.raises(CorruptCheckpointError, match="4 channels, its quantizer 3 scales"):
        QUANTIZE.check(model, edit)


def test_a_network_with_something_of_that_name_is_refused() -> None:
    model = made(Residual)
    model.quantizers = nn.Identity()
    with pytest.raises(SpecError, match="of its own"):
        attach(model, {}, {CallSite("", "add", 0): CallPoint(output=ACTIVATION)})


@pytest.mark.cuda
def test_a_pass_on_the_gpu_is_that_on_the_cpu() -> None:
    model = quantized(made(Residual)).double()
    expected = model(images().double())
    found = model.cuda()(images().double().cuda())
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)
