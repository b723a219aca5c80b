from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn

from cctool.base.errors import QuantizationError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.data.registry import open_data
from cctool.operations.data import measured
from cctool.operations.judge.size import stored_bytes
from cctool.operations.keep.calibrate import calibration_images
from cctool.operations.keep.events import stored as as_stored
from cctool.operations.quantize import run as quantize
from cctool.operations.quantize.plan import plan
from cctool.operations.quantize.prepare import attached
from cctool.operations.quantize.sensitivity import searched_bits
from cctool.options.quantize.choices import Edges, QuantizeMethod, Rounding
from cctool.options.quantize.options import QuantizeOptions
from cctool.options.quantize.parts import CalibrationOptions, LayerBits
from cctool.options.target import Quantity, Target
from cctool.quantization.network.attach import detach, only, quantizers_of
from cctool.tasks.table import task_named
from procedure_toys import DIGITS, Listening, context, digits, plain_network

DATA = replace(DIGITS, limit=48)


@pytest.fixture(scope="module")
def trained():
    model = plain_network()
    split = digits(200).loaders["train"]()
    x, y = (split.images.float() / 255 - 0.5) / 0.5, split.labels
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    torch.manual_seed(0)
    for _ in range(40):
        some = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[some]), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def checkpoint(trained):
    spec = ModelSpec(
        architecture="toy", input_shape=(1, 32, 32), preprocessing=Preprocessing(mean=(0.5,), std=(0.5,))
    )
    return Checkpoint(trained, spec)


def _options(**given):
    return QuantizeOptions(
        **{
            "method": QuantizeMethod.INT8,
            "weight_only": True,
            "calibration": CalibrationOptions(images=32),
            "data": DATA,
        }
        | given
    )


def _source(limit=48):
    return open_data("digits", input_shape=(1, 32, 32), limit=limit)


def _target(value, **given):
    return _options(target=Target(Quantity.BYTES, value), **given)


def _bytes(checkpoint, options, bits):
    trial = replace(checkpoint, model=plain_network())
    trial.model.load_state_dict(checkpoint.model.state_dict())
    trial = as_stored(attached(trial, plan(trial, options, bits)), context().tables)
    detach(trial.model)
    return stored_bytes(trial)


@pytest.mark.parametrize("share", [0.3, 0.4])
def test_a_target_is_met_and_less_would_not_have_to_go(checkpoint, share):
    options = _target(share)
    bits, sensitivity, notes = searched_bits(checkpoint, options, _source(), context())
    limit = share * stored_bytes(checkpoint)
    assert _bytes(checkpoint, options, bits) <= limit
    assert set(bits) == {"0.weight", "3.weight", "8.weight"}
    damage = {(row.layer, row.bits): row.damage for row in sensitivity}
    total = sum(damage[layer, chosen] for layer, chosen in bits.items())
    for layer in bits:
        for more in (b for b in (2, 4, 8) if b > bits[layer]):
            if damage[layer, more] < damage[layer, bits[layer]]:
                assert _bytes(checkpoint, options, bits | {layer: more}) > limit
    assert total < sum(damage[layer, 2] for layer in bits)
    assert any(f"{int(limit):,} bytes" in note for note in notes)


def test_the_table_holds_damages_of_single_layers_and_bytes_as_files_store_them(checkpoint):
    options = _target(0.4)
    _, sensitivity, _ = searched_bits(checkpoint, options, _source(), context())
    rows = {(row.layer, row.bits): row for row in sensitivity}
    assert len(rows) == 9
    assert rows["3.weight", 4].bytes == 12 * 8 * 9 // 2 + 12 * 4
    trial = replace(checkpoint, model=plain_network())
    trial.model.load_state_dict(checkpoint.model.state_dict())
    trial.model.eval()
    trial = attached(trial, plan(trial, options, {"3.weight": 2}))
    images = torch.cat(list(calibration_images(checkpoint, _source(), 32, DATA, context())[0]))
    with torch.no_grad():
        wanted = checkpoint.model(images).double().numpy()
        with only(trial.model, {"3/weight"}):
            found = trial.model(images).double().numpy()
    p, q = log_softmax(wanted, 1), log_softmax(found, 1)
    expected = (np.exp(p) * (p - q)).sum(1).mean()
    assert rows["3.weight", 2].damage == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01


def test_bytes_that_nothing_to_choose_takes_are_named(checkpoint):
    with pytest.raises(
        QuantizationError, match=r"bytes=0\.01: 51 of .* cannot be reached.* everything else 376"
    ):
        searched_bits(checkpoint, _target(0.01), _source(), context())


def test_bits_are_not_chosen_by_damages_that_are_no_numbers(checkpoint):
    spoilt = replace(checkpoint, model=plain_network())
    spoilt.model.load_state_dict(checkpoint.model.state_dict())
    with torch.no_grad():
        spoilt.model.get_submodule("8").bias[0] = float("nan")
    for asked in (_target(0.01), _target(0.4)):
        with pytest.raises(QuantizationError, match="puts out NaN or infinities already before"):
            searched_bits(spoilt, asked, _source(), context())


def test_the_network_that_is_searched_stays_as_it_is(checkpoint):
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    searched_bits(checkpoint, _target(0.4), _source(), context())
    assert quantizers_of(checkpoint.model) is None
    assert all(torch.equal(value, before[name]) for name, value in checkpoint.model.state_dict().items())


@pytest.mark.parametrize("activations", [False, True])
def test_the_chosen_bits_lose_no_more_than_allowed_on_the_validation_split(checkpoint, activations):
    source, found = _source(200), {}
    for points in (1.0, 30.0):
        options = _options(
            max_drop=points,
            weight_only=not activations,
            edges=Edges.SAME,
            data=replace(DATA, limit=200),
        )
        bits, _, notes = searched_bits(checkpoint, options, source, context())
        found[points] = bits
        assert "validation" in notes[-1]
        if not activations:
            trial = replace(checkpoint, model=plain_network())
            trial.model.load_state_dict(checkpoint.model.state_dict())
            trial.model.eval()
            before = measured(trial, source, options.data, context(), split="validation").values["top1"]
            trial = attached(trial, plan(trial, options, bits))
            after = measured(trial, source, options.data, context(), split="validation").values["top1"]
            assert before - after <= points
    assert sum(found[30.0].values()) < sum(found[1.0].values())


def test_choices_are_those_that_are_given(checkpoint):
    bits, sensitivity, _ = searched_bits(checkpoint, _target(0.4, choices=(3, 5, 6)), _source(), context())
    assert {row.bits for row in sensitivity} == {3, 5, 6}
    assert set(bits.values()) <= {3, 5, 6}
    assert {row.layer: row.bits for row in sensitivity if row.chosen} == bits


def test_layers_whose_bits_are_given_keep_them(checkpoint):
    options = _target(0.5, layers=(LayerBits("3", 6),))
    bits, _, _ = searched_bits(checkpoint, options, _source(), context())
    assert set(bits) == {"0.weight", "8.weight"}
    edges = _target(0.9, weight_only=False)
    assert set(searched_bits(checkpoint, edges, _source(), context())[0]) == {"3.weight"}
    with pytest.raises(QuantizationError, match="no layer whose bits"):
        searched_bits(checkpoint, _target(0.5, layers=(LayerBits("*", 6),)), _source(), context())


def test_goals_that_cannot_be_reached_are_refused(checkpoint):
    with pytest.raises(QuantizationError, match="fewest bits"):
        searched_bits(checkpoint, _target(0.05), _source(), context())
    options = _options(max_drop=0.1, choices=(2,), data=replace(DATA, limit=200))
    with pytest.raises(QuantizationError, match="least damage"):
        searched_bits(checkpoint, options, _source(200), context())
    with pytest.raises(UsageError, match="--data"):
        searched_bits(checkpoint, _target(0.4), None, context())


def test_outputs_that_are_not_finite_are_infinitely_far_and_scores_are_compared_by_squares():
    def damage(found, wanted):
        return task_named("classification").divergence([torch.tensor(found)], [wanted])

    wanted = torch.tensor([[1.0, 2.0]])
    assert damage([[1.0, float("nan")]], wanted) == float("inf")
    assert damage([[3.0], [4.0]], torch.tensor([[2.0], [4.0]])) == pytest.approx(1 / 20)
    assert damage((wanted + 5).tolist(), wanted) == pytest.approx(0, abs=1e-12)


def test_a_whole_run_with_every_correction_keeps_the_target(checkpoint):
    options = _target(
        0.4,
        rounding=Rounding.ADAROUND,
        rounding_steps=20,
        calibration=CalibrationOptions(images=32, equalize=True, bias_correction=True),
    )
    where = context()
    assert isinstance(where.reporter, Listening)
    (outcome,) = quantize.run(checkpoint, options, where)
    assert outcome.report.bytes_after <= 0.4 * stored_bytes(checkpoint)
    assert {row.bits for row in outcome.report.sensitivity if row.chosen} != {2}
    assert any("equalized" in note for note in outcome.notes)
    assert any("rounding was learnt" in note for note in outcome.notes)
    assert any("biases of 3 layers" in note for note in outcome.notes)
