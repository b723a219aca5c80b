"""Weights as packed integers and by codebooks, through files, cuts, masks and training."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cctool
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import add_masks, masked_places, with_masks
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations.keep.codebooks import codebooks_after, keeping_codebooks
from cctool.operations.keep.masked_weights import encode_under_mask, stored_with_masks
from cctool.operations.prune import run as prune
from cctool.operations.train import run as train
from cctool.options.common import DataOptions, RuntimeOptions
from cctool.options.prune.choices import Granularity, PruneMethod
from cctool.options.prune.options import PruneOptions
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import RunOptions, TrainOptions
from cctool.quantization.encodings.codebook import CODEBOOK, indices_of
from cctool.quantization.encodings.masked import MASKED, inner_form
from cctool.quantization.encodings.table import ENCODINGS

DIGITS = DataOptions(data="digits", limit=64, batch_size=32)
KMEANS: dict[str, Any] = {"kind": "kmeans", "bits": 3, "axis": None, "init": "linear", "seed": 0}
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("intn", {"bits": 4, "symmetric": True, "axis": 0, "group": None}),
    ("intn", {"bits": 3, "symmetric": False, "axis": 0, "group": 20}),
    ("codebook", KMEANS),
    ("codebook", {"kind": "apot", "bits": 4, "terms": 2, "axis": 0}),
]


def dense(name: str, density: float = 1.0) -> Checkpoint:
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "in_channels": 1}
    model = registry.build(name, arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 1)
    if density < 1:
        weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
        add_masks(model, {n: torch.rand_like(p) < density for n, p in weights.items()})
    spec = ModelSpec(
        architecture=name,
        arguments=arguments,
        input_shape=(1, 32, 32),
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    )
    return Checkpoint(model.eval(), with_masks(spec, model))


@torch.no_grad()
def packed(checkpoint: Checkpoint, encoding: str, parameters: Mapping[str, Any]) -> Checkpoint:
    masks = {place.name: place.mask for place in masked_places(checkpoint.model)}
    stored = {}
    for name, weight in checkpoint.model.named_parameters():
        if weight.dim() > 1:
            form = encode_under_mask(weight.detach(), masks.get(name), ENCODINGS[encoding], parameters)
            weight.copy_(ENCODINGS[form.encoding].decode(form))
            stored[name] = form
    return stored_with_masks(replace(checkpoint, stored=stored))


def partition(weight: Tensor) -> Tensor:
    """Which weights are the same number, whatever it is: for each the first place where it occurs."""
    _, index = weight.flatten().unique(return_inverse=True)
    first = torch.full((int(index.max()) + 1,), len(index)).scatter_reduce(
        0, index, torch.arange(len(index)), "amin"
    )
    return first[index]


def trained(source: Path, name: str, epochs: int = 1, **options: Any) -> Checkpoint:
    fit = FitOptions(epochs=epochs, lr=0.01, **options.pop("fit", {}))
    asked = TrainOptions(fit, DIGITS, **{"keep_storage": True, **options})
    request = pipeline.Request(
        "train",
        str(source),
        str(source.with_name(name)),
        runtime=RuntimeOptions(device="cpu", deterministic=True),
        resumes=asked.run.resume,
    )
    (product,) = pipeline.write(train.run, asked, request)
    return cctool.load(product.path)


def pruned(source: Path, **options: Any) -> Checkpoint:
    request = pipeline.Request(
        "prune", str(source), str(source.with_name("pruned.pt")), runtime=RuntimeOptions(device="cpu")
    )
    (product,) = pipeline.write(prune.run, PruneOptions(**options), request)
    return cctool.load(product.path)


@pytest.fixture(autouse=True)
def _undo_determinism() -> Any:
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize(("encoding", "parameters"), FORMS)
def test_a_file_holds_the_packed_form(
    encoding: str, parameters: dict[str, Any], density: float, suffix: str, tmp_path: Path
) -> None:
    checkpoint = packed(dense("lenet", density), encoding, parameters)
    path, again = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    cctool.save(checkpoint, path)
    loaded = cctool.load(path)
    for name, value in checkpoint.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert loaded.stored.keys() == checkpoint.stored.keys()
    for name, form in checkpoint.stored.items():
        found = loaded.stored[name]
        assert (found.encoding, dict(found.parameters)) == (form.encoding, dict(form.parameters))
        assert found.nbytes == form.nbytes
    cctool.save(loaded, again)
    assert path.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("encoding", ["intn", "codebook"])
def test_files_have_the_size_of_their_bits(encoding: str, bits: int, tmp_path: Path) -> None:
    parameters = {**KMEANS, "bits": bits} if encoding == "codebook" else {**FORMS[0][1], "bits": bits}
    checkpoint = packed(dense("resnet20"), encoding, parameters)
    cctool.save(checkpoint, tmp_path / "packed.pt")
    weights = sum(math.prod(form.shape) for form in checkpoint.stored.values())
    assert weights == 270_608
    # A k-means table of 256 values for each of 22 layers is as large as all else that comes with the weights.
    tables = sum(form.nbytes for form in checkpoint.stored.values()) - weights * bits / 8
    free = tables if encoding == "codebook" else 0
    found = (tmp_path / "packed.pt").stat().st_size - free
    assert weights * bits / 8 < found <= weights * bits / 8 * 1.05 + 20_000


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize(("encoding", "parameters"), FORMS)
def test_a_cut_network_has_the_numbers_of_the_whole_one(
    encoding: str, parameters: dict[str, Any], density: float, tmp_path: Path
) -> None:
    whole = packed(dense("lenet", density), encoding, parameters)
    cctool.save(whole, tmp_path / "whole.pt")
    cut = pruned(tmp_path / "whole.pt", rate=0.5, method=PruneMethod.L1)
    assert cut.stored.keys() == whole.stored.keys()
    smaller = 0
    for name, form in cut.stored.items():
        before, after = whole.model.state_dict()[name], cut.model.state_dict()[name]
        # Nothing is rounded again: a cut weight has no number that the whole one has not.
        assert set(after.unique().tolist()) <= set(before.unique().tolist()) | {0.0}
        assert dict(form.parameters) == dict(whole.stored[name].parameters)
        smaller += form.nbytes < whole.stored[name].nbytes
    assert smaller > len(cut.stored) / 2


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_training_keeps_assignments_and_stores_tables_exactly(density: float, tmp_path: Path) -> None:
    before = packed(dense("lenet", density), "codebook", KMEANS)
    cctool.save(before, tmp_path / "small.pt")
    after = trained(tmp_path / "small.pt", "tuned.pt")
    assert after.stored.keys() == before.stored.keys()
    masks = {place.name: place.mask for place in masked_places(before.model)}
    for name, weight in before.model.named_parameters():
        if name in before.stored:
            found = after.model.get_parameter(name).detach()
            kept = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
            assert torch.equal(partition(found[kept]), partition(weight.detach()[kept]))
            assert not torch.equal(found, weight)
            assert not found[~kept].any()
            assert dict(after.stored[name].parameters) == dict(before.stored[name].parameters)
            assert after.stored[name].nbytes == before.stored[name].nbytes
    free = trained(tmp_path / "small.pt", "free.pt", keep_storage=False)
    name = next(name for name in before.stored if not name.endswith("mask"))
    assert len(free.model.get_parameter(name).unique()) > 9


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    cctool.save(packed(dense("lenet"), "codebook", KMEANS), tmp_path / "small.pt")
    trained(tmp_path / "small.pt", "whole.pt", epochs=2)
    trained(tmp_path / "small.pt", "halved.pt", epochs=2, run=RunOptions(stop_after=1))
    trained(tmp_path / "small.pt", "halved.pt", epochs=2, run=RunOptions(resume=True))
    assert (tmp_path / "whole.pt").read_bytes() == (tmp_path / "halved.pt").read_bytes()


def test_a_codebook_is_cut_masked_and_tuned(tmp_path: Path) -> None:
    cctool.save(packed(dense("lenet"), "codebook", KMEANS), tmp_path / "small.pt")
    tuned = {
        "rate": 0.5,
        "method": PruneMethod.L1,
        "finetune_epochs": 1,
        "data": DIGITS,
        "keep_storage": True,
    }
    for options in ({}, {"granularity": Granularity.ELEMENT}):
        found = pruned(tmp_path / "small.pt", **options, **tuned)
        (tmp_path / "pruned.pt").unlink()
        names = [name for name in found.stored if not name.endswith("mask")]
        assert names
        masked = {place.name for place in masked_places(found.model)}
        for name in names:
            assert found.stored[name].encoding == (MASKED if name in masked else CODEBOOK).name
            assert len(found.model.get_parameter(name).unique()) <= 9
        assert bool(masked) == ("granularity" in options)


def test_powers_of_two_train_freely_and_are_found_anew(tmp_path: Path) -> None:
    before = packed(dense("lenet"), *FORMS[3])
    assert keeping_codebooks(before) == ()
    cctool.save(before, tmp_path / "small.pt")
    after = trained(tmp_path / "small.pt", "tuned.pt")
    for name, form in after.stored.items():
        assert torch.equal(form.parts["table"], before.stored[name].parts["table"])
        assert not torch.equal(form.parts["scales"], before.stored[name].parts["scales"])


def test_what_trained_without_the_constraint_is_not_stored_by_its_old_assignment() -> None:
    before = packed(dense("lenet"), "codebook", KMEANS)
    (first, *others) = before.stored
    after = replace(before, stored={})
    with torch.no_grad():
        after.model.get_parameter(first).normal_()
    assert set(codebooks_after(after, before)) == set(others)
    (constraint,) = keeping_codebooks(before)
    assert len(constraint._tables) == len(others)  # type: ignore[attr-defined]


def test_tables_of_slices_are_kept_apart() -> None:
    before = dense("lenet")
    name, weight = next((n, p) for n, p in before.model.named_parameters() if p.dim() == 4)
    parameters = {"kind": "distinct", "bits": 2, "axis": 0}
    with torch.no_grad():
        # The same numbers in every slice: entries must not be shared between slices all the same.
        weight.copy_(torch.randint(0, 4, weight.shape) / 8)
    before = replace(before, stored={name: CODEBOOK.encode(weight, parameters)})
    (constraint,) = keeping_codebooks(before)
    constraint.epoch(0)
    weight.grad = torch.randn(weight.shape)
    gradient = weight.grad.clone()
    constraint.gradients()
    for channel in range(len(weight)):
        for value in weight[channel].unique():
            members = weight[channel] == value
            torch.testing.assert_close(
                weight.grad[channel][members], gradient[channel][members].mean().expand(int(members.sum()))
            )
    with torch.no_grad():
        weight.sub_(0.1 * weight.grad)
        constraint.weights()
    form = codebooks_after(replace(before, stored={}), before)[name]
    assert torch.equal(CODEBOOK.decode(form), weight.detach())
    assert indices_of(form).table.shape == (len(weight), 4)


def test_masked_zeros_have_no_entry() -> None:
    before = packed(dense("lenet", 0.5), "codebook", KMEANS)
    name = next(name for name, form in before.stored.items() if form.encoding == MASKED.name)
    form = inner_form(before.stored[name])
    assert form is not None
    assert 0 not in form.parts["table"]
    after = codebooks_after(replace(before, stored={}), before)
    assert all(torch.equal(after[name].parts[key], part) for key, part in before.stored[name].parts.items())
