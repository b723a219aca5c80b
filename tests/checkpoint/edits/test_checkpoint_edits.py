"""The thin edit, and edits that nobody knows."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import SpecError
from cctool.checkpoint.build import build_fresh
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.edits.head import fresh_head
from cctool.checkpoint.edits.thin import Thin, thin_edits
from cctool.checkpoint.edits.thin import thinned as record_cut
from cctool.checkpoint.spec import ModelSpec
from checkpoint_toys import INPUT, TABLES, Tied, Toy, assert_same_tensors, cut, logits, make, quantized

KEEP = torch.tensor([0, 2, 3, 5, 6])


@dataclass(frozen=True)
class Left:
    """Indices of a dim that a cut leaves."""

    dim: int
    keep: Tensor


class Ramp(nn.Module):
    """A weight beside a buffer that no file holds: 0, 1, ... 7."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.register_buffer("ramp", torch.arange(8.0), persistent=False)


def thinned(width: int = 8) -> Checkpoint:
    return cut(make(width=width), KEEP)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_thinned_network_is_built_again(suffix: str, tmp_path: Path) -> None:
    checkpoint = thinned()
    save(checkpoint, tmp_path / f"a{suffix}", TABLES)
    loaded = load(tmp_path / f"a{suffix}", TABLES)
    assert_same_tensors(checkpoint.model, loaded.model)
    assert torch.equal(logits(checkpoint), logits(loaded))
    assert loaded.model.depthwise.groups == len(KEEP)
    loaded.model.train()(INPUT).sum().backward()


def test_a_thinned_and_quantized_network_is_built_again(tmp_path: Path) -> None:
    checkpoint = quantized(thinned(), "affine-u8", axis=0)
    save(checkpoint, tmp_path / "a.pt", TABLES)
    assert torch.equal(logits(checkpoint), logits(load(tmp_path / "a.pt", TABLES)))


def test_the_last_edit_of_a_module_stands() -> None:
    spec = ModelSpec(architecture="toy", arguments={"width": 8}, input_shape=(1, 6, 6))
    first = spec.with_edits((Thin(module="fc", shapes={"weight": (3, 6)}),))
    second = first.with_edits((Thin(module="fc", shapes={"weight": (3, 5)}), Thin(module="bn")))
    assert [edit["module"] for edit in second.edits] == ["fc", "bn"]
    assert build_fresh(second, TABLES).fc.weight.shape == (3, 5)


def test_thinning_a_tied_parameter_thins_all_its_places() -> None:
    spec = ModelSpec(architecture="tied", input_shape=(1, 6, 6))
    spec = spec.with_edits((Thin(module="encode", shapes={"weight": (6, 8)}),))
    model = build_fresh(spec, TABLES)
    assert isinstance(model, Tied)
    assert model.encode.weight is model.decode.weight
    assert model.decode.weight.shape == (6, 8)


def test_a_cut_nonpersistent_buffer_keeps_its_values() -> None:
    spec = ModelSpec(architecture="hidden", arguments={"scale": 2.0}, input_shape=(1, 6, 6))
    spec = spec.with_edits((Thin(module="", shapes={"scale": (3,)}),))
    assert torch.equal(build_fresh(spec, TABLES).scale, torch.full((3,), 2.0))


def refused(edit: dict[str, Any], message: str) -> None:
    spec = ModelSpec(architecture="toy", arguments={"width": 8}, input_shape=(1, 6, 6), edits=(edit,))
    with pytest.raises(SpecError, match=message):
        build_fresh(spec, TABLES)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"module": "nobody", "shapes": {"weight": [1]}}, "no module 'nobody'"),
        ({"module": "fc", "shapes": {"nothing": [1]}}, "no tensor 'nothing'"),
        ({"module": "fc", "shapes": {"weight": [3, 9]}}, "cannot be cut"),
        ({"module": "fc", "shapes": {"weight": [3]}}, "cannot be cut"),
        ({"module": "fc", "shapes": {"weight": [3, 0]}}, "malformed"),
        ({"module": "fc", "shapes": {"weight": [3, 1.5]}}, "malformed"),
        ({"module": "fc", "attributes": {"in_features": 9}}, "cannot grow"),
        ({"module": "conv", "attributes": {"kernel_size": [3, 4]}}, "cannot grow"),
        ({"module": "conv", "attributes": {"kernel_size": [3]}}, "not an integer attribute"),
        ({"module": "conv", "attributes": {"padding_mode": 3}}, "not an integer attribute"),
        ({"module": "bn", "attributes": {"affine": 1}}, "not an integer attribute"),
        ({"module": "bn", "attributes": {"forward": 1}}, "not an integer attribute"),
        ({"module": "bn", "attributes": {"_version": 1}}, "not an integer attribute"),
        ({"module": "bn", "attributes": {"num_features": -1}}, "malformed"),
        ({"module": "bn", "surprise": 1}, "malformed"),
        ({"shapes": {}}, "malformed"),
    ],
)
def test_what_thin_refuses(edit: dict[str, Any], message: str) -> None:
    refused({"kind": "thin", **edit}, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"module": "nothing", "outputs": 5}, "no module 'nothing'"),
        ({"module": "", "outputs": 5}, "a Toy cannot be given another number of outputs"),
        ({"module": "bn", "outputs": 5}, "a BatchNorm2d cannot be given another number of outputs"),
        ({"module": "depthwise", "outputs": 8}, "a Conv2d cannot be given another number of outputs"),
        ({"module": "fc", "outputs": 0}, "malformed"),
        ({"module": "fc", "outputs": 2.5}, "malformed"),
        ({"module": "fc"}, "malformed"),
    ],
)
def test_what_head_refuses(edit: dict[str, Any], message: str) -> None:
    refused({"kind": "head", **edit}, message)


def test_a_last_layer_that_the_file_does_not_hold_is_not_built(tmp_path: Path) -> None:
    checkpoint = make()
    for outputs, message in ((5, "do not fit"), (2**30, "much larger network than the tensors")):
        edit = {"kind": "head", "module": "fc", "outputs": outputs}
        spec = checkpoint.spec.model_copy(update={"edits": (edit,)})
        save(replace(checkpoint, spec=spec), tmp_path / f"{outputs}.pt", TABLES)
        with pytest.raises(SpecError, match=message):
            load(tmp_path / f"{outputs}.pt", TABLES)


def test_a_last_layer_keeps_the_settings_of_the_one_before() -> None:
    before = nn.Conv2d(3, 4, (3, 5), stride=2, padding=1, dilation=2, bias=False, padding_mode="reflect")
    made = fresh_head(before.double(), 7)
    assert isinstance(made, nn.Conv2d)
    settings = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "bias", "in_channels")
    assert all(getattr(made, name) == getattr(before, name) for name in settings)
    assert (made.weight.shape, made.weight.dtype) == ((7, 3, 3, 5), torch.float64)


@pytest.mark.parametrize("edit", [{"kind": "telepathy", "module": "fc"}, {"module": "fc"}, {"kind": None}])
def test_unknown_edits_are_refused_by_name(edit: dict[str, Any], tmp_path: Path) -> None:
    refused(edit, f"unknown edit {edit.get('kind')!r}")
    checkpoint = make()
    spec = checkpoint.spec.model_copy(update={"edits": (edit,)})
    save(replace(checkpoint, spec=spec), tmp_path / "a.pt", TABLES)
    with pytest.raises(SpecError, match="newer cctool"):
        load(tmp_path / "a.pt", TABLES)


def test_thin_edits_name_only_what_was_asked_for() -> None:
    model = Toy(width=4)
    (edit,) = thin_edits(model, ["fc.weight"], [("fc", "in_features")])
    assert edit == Thin(module="fc", shapes={"weight": (3, 4)}, attributes={"in_features": 4})


def test_a_buffer_that_no_file_holds_keeps_the_channels_that_two_cuts_left(tmp_path: Path) -> None:
    """Its first values would be those of other channels."""
    checkpoint = replace(make(), spec=ModelSpec(architecture="ramp", input_shape=(1, 6, 6)), model=Ramp())
    for keep in ([1, 2, 5, 7], [0, 2]):
        cuts = {"ramp": (Left(0, torch.tensor(keep)),), "weight": (Left(0, torch.tensor(keep)),)}
        with torch.no_grad():
            checkpoint.model.ramp = checkpoint.model.ramp[keep]
            checkpoint.model.weight = nn.Parameter(checkpoint.model.weight[keep])
        checkpoint = replace(checkpoint, spec=record_cut(checkpoint.spec, checkpoint.model, cuts, []))
    (edit,) = checkpoint.spec.edits
    assert edit["kept"] == {"ramp": [[0, [1, 5]]]}
    registry = replace(TABLES, build=lambda *arguments, **named: Ramp())
    for suffix in (".pt", ".safetensors"):
        save(checkpoint, tmp_path / f"a{suffix}", registry)
        assert load(tmp_path / f"a{suffix}", registry).model.ramp.tolist() == [1, 5]


@pytest.mark.parametrize("indices", [[1, 9], [5, 1], [1, 1], [1], []])
def test_indices_that_a_buffer_does_not_have_are_refused(indices: list[int]) -> None:
    edit = Thin(module="", shapes={"scale": (2,)}, kept={"scale": ((0, tuple(indices)),)})
    spec = ModelSpec(architecture="hidden", arguments={"scale": 2.0}, input_shape=(1, 6, 6))
    with pytest.raises(SpecError, match="no such indices"):
        build_fresh(spec.with_edits((edit,)), TABLES)
