"""`cctool quantize` with training: quantizers in the loop, learnt steps, levels and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cctool
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.options.quantize.choices import Edges, QuantizeMethod
from cctool.options.teacher import TeacherOptions
from cctool.options.train.fit import DecayScope
from cctool.quantization.network.attach import detach, quantizers_of
from cctool.training.constraints.penalties import ClippingDecay
from cctool.training.optimizers import parameter_groups
from procedure_toys import context, saved
from quantized_toys import network, outcome, quantized, report
from quantizing_toys import codebook_indices

METHODS = [
    QuantizeMethod.QAT,
    QuantizeMethod.LSQ,
    QuantizeMethod.PACT,
    QuantizeMethod.DOREFA,
    QuantizeMethod.WRPN,
]


def images() -> Tensor:
    return torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(3))


def parameters(checkpoint: Checkpoint, method: str) -> list[nn.Parameter]:
    held = quantizers_of(checkpoint.model)
    assert held is not None
    return [p for _, q in held.named() if q.config.method == method for p in q.parameters()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_product_computes_the_same_after_its_way_through_a_file(
    method: QuantizeMethod, bits: int, tmp_path: Path
) -> None:
    found = outcome(network("lenet"), method=method, weight_bits=bits, activation_bits=4, epochs=1).checkpoint
    saved(found, tmp_path / "q.pt")
    loaded = cctool.load(tmp_path / "q.pt")
    with torch.no_grad():
        expected = found.model.eval()(images())
        assert torch.equal(loaded.model.eval()(images()), expected)
        detach(loaded.model)
        assert not torch.equal(loaded.model(images()), expected)
    layers = [name for name, _ in loaded.model.named_parameters() if name in loaded.stored]
    assert len(layers) == 5
    # The first and the last layer have 8 bits.
    inner = [form for name, form in loaded.stored.items() if form.encoding == "codebook"]
    assert bool(inner) == (method in (QuantizeMethod.PACT, QuantizeMethod.DOREFA))
    for form in inner:
        assert form.parts["table"].shape[-1] <= 2**bits


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_weights_and_what_is_learnt(method: QuantizeMethod) -> None:
    before = quantized(network("lenet"), method=method, epochs=0)
    after = quantized(network("lenet"), method=method, epochs=1, lr=0.05)
    weights = [(before.model.get_parameter(name), after.model.get_parameter(name)) for name in before.stored]
    assert any(not torch.equal(old, new) for old, new in weights)
    for learnt in ("lsq", "pact"):
        pairs = list(zip(parameters(before, learnt), parameters(after, learnt), strict=True))
        assert bool(pairs) == (method.value == learnt)
        assert all(not torch.equal(old, new) for old, new in pairs if old.numel() and bool(old.any()))


def test_one_bit_weights_are_plus_and_minus_the_mean() -> None:
    found = quantized(
        network("lenet"), method=QuantizeMethod.DOREFA, weight_bits=1, epochs=0, edges=Edges.SAME
    )
    for name in found.stored:
        weight = found.model.get_parameter(name).detach()
        assert len(weight.abs().unique()) == 1
    floats = network("lenet").model.features[3].weight.detach()
    stored = found.model.features[3].weight.detach()
    torch.testing.assert_close(stored.abs().max(), floats.abs().mean())
    assert torch.equal(stored.sign(), torch.where(floats >= 0, 1.0, -1.0))


CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.1},
    "epochs": {"epochs": 2},
    "optimizer": {"optimizer": "adamw"},
    "bits": {"weight_bits": 3},
    "activation bits": {"activation_bits": 3},
    "per channel": {"per_channel": True},
    "edges": {"edges": Edges.SAME},
    "weight only": {"weight_only": True},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_what_is_trained(name: str) -> None:
    common: dict[str, Any] = {"method": QuantizeMethod.LSQ, "epochs": 1, "lr": 0.05}
    plain = quantized(network("lenet"), **common)
    changed = quantized(network("lenet"), **(common | CHANGES[name]))
    with torch.no_grad():
        assert not torch.equal(plain.model.eval()(images()), changed.model.eval()(images()))


def test_a_teacher_and_frozen_statistics_change_what_is_trained(tmp_path: Path) -> None:
    teacher = saved(network(), tmp_path / "teacher.pt")
    common: dict[str, Any] = {"method": QuantizeMethod.QAT, "epochs": 1, "lr": 0.05}
    plain = quantized(network(), **common)
    taught = outcome(network(), teacher=TeacherOptions(str(teacher)), **common)
    frozen = quantized(network(), freeze_norm=True, **common)
    assert set(taught.others) == {"teacher"}
    assert not torch.equal(plain.model.fc.weight, taught.checkpoint.model.fc.weight)
    mean = network().model.cnn[0][1].running_mean
    assert torch.equal(frozen.model.cnn[0][1].running_mean, mean)
    assert not torch.equal(plain.model.cnn[0][1].running_mean, mean)


def test_the_penalty_on_clipping_levels_is_that_of_the_paper() -> None:
    levels = [nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor([2.0, 1.0]))]
    penalty = ClippingDecay(levels, 0.5).penalty()
    assert penalty is not None
    assert float(penalty.detach()) == 0.5 * (9 + 4 + 1)
    penalty.backward()
    assert levels[0].grad == 0.5 * 2 * 3
    assert ClippingDecay([], 0.5).penalty() is None
    small = quantized(network("lenet"), method=QuantizeMethod.PACT, epochs=1, alpha_decay=0.0)
    large = quantized(network("lenet"), method=QuantizeMethod.PACT, epochs=1, alpha_decay=1.0)
    pairs = zip(parameters(small, "pact"), parameters(large, "pact"), strict=True)
    assert all(float(new.detach()) < float(old.detach()) for old, new in pairs)


def test_weight_decay_leaves_learnt_steps_alone() -> None:
    found = quantized(network("lenet"), method=QuantizeMethod.LSQ, epochs=0)
    steps = {id(parameter) for parameter in parameters(found, "lsq")}
    assert steps
    for scope in DecayScope:
        groups = parameter_groups(found.model, 0.1, scope)
        undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
        assert steps <= undecayed
        everything = [id(p) for group in groups for p in group["params"]]
        assert sorted(everything) == sorted(id(p) for p in found.model.parameters())


def test_codebooks_move_and_keep_who_shares_them() -> None:
    before = outcome(network("lenet"), method=QuantizeMethod.CODEBOOK, weight_bits=3).checkpoint
    after = outcome(network("lenet"), method=QuantizeMethod.CODEBOOK, weight_bits=3, epochs=1, lr=0.05)
    for name, form in before.stored.items():
        new = after.checkpoint.stored[name]
        assert torch.equal(codebook_indices(form), codebook_indices(new))
        assert not torch.equal(form.parts["table"], new.parts["table"])


def test_without_epochs_quantizers_are_only_calibrated() -> None:
    found = report(network("lenet"), method=QuantizeMethod.QAT, epochs=0)
    assert found.calibrated_on == 16
    assert {item.bits for item in found.tensors} == {7}


def test_layers_that_no_clip_feeds_are_named() -> None:
    # The student has no activation behind its pointwise convolutions.
    found = report(network(), method=QuantizeMethod.DOREFA, epochs=0)
    assert [item.name for item in found.left if "stay float" in item.reason][:2] == ["cnn.2.0", "cnn.3.0"]


def test_two_runs_are_the_same() -> None:
    first, second = (
        outcome(network("lenet"), context(), method=QuantizeMethod.LSQ, epochs=1).checkpoint for _ in range(2)
    )
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
