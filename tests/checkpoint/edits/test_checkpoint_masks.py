"""The mask edit: what a file says of masks, and what a hostile one may not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cctool.base.errors import CorruptCheckpointError, SpecError
from cctool.checkpoint.build import build_fresh, instantiate
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.edits.mask import (
    Mask,
    add_masks,
    drop_masks,
    mask_buffers,
    masked_places,
    masks_of,
    with_masks,
    zero_masked,
)
from cctool.checkpoint.edits.thin import thinned
from cctool.checkpoint.spec import ModelSpec
from checkpoint_toys import INPUT, TABLES, Toy, assert_same_tensors, cut, logits, make, masked

KEEP = torch.tensor([0, 2, 3, 5, 6])


def some(shape: torch.Size, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def toy(width: int = 8) -> Checkpoint:
    checkpoint = make(width=width)
    names = ("conv.weight", "depthwise.bias", "fc.weight")
    shapes = dict(checkpoint.model.named_parameters())
    return masked(checkpoint, {name: some(shapes[name].shape, n) for n, name in enumerate(names)})


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("compact", [True, False])
def test_masks_come_back(suffix: str, compact: bool, tmp_path: Path) -> None:
    checkpoint = toy()
    if not compact:
        checkpoint = replace(checkpoint, stored={})
    save(checkpoint, tmp_path / f"a{suffix}", TABLES)
    loaded = load(tmp_path / f"a{suffix}", TABLES)
    assert_same_tensors(checkpoint.model, loaded.model)
    assert torch.equal(logits(checkpoint), logits(loaded))
    found = masks_of(loaded.model)
    assert list(found) == ["conv.weight", "depthwise.bias", "fc.weight"]
    for name, mask in found.items():
        assert mask.dtype == torch.bool
        assert not loaded.model.get_parameter(name)[~mask].any()
    if compact:
        # The bits lie in the file once.
        assert loaded.stored["fc.weight"].parts["bits"] is loaded.stored["fc.weight_mask"].parts["bits"]
    loaded.model.train()(INPUT).sum().backward()


def test_the_order_of_edits_does_not_matter(tmp_path: Path) -> None:
    checkpoint = cut(make(width=8), KEEP)
    checkpoint = masked(checkpoint, {"fc.weight": some(torch.Size([3, 5]))})
    spec = checkpoint.spec
    for edits in (spec.edits, spec.edits[::-1]):
        turned = replace(checkpoint, spec=spec.model_copy(update={"edits": edits}))
        save(turned, tmp_path / "a.pt", TABLES, overwrite=True)
        assert torch.equal(logits(load(tmp_path / "a.pt", TABLES)), logits(checkpoint))


def test_thin_edits_never_list_masks() -> None:
    checkpoint = toy()
    spec = thinned(checkpoint.spec, checkpoint.model, ["fc.weight", "fc.weight_mask"], [])
    (edit,) = [edit for edit in spec.edits if edit["kind"] == "thin"]
    assert list(edit["shapes"]) == ["weight"]  # type: ignore[call-overload]


def test_masking_again_keeps_both_masks() -> None:
    model = Toy(width=8)
    first, second = some(model.fc.weight.shape, 1), some(model.fc.weight.shape, 2)
    add_masks(model, {"fc.weight": first})
    add_masks(model, {"fc.weight": second})
    assert torch.equal(masks_of(model)["fc.weight"], first & second)
    assert torch.equal(model.fc.weight != 0, first & second)


def test_masks_are_dropped_and_zeroed_on_demand() -> None:
    model = Toy(width=8)
    add_masks(model, {"fc.weight": some(model.fc.weight.shape), "fc.bias": torch.tensor([True, False, True])})
    with torch.no_grad():
        model.fc.weight.fill_(1)
    zero_masked(model)
    assert torch.equal(model.fc.weight != 0, masks_of(model)["fc.weight"])
    drop_masks(model, ["fc.weight"])
    assert list(masks_of(model)) == ["fc.bias"]
    assert "fc.weight_mask" not in model.state_dict()
    spec = with_masks(ModelSpec(architecture="toy", arguments={"width": 8}, input_shape=(1, 6, 6)), model)
    assert [edit["tensors"] for edit in spec.edits] == [["bias"]]
    drop_masks(model, ["fc.bias"])
    assert with_masks(spec, model).edits == ()


def test_a_tied_weight_has_one_mask_and_a_shared_module_one_under_each_name(tmp_path: Path) -> None:
    checkpoint = make("tied")
    mask = some(torch.Size([8, 8]))
    checkpoint = masked(checkpoint, {"encode.weight": mask, "norm.weight": mask[0]})
    assert mask_buffers(checkpoint.model) == {"encode.weight_mask", "norm.weight_mask", "again.weight_mask"}
    assert [place.name for place in masked_places(checkpoint.model)] == ["encode.weight", "norm.weight"]
    dense = replace(checkpoint, stored={})
    save(dense, tmp_path / "a.pt", TABLES)
    loaded = load(tmp_path / "a.pt", TABLES)
    assert loaded.model.decode.weight is loaded.model.encode.weight
    assert torch.equal(loaded.model.decode.weight != 0, mask)


class Own(nn.Module):
    """Has a buffer called as a mask would be, in which True means something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("weight_mask", torch.tensor([True, False, True]))


def test_a_networks_own_mask_is_none_of_ours() -> None:
    model = Own()
    assert masks_of(model) == {}
    zero_masked(model)
    assert model.weight.sum() == 3
    with pytest.raises(SpecError, match="'weight_mask' of its own"):
        add_masks(model, {"weight": torch.tensor([True, True, False])})


def test_a_bare_state_dict_gets_its_masks_from_its_zeros(tmp_path: Path) -> None:
    from cctool.checkpoint.checkpoint import build, open_file

    checkpoint = toy()
    bare = {n: v for n, v in checkpoint.model.state_dict().items() if n not in mask_buffers(checkpoint.model)}
    torch.save(bare, tmp_path / "bare.pt")
    loaded = build(open_file(tmp_path / "bare.pt"), checkpoint.spec, TABLES)
    assert_same_tensors(checkpoint.model, loaded.model)


def refused(edit: dict[str, Any], message: str) -> None:
    spec = ModelSpec(architecture="toy", arguments={"width": 8}, input_shape=(1, 6, 6), edits=(edit,))
    with pytest.raises(SpecError, match=message):
        build_fresh(spec, TABLES)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"module": "nobody", "tensors": ["weight"]}, "no module 'nobody'"),
        ({"module": "fc", "tensors": ["nothing"]}, "no parameter 'nothing'"),
        ({"module": "", "tensors": ["fc.weight"]}, "no parameter 'fc.weight'"),
        ({"module": "bn", "tensors": ["running_mean"]}, "no parameter 'running_mean'"),
        ({"module": "conv", "tensors": ["bias"]}, "no parameter 'bias'"),
        ({"module": "fc", "tensors": ["forward"]}, "no parameter 'forward'"),
        ({"module": "fc", "tensors": ["weight", "weight"]}, "'weight_mask' of its own"),
        ({"module": "fc", "tensors": []}, "malformed"),
        ({"module": "fc", "tensors": [3]}, "malformed"),
        ({"module": "fc", "tensors": ["w"] * 1001}, "malformed"),
        ({"module": "fc"}, "malformed"),
        ({"module": "fc", "tensors": ["weight"], "surprise": 1}, "malformed"),
        ({"tensors": ["weight"]}, "malformed"),
    ],
)
def test_what_mask_refuses(edit: dict[str, Any], message: str) -> None:
    refused({"kind": "mask", **edit}, message)


def without(name: str) -> Callable[[Checkpoint], Checkpoint]:
    """A checkpoint whose model lost a tensor that its spec speaks of."""

    def change(checkpoint: Checkpoint) -> Checkpoint:
        del checkpoint.model.fc._buffers[name]
        stored = {key: form for key, form in checkpoint.stored.items() if key != f"fc.{name}"}
        return replace(checkpoint, stored=stored)

    return change


def misshapen(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.model.fc._buffers["weight_mask"] = torch.ones(8, 3, dtype=torch.bool)
    return replace(checkpoint, stored={})


def unannounced(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, spec=checkpoint.spec.model_copy(update={"edits": ()}))


@pytest.mark.parametrize("change", [without("weight_mask"), misshapen, unannounced])
def test_tensors_that_contradict_the_edit_are_refused(
    change: Callable[[Checkpoint], Checkpoint], tmp_path: Path
) -> None:
    save(change(toy()), tmp_path / "a.pt", TABLES)
    with pytest.raises(SpecError, match="weight_mask"):
        load(tmp_path / "a.pt", TABLES)


def test_masks_of_another_kind_of_number_are_refused(tmp_path: Path) -> None:
    checkpoint = replace(toy(), stored={})
    checkpoint.model.fc._buffers["weight_mask"] = torch.full((3, 8), 0.5)
    save(checkpoint, tmp_path / "a.pt", TABLES)
    with pytest.raises(SpecError, match="weight_mask"):
        load(tmp_path / "a.pt", TABLES)


def test_a_weight_that_is_not_zero_under_its_mask_is_refused(tmp_path: Path) -> None:
    checkpoint = replace(toy(), stored={})
    with torch.no_grad():
        checkpoint.model.fc.weight.fill_(1)
    save(checkpoint, tmp_path / "a.pt", TABLES)
    with pytest.raises(CorruptCheckpointError, match=r"fc\.weight is not zero where its mask says so"):
        load(tmp_path / "a.pt", TABLES)


def test_masks_count_against_what_a_file_may_have_built() -> None:
    # A parameter costs nothing on the meta device, its mask would.
    edit = Mask(module="0", tensors=("weight",)).model_dump(mode="json")
    spec = ModelSpec(architecture="stack", arguments={"width": 40_000}, input_shape=(1, 6, 6), edits=(edit,))
    with pytest.raises(SpecError, match="larger network than the tensors"):
        instantiate(spec, TABLES, {"0.weight": torch.zeros(1000, 1000)})
