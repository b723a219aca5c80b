"""Codecs are calibrated again, accepted or reported when the weights around them change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations.context import Context
from cctool.operations.inspect import evaluate
from cctool.operations.keep.codecs import recalibrated_taps, trained_taps
from cctool.operations.prune import run as prune
from cctool.operations.quantize import run as quantize
from cctool.operations.train import run as train
from cctool.operations.transform import run as transform
from cctool.options.common import DataOptions
from cctool.options.inspect.evaluate import EvaluateOptions
from cctool.options.prune.choices import PruneMethod
from cctool.options.prune.options import PruneOptions
from cctool.options.quantize.options import QuantizeOptions
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import TrainOptions
from cctool.options.transform.options import TransformOptions
from cctool.transforms.codec.taps import stale_taps, taps_of
from option_toys import asked
from procedure_toys import Listening, context
from swapped_toys import network
from transformed_toys import DATA, energy, source, tapped

TAP = "features.3"


def coded() -> Checkpoint:
    return tapped(network("lenet"), TAP)


def scaled(checkpoint: Checkpoint, factor: float) -> Checkpoint:
    """The same network whose tapped maps are so many times as large."""
    with torch.no_grad():
        for leaf in ("weight", "bias"):
            checkpoint.model.get_parameter(f"{TAP}.{leaf}").mul_(factor)
    return checkpoint


def said(where: Context) -> str:
    assert isinstance(where.reporter, Listening)
    return "\n".join(where.reporter.said)


def bounds(checkpoint: Checkpoint) -> list[float]:
    return checkpoint.model.get_submodule(TAP).get_buffer("tap_range").tolist()


def test_ranges_follow_the_weights_where_there_are_images() -> None:
    checkpoint = coded()
    low, high = bounds(checkpoint)
    scaled(checkpoint, 2.0)
    assert stale_taps(checkpoint.model) == (TAP,)
    found, notes = recalibrated_taps(checkpoint, source(), DATA, context())
    assert bounds(found) == pytest.approx([2 * low, 2 * high], rel=1e-5)
    assert notes == ("1 codecs were calibrated again on 16 training images",)
    assert stale_taps(found.model) == ()
    assert recalibrated_taps(found, None, DATA, context()) == (found, ())


@pytest.mark.parametrize("unknown", [False, True])
def test_without_images_that_can_be_used_taps_stay_with_a_warning(unknown: bool) -> None:
    checkpoint, where = scaled(coded(), 2.0), context()
    before = bounds(checkpoint)
    if unknown:
        spec = checkpoint.spec.model_copy(update={"preprocessing": None})
        checkpoint = replace(checkpoint, spec=spec)
    found, notes = recalibrated_taps(checkpoint, source() if unknown else None, DATA, where)
    assert bounds(found) == before
    assert len(notes) == 1
    assert ("the preprocessing is unknown" if unknown else "no training images") in said(where)
    assert stale_taps(found.model) == (TAP,)


@pytest.mark.parametrize(("factor", "accepted"), [(1.0, True), (0.5, True), (3.0, False)])
def test_after_a_training_ranges_stay_unless_maps_outgrew_them(factor: float, accepted: bool) -> None:
    checkpoint, where = coded(), context()
    before = bounds(checkpoint)
    with torch.no_grad():
        checkpoint.model.get_parameter("classifier.2.bias").add_(0.1)
    found, notes = trained_taps(scaled(checkpoint, factor), source(), DATA, where)
    assert bounds(found) == before
    assert (stale_taps(found.model) == ()) == accepted
    assert (found.spec.edits[0]["fingerprint"] == taps_of(found.model)[TAP].fingerprint) is True
    assert (notes == ()) == accepted
    if not accepted:
        assert "% of its values saturate; they reach from" in said(where)


def command(verb: str, checkpoint: Checkpoint, where: Context, tmp_path: Any) -> Any:
    if verb == "prune":
        options: Any = PruneOptions(method=PruneMethod.L1, rate=0.3, data=DATA)
        return next(prune.run(checkpoint, options, where))
    if verb == "quantize":
        return next(quantize.run(checkpoint, QuantizeOptions(data=DATA), where))
    if verb == "transform":
        options = asked(TransformOptions, data=DATA, keep=0.5, layers=(TAP,))
        return next(transform.run(checkpoint, options, where))
    options = TrainOptions(fit=FitOptions(epochs=1, lr=1e-6), data=DATA)
    return next(train.run(checkpoint, options, replace(where, output=tmp_path / "out.pt")))


@pytest.mark.parametrize("verb", ["prune", "quantize", "train", "transform"])
def test_each_command_leaves_codecs_in_step(verb: str, tmp_path: Any) -> None:
    checkpoint = coded()
    before = taps_of(checkpoint.model)[TAP].fingerprint
    outcome = command(verb, checkpoint, context(), tmp_path)
    after = taps_of(outcome.checkpoint.model)[TAP]
    assert after.fingerprint != before
    assert stale_taps(outcome.checkpoint.model) == ()
    edit = next(edit for edit in outcome.checkpoint.spec.edits if edit["kind"] == "tap")
    assert edit["fingerprint"] == after.fingerprint
    again = any("calibrated again" in note for note in outcome.notes)
    assert again == (verb != "train")


def test_codecs_of_coefficient_layers_stay_on_them() -> None:
    checkpoint = tapped(energy(network("lenet")), TAP)
    outcome = command("prune", checkpoint, context(), None)
    assert list(taps_of(outcome.checkpoint.model)) == [TAP]
    assert outcome.checkpoint.model.get_submodule(TAP).out_channels == 12


def test_evaluate_warns_of_codecs_out_of_step() -> None:
    where = context()
    options = EvaluateOptions(data=DataOptions(data="digits", limit=16))
    evaluate.run(coded(), options, where)
    assert "other weights" not in said(where)
    evaluate.run(scaled(coded(), 1.5), options, where)
    assert f"{TAP}: calibrated for other weights than the network has now" in said(where)
