"""Saving and loading: nothing is lost, equal content is equal bytes, and both formats say the same."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cctool.base.errors import CheckpointError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.file.payload import ResumeState
from cctool.checkpoint.spec import Metrics, ModelSpec, Parent, Preprocessing, Size, Step
from checkpoint_toys import INPUT, STEP, TABLES, Tied, Toy, assert_same_tensors, logits, make, quantized

SUFFIXES = (".pt", ".safetensors")
BUILT = ("toy", "tied", "hidden", "from-values", "plain-attribute", "meta-buffer", "sizes")


def again(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    save(checkpoint, path, TABLES)
    return load(path, TABLES)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", BUILT)
def test_a_loaded_network_is_the_saved_one(name: str, suffix: str, tmp_path: Path) -> None:
    checkpoint = make(name)
    loaded = again(checkpoint, tmp_path / f"a{suffix}")
    assert_same_tensors(checkpoint.model, loaded.model)
    assert torch.equal(logits(checkpoint), logits(loaded))
    assert not any(tensor.is_meta for tensor in (*loaded.model.parameters(), *loaded.model.buffers()))
    assert (loaded.spec, loaded.history) == (checkpoint.spec, checkpoint.history)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("encoding", "parameters"),
    [("affine-u8", {"axis": None}), ("affine-u8", {"axis": 0}), ("fp16", {}), ("bf16", {})],
)
def test_encoded_tensors_survive(encoding: str, parameters: dict, suffix: str, tmp_path: Path) -> None:
    checkpoint = quantized(make(), encoding, **parameters)
    loaded = again(checkpoint, tmp_path / f"a{suffix}")
    assert torch.equal(logits(checkpoint), logits(loaded))
    assert (
        loaded.stored.keys() == checkpoint.stored.keys() == {"conv.weight", "depthwise.weight", "fc.weight"}
    )
    for name, stored in checkpoint.stored.items():
        assert loaded.stored[name].parameters == stored.parameters
        for part, value in stored.parts.items():
            assert torch.equal(loaded.stored[name].parts[part], value)


@pytest.mark.parametrize("kind", ["dense", "affine-u8"])
def test_equal_content_is_equal_bytes_and_hashes(kind: str, tmp_path: Path) -> None:
    checkpoint = make("tied") if kind == "dense" else quantized(make("tied"), kind, axis=None)
    parents = [save(checkpoint, tmp_path / f"a{suffix}", TABLES) for suffix in SUFFIXES]
    assert parents[0].content == parents[1].content
    assert parents[0].file != parents[1].file
    for suffix in SUFFIXES:
        loaded = load(tmp_path / f"a{suffix}", TABLES)
        assert loaded.origin is not None
        assert loaded.origin.content == parents[0].content
        for target in SUFFIXES:
            save(loaded, tmp_path / f"b{target}", TABLES, overwrite=True)
            assert (tmp_path / f"b{target}").read_bytes() == (tmp_path / f"a{target}").read_bytes()


def test_the_content_hash_sees_each_part(tmp_path: Path) -> None:
    checkpoint = make()
    other_step = replace(checkpoint, history=(STEP, STEP))
    other_spec = replace(checkpoint, spec=checkpoint.spec.model_copy(update={"data": "digits"}))
    other_tensor = make(seed=1)
    with_resume = replace(checkpoint, resume=ResumeState({"x": torch.ones(2)}, {"epoch": 1}))
    found = [
        save(variant, tmp_path / f"{index}.pt", TABLES).content
        for index, variant in enumerate((checkpoint, other_step, other_spec, other_tensor, with_resume))
    ]
    assert len(set(found[:4])) == 4
    assert found[4] == found[0], "the state for --resume is no content"


def test_a_new_process_computes_the_same(tmp_path: Path) -> None:
    for name, checkpoint in {"dense": make(), "u8": quantized(make(), "affine-u8", axis=0)}.items():
        save(checkpoint, tmp_path / f"{name}.pt", TABLES)
        torch.save(logits(checkpoint), tmp_path / f"{name}.logits")
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / "toys")!r})
import torch
from checkpoint_toys import TABLES, logits
from cctool.checkpoint.checkpoint import load, save
for name in ("dense", "u8"):
    checkpoint = load({str(tmp_path)!r} + f"/{{name}}.pt", TABLES)
    assert torch.equal(logits(checkpoint), torch.load({str(tmp_path)!r} + f"/{{name}}.logits"))
    save(checkpoint, {str(tmp_path)!r} + f"/{{name}}.again.pt", TABLES)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    for name in ("dense", "u8"):
        assert (tmp_path / f"{name}.again.pt").read_bytes() == (tmp_path / f"{name}.pt").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("encoding", [None, "affine-u8"])
def test_ties_survive_and_cost_nothing(encoding: str | None, suffix: str, tmp_path: Path) -> None:
    checkpoint = make("tied") if encoding is None else quantized(make("tied"), encoding, axis=None)
    loaded = again(checkpoint, tmp_path / f"a{suffix}")
    model = loaded.model
    assert isinstance(model, Tied)
    assert model.encode.weight is model.decode.weight
    assert model.norm is model.again
    assert sum(1 for _ in model.parameters()) == 5
    if encoding:
        assert loaded.stored["encode.weight"] is loaded.stored["decode.weight"]
    with torch.no_grad():
        model.encode.weight.add_(1)
    assert torch.equal(model.decode.weight, model.encode.weight)
    untied = Tied()
    untied.decode.weight = nn.Parameter(untied.encode.weight.clone())
    save(replace(make("tied"), model=untied), tmp_path / f"b{suffix}", TABLES)
    if encoding is None:
        assert (tmp_path / f"b{suffix}").stat().st_size > (tmp_path / f"a{suffix}").stat().st_size


def test_a_file_that_gives_two_values_to_one_tied_parameter_is_refused(tmp_path: Path) -> None:
    untied = Tied()
    untied.decode.weight = nn.Parameter(untied.encode.weight + 1)
    save(replace(make("tied"), model=untied), tmp_path / "a.pt", TABLES)
    with pytest.raises(CheckpointError, match=r"decode\.weight and encode\.weight are one parameter"):
        load(tmp_path / "a.pt", TABLES)


def test_nonpersistent_buffers_come_from_the_architecture(tmp_path: Path) -> None:
    loaded = again(make("hidden", scale=5.0), tmp_path / "a.pt")
    assert torch.equal(loaded.model.scale, torch.full((4,), 5.0))
    assert "scale" not in torch.load(tmp_path / "a.pt", weights_only=True)["model"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_odd_tensors(suffix: str, tmp_path: Path) -> None:
    checkpoint = make(width=64)
    model = checkpoint.model
    large = torch.randn(1000, 64)
    model.fc.weight = nn.Parameter(large[5:8])  # a view: the file must not hold the rest of its storage
    model.conv.weight = nn.Parameter(model.conv.weight.to(memory_format=torch.channels_last))
    model.bn.double()
    model.depthwise.bfloat16()
    loaded = again(checkpoint, tmp_path / f"a{suffix}").model
    assert_same_tensors(model, loaded)
    assert (tmp_path / f"a{suffix}").stat().st_size < 20_000
    assert loaded.bn.weight.dtype == torch.float64
    assert loaded.depthwise.weight.dtype == torch.bfloat16


def test_loaded_tensors_share_no_storage(tmp_path: Path) -> None:
    loaded = again(make(), tmp_path / "a.pt").model
    storages = [tensor.untyped_storage().data_ptr() for tensor in loaded.state_dict().values()]
    assert len(set(storages)) == len(storages)


def test_a_loaded_network_trains(tmp_path: Path) -> None:
    for checkpoint in (make(), quantized(make(), "affine-u8", axis=0)):
        model = again(checkpoint, tmp_path / "a.pt").model.train()
        before = model.conv.weight.clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(INPUT).square().sum().backward()
        optimizer.step()
        assert not torch.equal(before, model.conv.weight)
        (tmp_path / "a.pt").unlink()


def test_frozen_parameters_are_as_the_architecture_says(tmp_path: Path) -> None:
    checkpoint = make()
    checkpoint.model.conv.weight.requires_grad_(False)
    loaded = again(checkpoint, tmp_path / "a.pt")
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_history_and_spec_survive_every_field(tmp_path: Path) -> None:
    parent = Parent(path="a.pt", content="0" * 64, file="1" * 64)
    step = Step(
        verb="prune",
        options={"rate": 0.5, "names": ["é", "\u2028"], "nested": {"a": None, "b": [1, 2.5, True]}},
        seed=7,
        parent=parent,
        others={"teacher": parent},
        versions={"cctool": "0", "torch": "2"},
        before=Size(parameters=10, macs=5, bytes=40),
        after=Size(parameters=5),
        metrics_before=(Metrics(split="test", n=3, values={"top1": 66.7}),),
        metrics_after=(Metrics(split="test", n=3, values={"top1": 33.3, "loss": float("nan")}),),
        notes=("one", "two"),
    )
    spec = ModelSpec(
        architecture="toy",
        arguments={"width": 4},
        input_shape=(1, 6, 6),
        classes=("ä", "b", "c"),
        preprocessing=Preprocessing(mean=(0.1,), std=(1 / 3,)),
        data="folder:/tmp/ä",
    )
    checkpoint = replace(make(), spec=spec, history=(STEP,)).with_step(step)
    for suffix in SUFFIXES:
        loaded = again(checkpoint, tmp_path / f"a{suffix}")
        assert loaded.spec == spec
        assert loaded.history == (STEP, step)
    assert "loss" not in step.metrics_after[0].values


def test_resume_state_survives_in_pt_only(tmp_path: Path) -> None:
    tensors = {
        "conv.weight": torch.randn(3),
        "rng": torch.arange(5, dtype=torch.uint8),
        "step": torch.tensor(3.0),
    }
    state = {"epoch": 3, "best": None, "losses": [0.5, 0.25]}
    checkpoint = replace(make(), resume=ResumeState(tensors, state))
    loaded = again(checkpoint, tmp_path / "a.pt")
    assert loaded.resume is not None
    assert loaded.resume.state == state
    assert all(torch.equal(loaded.resume.tensors[name], value) for name, value in tensors.items())
    save(loaded, tmp_path / "b.pt", TABLES)
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()
    with pytest.raises(CheckpointError, match=r"write a \.pt file"):
        save(checkpoint, tmp_path / "a.safetensors", TABLES)


def test_others_read_a_dense_file_without_cctool(tmp_path: Path) -> None:
    checkpoint = make()
    save(checkpoint, tmp_path / "a.pt", TABLES)
    save(checkpoint, tmp_path / "a.safetensors", TABLES)
    document = torch.load(tmp_path / "a.pt", weights_only=True)
    assert json.loads(document["spec"])["architecture"] == "toy"
    fresh = Toy()
    fresh.load_state_dict(document["model"], strict=True)
    assert_same_tensors(fresh, checkpoint.model)
    fresh.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
    assert_same_tensors(fresh, checkpoint.model)
    mapped = torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)["model"]
    assert torch.equal(mapped["fc.weight"], checkpoint.model.fc.weight)


def test_the_large_dense_tensors_of_an_encoded_file_open_without_cctool(tmp_path: Path) -> None:
    checkpoint = quantized(make(), "affine-u8", axis=None)
    checkpoint.model.register_buffer("large", torch.randn(2000))
    save(checkpoint, tmp_path / "a.pt", TABLES)
    document = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(document["model"]) == ["large"]
    assert torch.equal(document["model"]["large"], checkpoint.model.large)


def test_stored_tensors_must_be_what_the_model_holds(tmp_path: Path) -> None:
    checkpoint = quantized(make(), "affine-u8", axis=None)
    with torch.no_grad():
        checkpoint.model.conv.weight.mul_(2)
    with pytest.raises(CheckpointError, match=r"conv\.weight: its stored form"):
        save(checkpoint, tmp_path / "a.pt", TABLES)
    assert not (tmp_path / "a.pt").exists()
    unknown = replace(make(), stored={"no.such": checkpoint.stored["conv.weight"]})
    with pytest.raises(CheckpointError, match=r"no\.such"):
        save(unknown, tmp_path / "a.pt", TABLES)


@pytest.mark.parametrize("name", ["a", "a.bin", "a.PT", "a.ccz"])
def test_unknown_suffixes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.pt or \.safetensors"):
        save(make(), tmp_path / name, TABLES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_cannot_be_stored_is_named(suffix: str, tmp_path: Path) -> None:
    sparse, lazy, complex_, infinite = make(), make(), make(), make()
    sparse.model.register_buffer("odd", torch.eye(3).to_sparse())
    lazy.model.register_module("lazy", nn.LazyLinear(3))
    complex_.model.register_buffer("odd", torch.zeros(3, dtype=torch.complex128))
    infinite = replace(infinite, history=(Step(verb="x", options={}, seed=0),))
    infinite.history[0].options["lr"] = float("inf")
    for checkpoint, message in ((sparse, "odd: a torch.sparse"), (lazy, "no values yet"), (infinite, "JSON")):
        with pytest.raises(CheckpointError, match=message):
            save(checkpoint, tmp_path / f"a{suffix}", TABLES)
    if suffix == ".safetensors":
        with pytest.raises(CheckpointError, match="cannot hold"):
            save(complex_, tmp_path / f"a{suffix}", TABLES)
    assert not list(tmp_path.iterdir())
