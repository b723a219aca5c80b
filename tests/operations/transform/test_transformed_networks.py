"""Pruning, exporting and counting networks with layers of coefficients, of basis functions, and codecs."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cctool.base.errors import ExportError, PruningError
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.edits.thin import thinned
from cctool.models import registry
from cctool.operations.inspect.export import export, run
from cctool.operations.judge.size import measure
from cctool.operations.keep.events import cut as carried_out
from cctool.operations.keep.events import plain_checkpoint
from cctool.operations.prune import run as prune
from cctool.operations.prune.from_scratch import reinitialised
from cctool.operations.prune.rewind import rewound
from cctool.operations.registries import tables
from cctool.options.common import DataOptions
from cctool.options.inspect.export import ExportFormat, ExportOptions
from cctool.options.prune.choices import PruneMethod, Sparsifier
from cctool.options.prune.options import PruneOptions, SparsifyOptions
from cctool.pruning.cut.planner import plan_thinning
from cctool.pruning.cut.surgery import apply_cut
from cctool.transforms.codec.taps import taps_of
from cctool.transforms.layers.base import swapped_layers
from procedure_toys import Listening, context
from swapped_toys import network
from transformed_toys import basis, corner, energy, tapped

TOLERANCE = 1e-6


def inputs(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 1, 32, 32, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(checkpoint: Checkpoint) -> torch.Tensor:
    return checkpoint.model.eval()(inputs())


def options(**given: Any) -> PruneOptions:
    return PruneOptions(**{"method": PruneMethod.L1, "rate": 0.5, **given})


def pruned(checkpoint: Checkpoint, wanted: PruneOptions) -> Checkpoint:
    *_, last = prune.run(checkpoint, wanted, context())
    return last.checkpoint


def lenet(seed: int = 0) -> Checkpoint:
    return network("lenet", seed)


MADE = {
    "energy": lambda: energy(lenet(), kernel="dct"),
    "blocks": lambda: energy(lenet(), kernel="haar", block=16),
    "corner": lambda: corner(lenet(), kernel="dct"),
    "klt": lambda: corner(lenet(), kernel="klt"),
    "dct basis": lambda: basis(lenet(), "dct"),
    "dst basis": lambda: basis(lenet(), "dst"),
}


@pytest.mark.parametrize("name", MADE)
def test_a_cut_equals_the_plain_networks_cut_and_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    coded = MADE[name]()
    dense = plain_checkpoint(replace(coded, model=deepcopy(coded.model)))
    torch.testing.assert_close(logits(dense), logits(coded), rtol=TOLERANCE, atol=TOLERANCE)
    found = plan_thinning(dense.model, (inputs(),), options())
    apply_cut(dense.model, found.plan)
    cut = pruned(coded, options())
    torch.testing.assert_close(logits(cut), logits(dense), rtol=TOLERANCE, atol=TOLERANCE)
    save(cut, tmp_path / "cut.pt", tables())
    again = load(tmp_path / "cut.pt", tables())
    assert torch.equal(logits(again), logits(cut))
    twice = pruned(again, options(rate=0.3))
    save(twice, tmp_path / "twice.pt", tables())
    assert torch.equal(logits(load(tmp_path / "twice.pt", tables())), logits(twice))


@pytest.mark.parametrize("name", ["energy", "corner", "dct basis"])
def test_what_was_cut_keeps_training(name: str) -> None:
    coded = MADE[name]()
    data = DataOptions(data="digits", batch_size=16, limit=32)
    cut = pruned(coded, options(steps=2, finetune_epochs=1, lr=0.01, data=data))
    before = {key: value.clone() for key, value in cut.model.state_dict().items()}
    trained = pruned(cut, options(rate=0.2, finetune_epochs=1, lr=0.01, data=data))
    assert len(swapped_layers(trained.model)) == 5
    bias = trained.model.get_parameter("classifier.2.bias")
    assert not torch.equal(bias, before["classifier.2.bias"])


def test_rewinding_gives_the_earlier_coefficients_back() -> None:
    early, late = energy(lenet(1), keep=None), energy(lenet(2), keep=None)
    found = plan_thinning(plain_checkpoint(late).model, (inputs(),), options())
    back = rewound(carried_out(late, found.plan, context()).checkpoint, early, [found.plan])
    dense = plain_checkpoint(early)
    apply_cut(dense.model, found.plan)
    torch.testing.assert_close(logits(back), logits(dense), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kernel", ["dct", "klt"])
def test_from_scratch_transforms_what_the_architecture_draws(kernel: str) -> None:
    plain = lenet()
    coded = energy(lenet(), kernel=kernel, keep=None)
    found = plan_thinning(plain.model, (inputs(),), options())
    apply_cut(plain.model, found.plan)
    attributes = [(module, name) for module, values in found.plan.attributes.items() for name in values]
    plain = replace(plain, spec=thinned(plain.spec, plain.model, found.plan.tensors, attributes))
    cut = carried_out(coded, found.plan, context()).checkpoint
    before = logits(cut)
    drawn = reinitialised(cut, context())
    expected = logits(reinitialised(plain, context()))
    torch.testing.assert_close(logits(drawn), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected)


@pytest.mark.parametrize("method", list(Sparsifier))
def test_sparse_training_acts_on_what_is_left_to_it(method: Sparsifier) -> None:
    coded = energy(network("mobilenet_student"), layers=("linear",))
    wanted = options(
        rate=0.3,
        sparsify=SparsifyOptions(method=method, epochs=1, strength=0.01),
        data=DataOptions(data="digits", batch_size=16, limit=32),
    )
    assert len(swapped_layers(pruned(coded, wanted).model)) == 1


def test_complex_layers_keep_their_width_and_the_rest_is_cut(tmp_path: Path) -> None:
    coded = basis(lenet(), "dft", ("linear",))
    *_, outcome = prune.run(coded, options(), context())
    cut = outcome.checkpoint
    assert cut.model.get_submodule("features.0").out_channels == 3
    assert cut.model.get_submodule("features.6").out_channels == 120
    save(cut, tmp_path / "cut.pt", tables())
    assert torch.equal(logits(load(tmp_path / "cut.pt", tables())), logits(cut))
    with pytest.raises(PruningError, match=r"features\.0 and 4 layers more compute with complex numbers"):
        pruned(basis(lenet(), "dft"), options())


def test_complex_products_are_four_real_ones() -> None:
    real, complex_ = measure(lenet()), measure(basis(lenet(), "dft"))
    assert real.macs is not None
    # The first layer meets real images: two real products.
    first = 28 * 28 * 6 * 25
    assert complex_.macs == 4 * (real.macs - first) + 2 * first


def test_codecs_that_mix_channels_keep_them(tmp_path: Path) -> None:
    coded = tapped(lenet(), "features.3", channel_klt=True)
    *_, outcome = prune.run(coded, options(), context())
    cut = outcome.checkpoint
    assert cut.model.get_submodule("features.3").out_channels == 16
    assert cut.model.get_submodule("features.0").out_channels == 3
    assert "mixes its channels by a calibrated basis" in str(outcome.report.cut)
    save(cut, tmp_path / "cut.pt", tables())
    assert torch.equal(logits(load(tmp_path / "cut.pt", tables())), logits(cut))


def test_codecs_follow_a_cut_and_are_calibrated_again() -> None:
    coded = tapped(lenet(), "features.3")
    before = taps_of(coded.model)["features.3"]
    where = context()
    (outcome,) = prune.run(coded, options(data=DataOptions(data="digits", limit=48)), where)
    cut = outcome.checkpoint
    after = taps_of(cut.model)["features.3"]
    assert after.shape == (8, *before.shape[1:])
    assert after.fingerprint != before.fingerprint
    assert any("calibrated again on 16" in note for note in outcome.notes)
    assert isinstance(where.reporter, Listening)


def exported(checkpoint: Checkpoint, path: Path, **given: Any) -> Any:
    kind = ExportFormat.ONNX if path.suffix == ".onnx" else ExportFormat.STATE_DICT
    return export(checkpoint, kind, path, DataOptions(), replace(context(), force=True), **given)


def run_onnx(path: Path) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": inputs().numpy()})[0])


@pytest.mark.parametrize("name", ["energy", "corner"])
def test_onnx_gets_weights_or_small_factors(name: str, tmp_path: Path) -> None:
    coded = MADE[name]()
    written = exported(coded, tmp_path / "net.onnx")
    torch.testing.assert_close(run_onnx(tmp_path / "net.onnx"), logits(coded), rtol=1e-5, atol=1e-5)
    factored = [layer for layer in swapped_layers(coded.model).values() if layer.factored() is not None]
    assert bool(factored) == (name == "corner")
    assert any("as small factors" in note for note in written.notes) == bool(factored)
    dense = exported(lenet(), tmp_path / "dense.onnx")
    assert (written.bytes < dense.bytes) == bool(factored)


@pytest.mark.parametrize("name", ["energy", "dct basis"])
def test_a_state_dict_holds_the_weights_of_the_architecture(name: str, tmp_path: Path) -> None:
    coded = tapped(MADE[name](), "features.3")
    written = exported(coded, tmp_path / "net.pt")
    model = registry.build("lenet", {"in_channels": 1}).eval()
    model.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    plain = plain_checkpoint(coded)
    assert torch.equal(model(inputs()), plain.model.eval()(inputs()))
    assert any("codecs are left out" in note for note in written.notes)


@pytest.mark.parametrize("kernel", ["dct", "dwt", "identity"])
def test_onnx_codes_the_maps_unless_told_otherwise(kernel: str, tmp_path: Path) -> None:
    coded = tapped(lenet(), "features.0", kernel=kernel, bits=3)
    exported(coded, tmp_path / "coded.onnx")
    torch.testing.assert_close(run_onnx(tmp_path / "coded.onnx"), logits(coded), rtol=1e-3, atol=1e-3)
    options = ExportOptions(output=str(tmp_path / "plain.onnx"), without_codec=True)
    (file,) = run(coded, options, context()).files
    assert "1 codecs are left out" in file.notes
    without = run_onnx(tmp_path / "plain.onnx")
    torch.testing.assert_close(without, logits(plain_checkpoint(coded)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(without, logits(coded), rtol=1e-3, atol=1e-3)


def test_complex_networks_are_refused_by_onnx(tmp_path: Path) -> None:
    coded = basis(lenet(), "dft", ("linear",))
    with pytest.raises(ExportError, match=r"classifier\.0 computes with complex numbers.*state-dict"):
        exported(coded, tmp_path / "net.onnx")
    written = exported(coded, tmp_path / "net.pt")
    assert any("by their own parameters" in note for note in written.notes)
    assert "classifier.0.frequency_offsets" in torch.load(tmp_path / "net.pt", weights_only=True)
