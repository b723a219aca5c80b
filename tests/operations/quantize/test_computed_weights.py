"""`cctool quantize` of layers whose weight is no parameter: computed on the way to the call, or a buffer."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from cctool.base.errors import QuantizationError
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.operations import pipeline
from cctool.operations.inspect.export import run as export
from cctool.operations.keep import events
from cctool.operations.quantize.report import QuantizeReport
from cctool.operations.registries import tables
from cctool.options.common import ModelOptions, RuntimeOptions
from cctool.options.inspect.export import ExportOptions
from cctool.options.quantize.choices import Edges, QuantizeMethod, Rounding
from cctool.options.target import Quantity, Target
from cctool.quantization.calibration.weight_ranges import balanced_range
from cctool.quantization.network.attach import fold_of, quantizers_of, taken_weights
from cctool.quantization.network.points import weight_key
from cctool.quantization.quantizers.config import QuantizerConfig
from computed_toys import DATA, FIXED, VARYING, architecture, digit_images, network, signal_to_noise
from procedure_toys import context, digits
from quantized_toys import outcome

ENOUGH = 18.0
"""Decibels that 8 bits keep of every network here; wrong ranges leave less than 5."""


def quantized(name: str, **given: Any) -> tuple[Checkpoint, QuantizeReport, Checkpoint]:
    """The float network, the report, and the quantized one."""
    floats = network(name)
    found = outcome(floats, context(arch=architecture(name)), **{"data": DATA, "images": 64} | given)
    return floats, found.report, found.checkpoint


def outputs(checkpoint: Checkpoint, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = checkpoint.model.eval()(images)
    return found


@pytest.mark.parametrize("name", FIXED)
def test_what_calls_take_is_rounded_and_the_file_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    floats, report, found = quantized(name)
    images = digit_images(floats)
    wanted, made = outputs(floats, images), outputs(found, images)
    assert signal_to_noise(wanted, made) > ENOUGH
    assert not report.left
    computed = [item for item in report.tensors if item.encoding.endswith("at the call")]
    assert computed
    assert all(item.bits == 7 for item in computed)
    # In this one the parameter is a weight itself, too, and stored as integers.
    assert name == "both_ways" or all(item.bytes_after == item.bytes_before for item in computed)
    assert name == "both_ways" or any("in floating point" in note for note in report.notes)
    save(found, tmp_path / "a.pt", tables())
    again = load(tmp_path / "a.pt", tables(frozenset({architecture(name)})))
    assert torch.equal(outputs(again, images), made)


@pytest.mark.parametrize("name", VARYING)
def test_a_weight_that_varies_stays_in_floats_and_is_named(name: str) -> None:
    floats, report, found = quantized(name)
    left = report.left[0]
    assert left.name == "2"
    # Of two parameters, each pass takes one.
    assert len(report.left) == 1 or name == "parameter_by_batch"
    assert left.reason == {
        "routed": "its weight is computed from the network's input",
        "per_sample": "the shape of its weight depends on the batch",
        "by_batch": "its weight depends on the batch",
        "parameter_by_batch": "which weight it takes depends on the batch",
    }.get(name, "its weight differs from pass to pass")
    held = quantizers_of(found.model)
    assert held is not None
    assert all(point.weight is None for place, point in held.state.calls.items() if place.module == "2")
    if name in ("routed", "per_sample"):
        images = digit_images(floats)
        assert signal_to_noise(outputs(floats, images), outputs(found, images)) > ENOUGH


@pytest.mark.parametrize("method", [QuantizeMethod.QAT, QuantizeMethod.LSQ])
def test_training_goes_on_beside_a_weight_whose_shape_depends_on_the_batch(method: QuantizeMethod) -> None:
    floats, report, found = quantized("per_sample", method=method, epochs=1)
    assert ("2", "the shape of its weight depends on the batch") in {(x.name, x.reason) for x in report.left}
    assert outputs(found, digit_images(floats, 5)).shape == (5, 10)


def test_slices_have_a_quantizer_each_and_a_parameter_used_both_ways_two() -> None:
    _, report, _ = quantized("sliced")
    assert {item.name for item in report.tensors if "conv2d" in item.name} == {
        "2.conv2d#0:weight",
        "2.conv2d#1:weight",
        "2.conv2d#2:weight",
    }
    _, report, found = quantized("both_ways")
    assert {"2.weight", "2.conv2d#1:weight"} < {item.name for item in report.tensors}
    held = quantizers_of(found.model)
    assert held is not None
    own, computed = (held.quantizer(weight_key(name)) for name in ("2.weight", "2.conv2d#1:weight"))
    assert own is not None
    assert computed is not None
    ratio = own.get_buffer("scale") / computed.get_buffer("scale")
    assert bool(((ratio > 700) & (ratio < 1100)).all())


def test_a_parameter_in_another_shape_is_stored_as_integers() -> None:
    floats, _, found = quantized("viewed")
    images = digit_images(floats)
    assert found.stored["2.0.weight"].encoding == "intn"
    assert signal_to_noise(outputs(floats, images), outputs(found, images)) > ENOUGH


@pytest.mark.parametrize(
    "name", ["centred", "weight_norm", "old_spectral_norm", "summed", "sliced", "viewed"]
)
def test_exports_hold_integers_of_the_computed_weight(name: str, tmp_path: Path) -> None:
    floats, _, found = quantized(name)
    source = tmp_path / "a.pt"
    save(found, source, tables())
    request = pipeline.Request(
        verb="export",
        source=str(source),
        model=ModelOptions(arch=architecture(name)),
        runtime=RuntimeOptions(device="cpu"),
    )
    (file,) = pipeline.read(export, ExportOptions(), request).files
    document = onnx.load(file.path)
    integers = {
        item.name: item
        for item in document.graph.initializer
        if item.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    }
    makers = {output: node for node in document.graph.node for output in node.output}
    layers = [node for node in document.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(layers) == {"sliced": 5}.get(name, 3)
    for node in layers:
        assert makers[node.input[1]].op_type == "DequantizeLinear"
        assert makers[node.input[1]].input[0] in integers
    session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    images, given = digit_images(floats), session.get_inputs()[0].name
    got = [session.run(None, {given: image.numpy()})[0] for image in images.split(1)]
    assert signal_to_noise(outputs(floats, images), torch.from_numpy(np.concatenate(got))) > ENOUGH


@pytest.mark.parametrize("method", ["qat", "lsq", "pact", "dorefa", "wrpn"])
def test_training_runs_through_the_quantizers_of_computed_weights(method: str) -> None:
    floats, report, found = quantized("weight_norm", method=QuantizeMethod(method), epochs=1)
    assert {"2.conv2d#0:weight", "5.linear#0:weight"} < {item.name for item in report.tensors}
    before, after = dict(floats.model.named_parameters()), dict(found.model.named_parameters())
    for name in ("2.parametrizations.weight.original1", "5.parametrizations.weight.original0"):
        assert not torch.equal(before[name], after[name])
    held = quantizers_of(found.model)
    assert held is not None
    taken = taken_weights(found.model, (digit_images(floats, 2),))
    for name in ("2.conv2d#0:weight", "5.linear#0:weight"):
        quantizer = held.quantizer(weight_key(name))
        assert quantizer is not None
        with torch.no_grad():
            made = quantizer(taken[name], fold_of(found.model, held.state.weights[name]))
        assert len(made.unique()) > 2


def test_a_layer_that_training_computes_otherwise_stays_in_floats() -> None:
    _, report, _ = quantized("fused", method=QuantizeMethod.QAT, epochs=0)
    assert ("2", "in training another computation takes its place") in {
        (x.name, x.reason) for x in report.left
    }
    _, report, _ = quantized("fused")
    assert "2.conv2d#0:weight" in {item.name for item in report.tensors}


def test_adaround_leaves_computed_weights_at_the_nearest_levels() -> None:
    for method in (QuantizeMethod.INT4, QuantizeMethod.INT8):
        given: dict[str, Any] = {"method": method, "rounding_steps": 50}
        _, _, nearest = quantized("centred", **given)
        _, report, learnt = quantized("centred", rounding=Rounding.ADAROUND, **given)
        assert "rounding not learnt: 2: its weight is computed" in report.notes
        assert torch.equal(learnt.model.get_parameter("2.weight"), nearest.model.get_parameter("2.weight"))


@pytest.mark.parametrize("rounding", list(Rounding))
def test_weights_alone_are_rounded_as_parameters(rounding: Rounding) -> None:
    given: dict[str, Any] = {"method": QuantizeMethod.INT8, "weight_only": True, "rounding_steps": 50}
    floats, _, found = quantized("centred", rounding=rounding, **given)
    assert quantizers_of(found.model) is None
    assert found.stored["2.weight"].encoding == "intn"
    images = digit_images(floats)
    assert signal_to_noise(outputs(floats, images), outputs(found, images)) > 30


def test_ranges_follow_what_weights_are_computed_from() -> None:
    _, _, found = quantized("gained")
    held = quantizers_of(found.model)
    assert held is not None
    quantizer = held.quantizer(weight_key("5.linear#0:weight"))
    assert quantizer is not None
    before = quantizer.get_buffer("scale").clone()
    with torch.no_grad():
        found.model.get_parameter("5.weight").mul_(4)
    found, _ = events.changed(found, digits(128), DATA, context())
    torch.testing.assert_close(quantizer.get_buffer("scale"), 4 * before)


def test_activations_that_no_image_reaches_have_no_quantizer() -> None:
    _, report, found = quantized("by_count", data=replace(DATA, batch_size=16))
    assert any("no calibration image reached relu" in item.reason for item in report.left)
    pair = digit_images(found, 2)
    assert float(outputs(found, pair).var(0).mean()) > 0


def test_balanced_ranges_are_the_best_of_those_tried() -> None:
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight -= weight.mean((1, 2, 3), keepdim=True)
    config = QuantizerConfig(method="uniform", bits=8, narrow=True, axis=0, reduce_range=True)
    low, high = balanced_range(weight, config)
    for row, least, most in zip(weight.double().numpy().reshape(5, -1), low, high, strict=True):

        def error(factor: float, row: Any = row) -> float:
            scale = abs(row).max() * factor / 63
            rest = np.clip(np.rint(row / scale), -63, 63) * scale - row
            return float((rest**2).sum() + rest.sum() ** 2)

        best = min(error(1 + step / 96) for step in range(33))
        chosen = max(-float(least), float(most)) / float(abs(row).max())
        assert 1 <= chosen <= 4 / 3 + 1e-6
        assert error(chosen) <= best * 1.001
        assert error(chosen) < error(1.0) or best == error(1.0)


def _bytes(checkpoint: Checkpoint, part: str) -> int:
    state = checkpoint.model.state_dict()
    return sum(4 * value.numel() for name, value in state.items() if part in name)


def test_the_tensors_and_bytes_that_a_generated_kernel_is_made_of_are_told() -> None:
    floats, report, _ = quantized("generated")
    (found,) = (item for item in report.tensors if item.name == "2.conv2d#0:weight")
    # The codes, and two linear layers with a bias each.
    assert found.bytes_before == found.bytes_after == _bytes(floats, "2.")
    (note,) = (note for note in report.notes if "computed on the way" in note)
    assert "1 weight is computed" in note
    assert f"keeps 5 tensors of which it is made in floating point ({_bytes(floats, '2.'):,} bytes)" in note
    assert not report.left


def test_nothing_is_claimed_of_a_kernel_that_was_made_before_the_pass() -> None:
    _, report, _ = quantized("remembering")
    (found,) = (item for item in report.tensors if item.name == "2.conv2d#0:weight")
    assert found.bytes_before is None
    assert found.bytes_after is None
    (note,) = (note for note in report.notes if "computed on the way" in note)
    assert "not known" in note
    assert "bytes" not in note
    (left,) = report.left
    assert left.name == "2.weight"
    assert "not known" in left.reason


@pytest.mark.parametrize("name", ["generated", "remembering", "sliced", "summed", "parameter_by_batch"])
def test_a_tensor_is_stored_in_few_bits_or_in_floating_point_but_not_both(name: str) -> None:
    _, report, found = quantized(name, method=QuantizeMethod.INT4)
    stored = {item.name for item in report.tensors}
    assert stored == found.stored.keys()
    assert len(stored) > 2
    assert not report.left


def test_tensors_of_few_values_stay_as_they_are_if_their_scales_would_cost_more() -> None:
    floats, report, found = quantized("weight_norm", method=QuantizeMethod.INT4)
    # A value for each channel, beside a scale for each.
    for layer in ("2", "5"):
        name = f"{layer}.parametrizations.weight.original0"
        assert name not in found.stored
        assert name in {item.name for item in report.skipped}
        assert torch.equal(found.model.get_parameter(name), floats.model.get_parameter(name))
    assert all((item.bytes_after or 0) < (item.bytes_before or 0) for item in report.tensors)
    assert "left alone: 2 tensors (it would take more bytes than its values do now)" in report.notes


def _searched(name: str, **given: Any) -> tuple[Checkpoint, QuantizeReport]:
    floats, report, _ = quantized(name, edges=Edges.SAME, **given)
    return floats, report


@pytest.mark.parametrize("name", ["centred", "weight_norm"])
def test_no_bits_are_searched_for_weights_whose_bytes_they_do_not_change(name: str) -> None:
    _, report = _searched(name, target=Target(Quantity.BYTES, 0.999))
    computed = {item.name for item in report.tensors if item.encoding.endswith("at the call")}
    assert computed
    assert not computed.intersection(item.layer for item in report.sensitivity)
    assert any("no bits were chosen for" in note for note in report.notes)


def test_a_target_out_of_reach_names_the_least_bytes_and_the_way_out() -> None:
    floats = network("weight_norm")
    with pytest.raises(QuantizationError) as caught:
        _searched("weight_norm", target=Target(Quantity.BYTES, 0.1))
    text = str(caught.value)
    assert f"{_bytes(floats, 'original'):,} bytes are what kernels are computed from (4 tensors)" in text
    assert "--weight-only" in text
    assert "`cctool transform --fold` makes 2, 5 ordinary layers" in text
    found = re.search(r"([\d,]+) bytes \(bytes=([\d.]+)\) at least", text)
    assert found is not None
    _, report = _searched("weight_norm", target=Target(Quantity.BYTES, float(found[2])))
    assert report.bytes_after == int(found[1].replace(",", ""))
    with pytest.raises(QuantizationError) as caught:
        _searched("centred", target=Target(Quantity.BYTES, 0.1))
    assert "fold" not in str(caught.value)


def test_a_target_of_weights_alone_counts_what_is_stored_in_few_bits() -> None:
    given: dict[str, Any] = {"method": QuantizeMethod.INT4, "target": Target(Quantity.BYTES, 0.4)}
    floats, report, _ = quantized("generated", **given)
    assert report.bytes_after <= 0.4 * report.bytes_before
    assert sum(4 * value.numel() for value in floats.model.state_dict().values()) == report.bytes_before


def test_where_no_rounding_can_be_learnt_none_is_said_to_be() -> None:
    given: dict[str, Any] = {"rounding": Rounding.ADAROUND, "rounding_steps": 5, "images": 16}
    _, report, _ = quantized("centred", exclude=("0", "5"), **given)
    assert "no rounding could be learnt: all weights take their nearest levels" in report.notes
