"""Networks with swapped layers are cut as their plain ones are, and every command goes on with them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cctool.base.errors import PruningError
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.edits.mask import add_masks, masks_of, with_masks
from cctool.operations.context import Context
from cctool.operations.inspect import analyze
from cctool.operations.judge.size import measure, stored_bytes
from cctool.operations.keep.events import cut as carried_out
from cctool.operations.keep.events import plain_checkpoint
from cctool.operations.keep.masks import stored_with_masks
from cctool.operations.prune import run as prune
from cctool.operations.prune.masks import mask_weights
from cctool.options.common import DataOptions
from cctool.options.inspect.analyze import AnalyzeOptions
from cctool.options.prune.choices import Granularity, PruneMethod
from cctool.options.prune.options import PruneOptions
from cctool.options.target import parse_target
from cctool.pruning.cut.planner import plan_thinning
from cctool.pruning.cut.surgery import apply_cut
from procedure_toys import Listening, context
from swapped_toys import HalfConv2d, HalfLinear, network, swapped, toy_tables

LAYERS = ("layer1.0.conv1", "layer2.0.conv2", "fc")
LENET = ("features.3", "classifier.0", "classifier.2")
TOLERANCE = 1e-6


def inputs(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 1, 32, 32, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(checkpoint: Checkpoint) -> torch.Tensor:
    return checkpoint.model.eval()(inputs())


def handed() -> Context:
    return replace(context(), tables=toy_tables())


def options(**given: Any) -> PruneOptions:
    return PruneOptions(**{"method": PruneMethod.L2, "rate": 0.5, **given})


def pruned(checkpoint: Checkpoint, wanted: PruneOptions, where: Context | None = None) -> list[Checkpoint]:
    return [outcome.checkpoint for outcome in prune.run(checkpoint, wanted, where or handed())]


def round_trip(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    save(checkpoint, path, toy_tables(), overwrite=True)
    return load(path, toy_tables())


def test_plain_checkpoint_computes_the_same_and_shares_what_is_not_swapped() -> None:
    coded = swapped(network(), *LAYERS)
    plain = plain_checkpoint(coded)
    assert torch.equal(logits(plain), logits(coded))
    assert type(plain.model.get_submodule("fc")) is nn.Linear
    assert plain.model.get_parameter("conv1.weight") is coded.model.get_parameter("conv1.weight")
    assert [edit["kind"] for edit in coded.spec.edits] == ["swap"] * 3
    assert plain.spec.edits == ()
    assert plain_checkpoint(plain) is plain


def test_a_cut_equals_the_plain_networks_cut(tmp_path: Path) -> None:
    coded, dense = swapped(network(), *LAYERS), network()
    found = plan_thinning(dense.model, (inputs(),), options())
    apply_cut(dense.model, found.plan)
    (cut,) = pruned(coded, options())
    torch.testing.assert_close(logits(cut), logits(dense), rtol=TOLERANCE, atol=TOLERANCE)
    for name, kind in zip(LAYERS, (HalfConv2d, HalfConv2d, HalfLinear), strict=True):
        assert isinstance(cut.model.get_submodule(name), kind)
    fc = cut.model.get_submodule("fc")
    assert fc.in_features == dense.model.get_submodule("fc").in_features < 16
    assert fc.coefficients.shape == (10, 16)
    assert torch.equal(logits(round_trip(cut, tmp_path / "cut.pt")), logits(cut))


def test_a_cut_goes_on_being_cut(tmp_path: Path) -> None:
    steps = pruned(swapped(network("lenet"), *LENET), options(steps=2, rate=0.6))
    widths = [step.model.get_submodule("features.3").in_channels for step in steps]
    assert 6 > widths[0] > widths[1]
    again = round_trip(steps[-1], tmp_path / "a.pt")
    before = again.model.get_submodule("classifier.0").in_features
    (last,) = pruned(again, options(rate=0.5))
    assert torch.equal(logits(round_trip(last, tmp_path / "b.pt")), logits(last))
    assert before > last.model.get_submodule("classifier.0").in_features > 0


def test_a_shared_layer_is_cut_under_all_its_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc = nn.Conv2d(1, 8, 3, stride=8), nn.Linear(8 * 16, 10)
            self.body = nn.Conv2d(8, 8, 3, padding=1)
            self.again = self.body

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.again(self.body(self.first(x)).relu()).relu().flatten(1))

    torch.manual_seed(0)
    dense = Twice().eval()
    coded = deepcopy(dense)
    coded.body = coded.again = HalfConv2d(coded.body)
    spec = network().spec
    found = plan_thinning(dense, (inputs(),), options())
    apply_cut(dense, found.plan)
    cut = carried_out(Checkpoint(coded, spec), found.plan, handed()).checkpoint
    assert cut.model.get_submodule("body") is cut.model.get_submodule("again")
    torch.testing.assert_close(cut.model(inputs()), dense(inputs()), rtol=TOLERANCE, atol=TOLERANCE)


def test_masks_and_stored_forms_of_coefficients_follow_the_cut(tmp_path: Path) -> None:
    coded = swapped(network(base=16), *LAYERS)
    keep = {
        name: coded.model.get_parameter(name).abs() > 0.02
        for name in ("layer2.0.conv2.coefficients", "fc.coefficients")
    }
    add_masks(coded.model, keep)
    coded = stored_with_masks(replace(coded, spec=with_masks(coded.spec, coded.model)))
    assert {"layer2.0.conv2.coefficients", "fc.coefficients_mask"} <= coded.stored.keys()
    forms = coded.stored
    plain = plain_checkpoint(coded)
    found = plan_thinning(plain.model, (inputs(),), options())
    whole = carried_out(coded, found.plan, handed())
    cut = whole.checkpoint
    assert len(whole.notes) == 1
    assert "fc" in whole.notes[0]
    assert cut.stored.keys() == forms.keys()
    assert cut.stored["layer2.0.conv2.coefficients"].shape[0] < 32
    # What is only read through an index lies as it was.
    assert cut.stored["fc.coefficients"].parts["values"] is forms["fc.coefficients"].parts["values"]
    for place, mask in masks_of(cut.model).items():
        assert not bool(cut.model.get_parameter(place)[~mask].any())
    assert torch.equal(logits(round_trip(cut, tmp_path / "cut.pt")), logits(cut))


def test_quantized_coefficients_are_not_rounded_again() -> None:
    from cctool.operations.quantize import run as quantize
    from cctool.options.quantize.options import QuantizeOptions

    coded = swapped(network("lenet"), *LENET)
    (outcome,) = quantize.run(coded, QuantizeOptions(), handed())
    small = outcome.checkpoint
    assert "classifier.0.coefficients" in {tensor.name for tensor in outcome.report.tensors}
    dense = plain_checkpoint(replace(small, model=deepcopy(small.model)))
    found = plan_thinning(dense.model, (inputs(),), options())
    apply_cut(dense.model, found.plan)
    (cut,) = pruned(small, options())
    assert small.stored.keys() == cut.stored.keys()
    for name, form in cut.stored.items():
        decoded = handed().tables.encodings[form.encoding].decode(form)
        assert torch.equal(decoded, cut.model.state_dict()[name]), name
    torch.testing.assert_close(logits(cut), logits(dense), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("quantity", ["params", "macs", "bytes"])
def test_targets_count_what_is_stored(quantity: str) -> None:
    coded = swapped(network("lenet"), *LENET)
    before = measure(coded)
    plain = measure(plain_checkpoint(coded))
    assert before.macs == plain.macs
    assert before.parameters == plain.parameters
    assert before.bytes == plain.bytes + 8 * (120 + 84)  # the indices of columns
    found = prune.run(coded, options(rate=0.5, target=parse_target(f"{quantity}=60%")), handed())
    (outcome,) = found
    after = measure(outcome.checkpoint)
    reached = {"params": after.parameters, "macs": after.macs, "bytes": after.bytes}[quantity]
    assert outcome.report.target.reached == reached
    assert reached <= outcome.report.target.limit


def test_the_layer_table_names_what_is_stored() -> None:
    coded = swapped(network(), *LAYERS)
    report = analyze.run(coded, AnalyzeOptions(), handed())
    assert report.analysis is not None
    rows = {layer.name: layer for layer in report.analysis.layers.layers}
    plain = analyze.run(plain_checkpoint(coded), AnalyzeOptions(), handed()).analysis
    assert plain is not None
    assert report.analysis.layers.totals.macs == plain.layers.totals.macs
    assert report.analysis.cross_check.total == plain.cross_check.total
    assert rows["fc"].type == "Linear (half-linear)"
    assert rows["fc"].sums.parameters == 170
    assert rows["layer1.0.conv1"].attributes == "k=3, s=1, p=1, g=1"
    assert report.analysis.layers.totals.bytes == stored_bytes(coded)
    assert report.analysis.layers.unused == ()


def test_single_coefficients_are_masked_and_nothing_else_of_them_is() -> None:
    coded = swapped(network(), *LAYERS)
    masked, report = mask_weights(coded, options(granularity=Granularity.ELEMENT))
    assert "fc.coefficients" in masks_of(masked.model)
    assert int(masks_of(masked.model)["fc.coefficients"].sum()) == 80
    coded = swapped(network(), *LAYERS)
    masked, report = mask_weights(coded, options(granularity=Granularity.KERNEL))
    assert "layer1.0.conv2.weight" in masks_of(masked.model)
    assert not [name for name in masks_of(masked.model) if name.endswith("coefficients")]
    notes = {tensor.name: tensor.note for tensor in report.tensors}
    assert "--granularity element" in notes["layer1.0.conv1.coefficients"]


def test_masking_channels_of_coefficients_is_refused() -> None:
    coded = swapped(network("lenet"), *LENET)
    with pytest.raises(PruningError, match=r"--mask cannot mask the channels of .* --exclude"):
        pruned(coded, options(mask=True))


def test_masked_channels_beside_coefficients_are_cut(tmp_path: Path) -> None:
    coded = swapped(network(), "fc")
    (masked,) = pruned(coded, options(mask=True, only=("layer1.0.conv1",)))
    (cut,) = pruned(masked, options(apply_masks=True))
    assert cut.model.get_submodule("layer1.0.conv1").out_channels == 2
    torch.testing.assert_close(logits(cut), logits(masked), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(round_trip(cut, tmp_path / "cut.pt")), logits(cut))


def test_training_goes_on_after_the_cut() -> None:
    coded = swapped(network("lenet"), *LENET)
    before = coded.model.get_submodule("classifier.2").coefficients.detach().clone()
    wanted = options(
        finetune_epochs=1, lr=0.05, data=DataOptions(data="digits", batch_size=16, limit=32), steps=2
    )
    steps = pruned(coded, wanted)
    after = steps[-1].model.get_submodule("classifier.2").coefficients
    assert after.shape == before.shape
    assert not torch.equal(after, before)


def test_rewinding_cuts_the_earlier_coefficients(tmp_path: Path) -> None:
    from cctool.operations.prune.rewind import rewound

    early = swapped(network("lenet", seed=1), *LENET)
    late = swapped(network("lenet", seed=2), *LENET)
    found = plan_thinning(plain_checkpoint(late).model, (inputs(),), options())
    cut = carried_out(late, found.plan, handed()).checkpoint
    back = rewound(cut, early, [found.plan])
    dense = plain_checkpoint(early)
    apply_cut(dense.model, found.plan)
    torch.testing.assert_close(logits(back), logits(dense), rtol=TOLERANCE, atol=TOLERANCE)


def test_the_training_that_cannot_be_cut_along_is_left_out_with_a_word() -> None:
    from cctool.checkpoint.file.payload import ResumeState

    where = handed()
    coded = replace(swapped(network("lenet"), *LENET), resume=ResumeState({}, {"optimizer": {}}))
    (cut,) = pruned(coded, options(), where)
    assert cut.resume is None
    assert isinstance(where.reporter, Listening)
    assert any("coefficients" in text for text in where.reporter.said)
