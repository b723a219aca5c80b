"""`cctool quantize --method intN`: what comes out computes with integers, and is as small as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cctool
from cctool.base.errors import QuantizationError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint, save
from cctool.operations.keep.quantized_weights import as_stored
from cctool.operations.prune import run as prune
from cctool.operations.quantize import run as quantize
from cctool.operations.registries import tables
from cctool.operations.train import run as train
from cctool.options.common import DataOptions
from cctool.options.prune.choices import PruneMethod
from cctool.options.prune.options import PruneOptions
from cctool.options.quantize.choices import Edges, Observer, QuantizeMethod
from cctool.options.quantize.parts import LayerBits
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import TrainOptions
from cctool.quantization.encodings.intn import integers_of
from cctool.quantization.network.attach import quantizers_of
from procedure_toys import Listening, context, digits
from quantized_toys import DATA, network, options, outcome, quantized, report


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(3))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.weight": module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


@pytest.mark.parametrize(("reduce", "top", "bits"), [(None, 63, 7), (True, 63, 7), (False, 127, 8)])
def test_weights_lie_on_the_grid_that_numpy_finds(reduce: bool | None, top: int, bits: int) -> None:
    before = network()
    floats = {name: value.clone() for name, value in weights_of(before.model).items()}
    found = quantized(before, reduce_range=reduce)
    for name, weight in floats.items():
        rows = weight.numpy().reshape(len(weight), -1).astype(np.float64)
        scale = (np.abs(rows).max(1, keepdims=True) / top).astype(np.float32)
        integers = np.clip(np.rint(rows.astype(np.float32) / scale), -top, top)
        stored = integers_of(found.stored[name])
        assert np.array_equal(stored.integers.numpy().reshape(rows.shape), integers)
        np.testing.assert_allclose(stored.scale.numpy(), scale[:, 0], rtol=1e-6)
        assert torch.equal(found.model.get_parameter(name).detach(), found_values(integers, scale, weight))
        assert found.stored[name].parameters["bits"] == bits


def found_values(integers: Any, scale: Any, weight: Tensor) -> Tensor:
    return torch.from_numpy((integers.astype(np.float32) * scale).astype(np.float32)).view(weight.shape)


def test_a_file_needs_neither_data_nor_code_and_computes_the_same(tmp_path: Path) -> None:
    found = outcome(network())
    save(found.checkpoint, tmp_path / "q.pt", tables())
    loaded = cctool.load(tmp_path / "q.pt")
    with torch.no_grad():
        assert torch.equal(loaded.model(images()), found.checkpoint.model.eval()(images()))
        plain = network().model(images())
    assert not torch.equal(loaded.model(images()), plain)
    assert float((loaded.model(images()) - plain).detach().abs().max()) < 0.1 * float(plain.abs().max())
    assert loaded.spec.edits
    assert {form.encoding for form in loaded.stored.values()} == {"intn"}


def test_the_command_changes_nothing_of_what_came_in() -> None:
    before = network()
    state = {name: value.clone() for name, value in before.model.state_dict().items()}
    quantized(before)
    assert quantizers_of(before.model) is None
    assert all(torch.equal(value, state[name]) for name, value in before.model.state_dict().items())


CHANGES: dict[str, dict[str, Any]] = {
    "bits": {"weight_bits": 4},
    "activation bits": {"activation_bits": 4},
    "weight only": {"weight_only": True},
    "per tensor": {"per_channel": False},
    "asymmetric": {"asymmetric": True},
    "edges": {"weight_bits": 4, "edges": Edges.SAME},
    "float edges": {"edges": Edges.FLOAT},
    "layers": {"layers": (LayerBits("fc", 4),)},
    "exclude": {"exclude": ("cnn.1.*",)},
    "include": {"include": ("cnn.1.*",)},
    "images": {"images": 4},
    "percentile": {"observer": Observer.PERCENTILE, "percentile": 90.0},
    "mse": {"observer": Observer.MSE, "activation_bits": 4},
    "entropy": {"observer": Observer.ENTROPY},
    "aciq": {"observer": Observer.ACIQ_LAPLACE, "activation_bits": 2},
    "gauss": {"observer": Observer.ACIQ_GAUSS, "activation_bits": 3},
    "average": {"observer": Observer.MOVING_AVERAGE, "images": 28},
    "n-std": {"observer": Observer.N_STD, "deviations": 1.0},
    "symmetric": {"symmetric": True},
    "full range": {"reduce_range": False},
    "bias": {"bias_correction": True, "weight_bits": 3},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_what_the_network_computes(name: str) -> None:
    beside = {"weight_bits", "activation_bits", "images"} - {name.replace(" ", "_"), "weight_" + name}
    base = {key: value for key, value in CHANGES[name].items() if key in beside}
    plain, changed = quantized(network(), **base), quantized(network(), **CHANGES[name])
    with torch.no_grad():
        assert not torch.equal(plain.model.eval()(images()), changed.model.eval()(images()))


def test_percentile_and_deviations_say_how_much_is_cut_off() -> None:
    def ends(**given: Any) -> float:
        return max(item.high for item in report(network(), **given).activations)

    assert ends(observer=Observer.PERCENTILE, percentile=80.0) < ends(
        observer=Observer.PERCENTILE, percentile=99.0
    )
    assert ends(observer=Observer.N_STD, deviations=1.0) < ends(observer=Observer.N_STD, deviations=2.0)
    clipped = report(network(), observer=Observer.PERCENTILE, percentile=90.0).activations
    assert max(item.clipped or 0 for item in clipped) > 5
    assert all(item.clipped == 0 for item in report(network()).activations)


def test_layers_are_named_with_their_bits() -> None:
    found = report(
        network(),
        weight_bits=4,
        layers=(LayerBits("cnn.2.*", 6), LayerBits("cnn.3.0", None)),
        edges=Edges.EIGHT,
    )
    bits = {item.name: item.bits for item in found.tensors}
    # 7 of 8, unless --full-range takes all.
    assert bits["cnn.0.0.weight"] == bits["fc.weight"] == 7
    assert bits["cnn.2.0.weight"] == bits["cnn.2.3.weight"] == 6
    assert bits["cnn.1.0.weight"] == 4
    assert "cnn.3.0.weight" not in bits
    assert [item.reason for item in found.left if item.name == "cnn.3.0"] == ["--layer cnn.3.0=float"]


def test_weights_alone_leave_an_ordinary_network() -> None:
    found = quantized(network(), method=QuantizeMethod.INT4)
    assert quantizers_of(found.model) is None
    assert not found.spec.edits
    assert {form.parameters["bits"] for form in found.stored.values()} == {4}
    assert len(found.stored) == len(weights_of(found.model))


def test_fewer_bits_have_the_scale_of_least_error() -> None:
    before = network()
    found = quantized(before, method=QuantizeMethod.INT3)
    for name, weight in weights_of(before.model).items():
        rows = weight.flatten(1)
        scale = rows.abs().amax(1, keepdim=True) / 3
        widest = (torch.round(rows / scale) * scale - rows).square().sum()
        ours = (found.model.get_parameter(name).detach().flatten(1) - rows).square().sum()
        assert float(ours) <= float(widest) * (1 + 1e-5)


def test_without_images_activations_cannot_be_quantized() -> None:
    with pytest.raises(UsageError, match="name a data set with --data"):
        list(quantize.run(network(), options(data=DataOptions()), context()))
    assert quantized(network(), method=QuantizeMethod.INT4, data=DataOptions()).stored


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="matches no layer"):
        quantized(network(), exclude=("nothing.*",))
    with pytest.raises(QuantizationError, match="nothing is left to quantize: --exclude"):
        quantized(network(), exclude=("*",))


def test_a_cut_takes_integers_and_scales_along_and_finds_ranges_again() -> None:
    first = quantized(network())
    scales = {name: integers_of(form).scale for name, form in first.stored.items()}
    where = context()
    cut = PruneOptions(method=PruneMethod.L1, rate=0.5, round_to=1, data=DATA)
    (found,) = prune.run(first, cut, where)
    product = as_stored(found.checkpoint, where.tables)
    held = quantizers_of(product.model)
    assert held is not None
    narrower = 0
    for name, form in product.stored.items():
        kept = integers_of(form)
        assert set(kept.scale.tolist()) <= set(scales[name].tolist())
        assert held.state.weights[name].channels == len(kept.scale)
        narrower += len(kept.scale) < len(scales[name])
    assert narrower > 5
    assert isinstance(where.reporter, Listening)
    assert any("found again on" in text for text in where.reporter.said)


def test_a_cut_without_images_says_that_ranges_are_old() -> None:
    first, where = quantized(network()), context()
    spec = first.spec.model_copy(update={"data": None})
    options_ = PruneOptions(method=PruneMethod.L1, rate=0.3, round_to=1, data=DataOptions())
    (found,) = prune.run(replace(first, spec=spec), options_, where)
    assert any("stay those of the weights before: no training images" in note for note in found.notes)


def test_a_quantized_network_trains_on_and_is_stored_in_integers_again(tmp_path: Path) -> None:
    first = quantized(network())
    where = replace(context(), output=tmp_path / "t.pt")
    (found,) = train.run(first, TrainOptions(fit=FitOptions(epochs=1, lr=0.05), data=DATA), where)
    product = as_stored(found.checkpoint, where.tables)
    assert {form.encoding for form in product.stored.values()} == {"intn"}
    changed = [
        name
        for name, form in product.stored.items()
        if not torch.equal(integers_of(form).integers, integers_of(first.stored[name]).integers)
    ]
    assert len(changed) > 5
    held = quantizers_of(product.model)
    assert held is not None
    assert held.state.fingerprint
    with torch.no_grad():
        save(product, tmp_path / "p.pt", tables())
        assert torch.equal(cctool.load(tmp_path / "p.pt").model(images()), product.model.eval()(images()))


def test_quantizing_again_replaces_the_quantizers() -> None:
    first = quantized(network())
    again = outcome(first, weight_bits=4, edges=Edges.SAME)
    held = quantizers_of(again.checkpoint.model)
    assert held is not None
    assert {point.config.bits for point in held.state.weights.values()} == {4}
    assert any("were taken off" in note for note in again.notes)
    alone = quantized(first, method=QuantizeMethod.UINT8)
    assert quantizers_of(alone.model) is not None


def test_lenet_without_batch_norm_and_a_single_image() -> None:
    found = outcome(network("lenet"), images=1)
    assert found.report.calibrated_on == 1
    assert found.report.metrics_after[-1].n == 32


def constant(checkpoint: Checkpoint) -> Checkpoint:
    with torch.no_grad():
        for parameter in checkpoint.model.parameters():
            parameter.fill_(0.25)
    return checkpoint


def dead(checkpoint: Checkpoint) -> Checkpoint:
    """All activations behind the first batch norm are zero, and so is one channel of each weight."""
    with torch.no_grad():
        for name, parameter in checkpoint.model.named_parameters():
            if name.startswith("cnn.0"):
                parameter.zero_()
            elif parameter.dim() > 1:
                parameter[0].zero_()
    return checkpoint


@pytest.mark.parametrize("change", [constant, dead])
@pytest.mark.parametrize("given", [{}, {"per_channel": False}, {"asymmetric": True}, {"weight_bits": 2}])
def test_constant_tensors_and_dead_activations(change: Any, given: dict[str, Any]) -> None:
    before = change(network())
    expected = before.model(images()).detach()
    found = quantized(before, **given)
    with torch.no_grad():
        output = found.model.eval()(images())
    assert bool(torch.isfinite(output).all())
    if change is dead:
        assert torch.equal(output.argmax(1), expected.argmax(1))


def test_infinite_pixels_are_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from cctool.operations.quantize import calibrated as quantize_integer

    original = quantize_integer.calibration_images

    class Broken:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __iter__(self) -> Any:
            for batch in self.inner:
                batch = batch.clone()
                batch[0, 0, 0, 0], batch[0, 0, 0, 1] = float("inf"), float("nan")
                yield batch

    def broken(*args: Any) -> Any:
        images_, used = original(*args)
        return Broken(images_), used

    monkeypatch.setattr(quantize_integer, "calibration_images", broken)
    where = context()
    found = outcome(network(), where)
    assert next(item for item in found.report.activations if item.name == "input").nonfinite == 2
    assert isinstance(where.reporter, Listening)
    assert any("infinities or NaN were left out" in text for text in where.reporter.said)
    assert all(np.isfinite([item.low, item.high]).all() for item in found.report.activations)


def test_ranges_are_those_of_the_training_images_that_were_asked_for() -> None:
    found = report(network(), images=8)
    assert found.calibrated_on == 8
    split = digits(DATA.limit or 0).split("train")
    assert split.images is not None
    first = next(item for item in found.activations if item.name == "input")
    assert first.low >= (0 - 0.5) / 0.5 - 0.01
    assert first.high <= (1 - 0.5) / 0.5 + 0.01


def test_the_range_is_reduced_beside_activations_only_and_both_are_said() -> None:
    assert any("use 7, because" in note for note in report(network()).notes)
    for given in ({"reduce_range": False}, {"reduce_range": True}, {"weight_only": True}):
        assert not any("use 7, because" in note for note in report(network(), **given).notes)
    stored = quantized(network(), weight_only=True).stored
    assert {form.parameters["bits"] for form in stored.values()} == {8}
    lsq = report(network("lenet"), method=QuantizeMethod.LSQ, weight_bits=8, epochs=0)
    assert {item.bits for item in lsq.tensors} == {7}


@pytest.mark.parametrize("reduce", [True, False])
def test_ranges_of_eight_bits_are_no_choice_of_fewer(reduce: bool) -> None:
    with pytest.raises(UsageError, match="--full-range are for weights of 8 bits"):
        options(method=QuantizeMethod.INT4, reduce_range=reduce)
