"""Files that others wrote: their wrappers, prefixes, formats, types and old names."""

import io
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cctool.base.errors import CheckpointError, SpecError
from cctool.checkpoint.checkpoint import Checkpoint, build, load, open_file, save
from cctool.checkpoint.foreign import match_names
from cctool.checkpoint.spec import ModelSpec
from cctool.operations.registries import tables
from checkpoint_toys import TABLES, Hidden, Tied, Toy, assert_same_tensors, logits, make


def opened(path: Path, name: str = "toy", **switches: bool) -> Checkpoint:
    spec = ModelSpec(architecture=name, input_shape=(1, 6, 6))
    return build(open_file(path, **switches), spec, TABLES)


def state() -> OrderedDict[str, Tensor]:
    return OrderedDict(make().model.state_dict())


def prefixed(prefix: str) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + name, value) for name, value in state().items())


WRITTEN: dict[str, Any] = {
    "bare": state(),
    "state_dict": {"state_dict": state(), "epoch": 3},
    "model": {"model": state(), "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "lr": 0.1},
    "nested": {"checkpoint": 1, "model": {"state_dict": state()}},
    "data parallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled and parallel": prefixed("_orig_mod.module."),
    "lightning": {"state_dict": prefixed("model."), "hparams": {"lr": 0.1}},
    "parameters": {name: nn.Parameter(v) if v.is_floating_point() else v for name, v in state().items()},
    "counter as float": {name: v if v.is_floating_point() else v.float() for name, v in state().items()},
    "counter as int32": {name: v if v.is_floating_point() else v.int() for name, v in state().items()},
    "before torch 0.4.1": OrderedDict((n, v) for n, v in state().items() if "num_batches" not in n),
    "float64": OrderedDict((n, v.double() if v.is_floating_point() else v) for n, v in state().items()),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_others_write(name: str, legacy: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
        torch.save(WRITTEN[name], tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    checkpoint = opened(tmp_path / "a.pth")
    assert_same_tensors(checkpoint.model, make().model)
    assert torch.equal(logits(checkpoint), logits(make()))
    assert checkpoint.origin is not None
    assert checkpoint.origin.content is None
    assert checkpoint.history == ()
    save(checkpoint, tmp_path / "b.pt", TABLES)
    assert torch.equal(logits(load(tmp_path / "b.pt", TABLES)), logits(make()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_out_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    halves = {name: v.to(dtype) if v.is_floating_point() else v for name, v in state().items()}
    torch.save(halves, tmp_path / "a.pt")
    save_file(halves, tmp_path / "a.safetensors")
    for suffix in (".pt", ".safetensors"):
        model = opened(tmp_path / f"a{suffix}").model
        assert model.fc.weight.dtype == torch.float32
        assert torch.equal(model.fc.weight, halves["fc.weight"].float())


def test_safetensors_of_others(tmp_path: Path) -> None:
    save_file(dict(state()), tmp_path / "a.safetensors", metadata={"format": "pt", "made by": "someone"})
    assert_same_tensors(opened(tmp_path / "a.safetensors").model, make().model)
    save_file(dict(prefixed("module.")), tmp_path / "b.safetensors")
    assert_same_tensors(opened(tmp_path / "b.safetensors").model, make().model)


def test_a_whole_module_with_trust(tmp_path: Path) -> None:
    torch.save(make().model, tmp_path / "a.pt")
    assert_same_tensors(opened(tmp_path / "a.pt", trust_pickle=True).model, make().model)
    torch.save({"model": make().model, "epoch": 1}, tmp_path / "b.pt")
    assert_same_tensors(opened(tmp_path / "b.pt", trust_pickle=True).model, make().model)


def test_pickles_that_fail_even_when_trusted(tmp_path: Path) -> None:
    content = io.BytesIO()
    torch.save(make().model, content)
    (tmp_path / "a.pt").write_bytes(content.getvalue().replace(b"checkpoint_toys", b"checkpoint_tofu"))
    with pytest.raises(CheckpointError, match="cannot be unpickled"):
        opened(tmp_path / "a.pt", trust_pickle=True)


def test_a_prefix_that_is_the_architectures_own_stays() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Toy()

    model = Wrapped()
    own = dict(model.state_dict())
    assert match_names(model, own).keys() == own.keys()
    parallel = {f"module.{name}": value for name, value in own.items()}
    assert match_names(model, parallel).keys() == own.keys()


def _old_densenet(name: str) -> str:
    return name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.")


def _old_transformer(name: str) -> str:
    return name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")


@pytest.mark.parametrize(
    ("reference", "rename"),
    [("torchvision:densenet121", _old_densenet), ("torchvision:vit_b_32", _old_transformer)],
)
def test_old_names_of_published_networks(reference: str, rename: Callable[[str], str]) -> None:
    with torch.device("meta"):
        model = tables().build(reference, {})
    expected = model.state_dict()
    old = {rename(name): value for name, value in expected.items()}
    assert old.keys() != expected.keys()
    found = match_names(model, old)
    assert found.keys() == expected.keys()
    assert all(found[name].shape == value.shape for name, value in expected.items())


def test_torchvision_resnet18_without_batch_counters(tmp_path: Path) -> None:
    spec = ModelSpec(architecture="torchvision:resnet18", input_shape=(3, 224, 224))
    model = tables().build("torchvision:resnet18", {})
    published = OrderedDict((n, v) for n, v in model.state_dict().items() if "num_batches" not in n)
    assert len(published) == 102
    torch.save(published, tmp_path / "resnet18.pth")
    loaded = build(open_file(tmp_path / "resnet18.pth"), spec, tables()).model
    assert_same_tensors(loaded, model)


def test_a_tied_weight_saved_as_half_is_tied_again(tmp_path: Path) -> None:
    torch.save({name: value.half() for name, value in Tied().state_dict().items()}, tmp_path / "a.pt")
    model = opened(tmp_path / "a.pt", "tied").model
    assert model.encode.weight is model.decode.weight


def test_a_tied_weight_with_nan_is_tied_again(tmp_path: Path) -> None:
    content = {name: value.clone() for name, value in Tied().state_dict().items()}
    content["encode.weight"][0, 0] = content["decode.weight"][0, 0] = float("nan")
    save_file(content, tmp_path / "a.safetensors")
    assert opened(tmp_path / "a.safetensors", "tied").model.encode.weight.isnan().sum() == 1


def test_integers_for_weights_are_taken_only_if_exact(tmp_path: Path) -> None:
    content = dict(Hidden().state_dict())
    content["seen"] = torch.tensor(7.5)
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(
        SpecError, match=r"seen is torch\.float32 in the file, torch\.int64 in the architecture"
    ):
        opened(tmp_path / "a.pt", "hidden")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds nothing"),
        ([], "holds list"),
        ({"epoch": 1, "lr": 0.1}, "it holds epoch, lr"),
        ({"state_dict": {"a": 1}}, "no state dict"),
        ({1: torch.zeros(2)}, "no state dict"),
        (torch.zeros(3), "holds Tensor"),
    ],
)
def test_files_without_a_state_dict(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path / "a.pt")


def test_the_names_that_do_not_fit_are_said(tmp_path: Path) -> None:
    content = prefixed("module.")
    content["module.head.weight"] = content.pop("module.fc.weight")
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(SpecError, match=r"lacks fc\.weight; has unexpected head\.weight"):
        opened(tmp_path / "a.pt")


def test_loading_a_foreign_file_without_naming_its_network(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="name it with --arch"):
        load(tmp_path / "a.pt", TABLES)
