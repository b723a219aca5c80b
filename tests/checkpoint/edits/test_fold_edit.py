"""The fold edit: applied to what the architecture builds, bounded, and never more than it says."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cctool.base.errors import CctoolError, SpecError
from cctool.checkpoint.build import build_fresh
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.edits.computed import computed_tensors, computed_values, make_plain
from cctool.checkpoint.edits.fold import MAX_KERNEL, AbsentBranch, Fold, Nothing, with_folds
from checkpoint_toys import TABLES, assert_same_tensors, logits, make
from folding_toys import NETWORKS, lively
from golden_checkpoints import folded, thinned


def with_edit(checkpoint: Checkpoint, **fields: Any) -> Checkpoint:
    """The checkpoint whose spec has one more edit, as a damaged file might have."""
    edits = (*checkpoint.spec.edits, {"kind": "fold", **fields})
    return replace(checkpoint, spec=checkpoint.spec.model_copy(update={"edits": edits}))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_folded_network_is_built_again(suffix: str, tmp_path: Path) -> None:
    for checkpoint in (folded(make("branches")), folded(make(width=8)), folded(thinned())):
        before = logits(checkpoint)
        save(checkpoint, tmp_path / f"a{suffix}", TABLES, overwrite=True)
        loaded = load(tmp_path / f"a{suffix}", TABLES)
        assert_same_tensors(checkpoint.model, loaded.model)
        assert torch.equal(before, logits(loaded))
        loaded.model.train()(torch.rand(2, 1, 6, 6)).sum().backward()
        assert all(parameter.grad is not None for parameter in loaded.model.parameters())


def test_nothing_added_leaves_what_it_is_added_to() -> None:
    nothing, value = AbsentBranch()(torch.ones(2)), torch.ones(2)
    assert isinstance(nothing, Nothing)
    assert nothing + value is value
    assert value + nothing is value
    assert sum([nothing, value, nothing]).equal(value)
    total = value
    total += nothing
    assert total is value
    total = nothing
    total += value
    assert total is value


def test_a_thin_edit_of_what_is_gone_goes_and_the_new_bias_is_cut() -> None:
    checkpoint = folded(thinned())
    thin = {edit["module"]: edit for edit in checkpoint.spec.edits if edit["kind"] == "thin"}
    assert "bn" not in thin
    assert thin["conv"]["shapes"] == {"weight": [2, 1, 3, 3], "bias": [2]}
    assert build_fresh(checkpoint.spec, TABLES).conv.bias.shape == (2,)


def test_edits_of_one_module_add_up() -> None:
    checkpoint = make("branches")
    first = with_folds(checkpoint.spec, checkpoint.model, [Fold(module="fc", plain={"weight": (3, 4)})])
    second = with_folds(first, checkpoint.model, [Fold(module="fc", bias=True)])
    assert [edit for edit in second.edits if edit["module"] == "fc"] == [
        {"kind": "fold", "module": "fc", "becomes": "layer", "plain": {"weight": [3, 4]}, "bias": True}
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"module": "none"}, "no module 'none'"),
        ({"module": "", "becomes": "nothing"}, "the network itself"),
        ({"module": "conv", "plain": {"other": [3]}}, "no tensor 'other'"),
        ({"module": "bn", "bias": True, "kernel_size": [3, 3]}, "no convolution whose kernel can grow"),
        ({"module": "conv", "kernel_size": [1, 1], "padding": [0, 0]}, "cannot shrink"),
        ({"module": "conv", "kernel_size": [3], "padding": [1]}, "no kernel of 1 axes"),
        ({"module": "conv", "kernel_size": [MAX_KERNEL + 1, 3]}, "malformed"),
        ({"module": "conv", "padding": [1, 1]}, "malformed"),
        ({"module": "conv", "becomes": "nothing", "bias": True}, "malformed"),
        ({"module": "bn", "becomes": "rest", "children": ["act"]}, "no module 'act'"),
        ({"module": "bn", "children": ["act"]}, "malformed"),
        ({"module": "bn", "becomes": "code"}, "malformed"),
        ({"module": "conv", "forward": "os.system"}, "malformed"),
        ({"module": "fc", "kernel_size": [3, 3]}, "no convolution whose kernel can grow"),
    ],
)
def test_edits_that_do_not_fit_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(with_edit(make(), **fields), tmp_path / "a.pt", TABLES)
    with pytest.raises(SpecError, match=message):
        load(tmp_path / "a.pt", TABLES)


def test_a_module_without_a_bias_to_give_is_refused(tmp_path: Path) -> None:
    save(with_edit(make("branches"), module="branches", bias=True), tmp_path / "a.pt", TABLES)
    with pytest.raises(SpecError, match="no layer that takes a bias"):
        load(tmp_path / "a.pt", TABLES)


def test_a_small_file_cannot_ask_for_large_kernels(tmp_path: Path) -> None:
    size = [MAX_KERNEL, MAX_KERNEL]
    save(with_edit(make(width=1024), module="conv", kernel_size=size), tmp_path / "a.pt", TABLES)
    with pytest.raises(SpecError, match="much larger network"):
        load(tmp_path / "a.pt", TABLES)
    plain = {"weight": [2**31 - 1, 2**31 - 1]}
    save(with_edit(make("branches"), module="fc", plain=plain), tmp_path / "b.pt", TABLES)
    with pytest.raises(SpecError, match="much larger network"):
        load(tmp_path / "b.pt", TABLES)


def test_random_edits_raise_only_our_errors(tmp_path: Path) -> None:
    source = random.Random(3)
    values: dict[str, list[Any]] = {
        "module": ["", "bn", "fc", "branches", "branches.0", "branches.9", 3],
        "becomes": ["layer", "rest", "nothing", "", None],
        "plain": [{}, {"weight": [3, 4]}, {"weight": []}, {"weight": [-1]}, {"": [1]}, {"bias": [3]}, []],
        "bias": [True, False, 2, "yes"],
        "kernel_size": [None, [3, 3], [5, 1], [0, 3], [3], [2**40, 1], "3x3"],
        "padding": [None, [1, 1], [0, 5000], [-1, 0], [1]],
        "children": [[], ["0"], ["0", "0"], ["__class__"], "0"],
    }
    checkpoint = make("branches")
    refused = 0
    for number in range(150):
        chosen = source.sample([key for key in values if key != "module"], source.randrange(1, 4))
        fields = {key: source.choice(values[key]) for key in ("module", *chosen)}
        path = tmp_path / f"{number}.pt"
        save(with_edit(checkpoint, **fields), path, TABLES)
        try:
            load(path, TABLES)
        except CctoolError:
            refused += 1
    assert 0 < refused < 150


@pytest.mark.parametrize(
    "name", [name for name in NETWORKS if name not in ("rep", "asymmetric", "over", "norms")]
)
def test_computed_tensors_become_plain_with_the_same_values(name: str) -> None:
    model = lively(NETWORKS[name]())
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        before = model(x)
    for module in list(model.modules()):
        if computed_tensors(module):
            kind = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
            make_plain(module, computed_values(module))
            assert type(module) is kind
            assert set(module._parameters) == {"weight", "bias"}
            assert not module._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_all_parametrized_tensors_of_a_module_become_plain_together() -> None:
    layer = NETWORKS["own_parametrized"]()[0]
    with pytest.raises(SpecError, match="is parametrized, too"):
        make_plain(layer, {"weight": torch.zeros(8, 1, 3, 3)})


def test_a_copy_keeps_its_parametrization_when_the_other_becomes_plain() -> None:
    from copy import deepcopy

    layer = NETWORKS["normed"]()[0]
    copy = deepcopy(layer)
    make_plain(copy, computed_values(copy))
    assert computed_tensors(layer) == {"weight": "weight_norm"}
    assert torch.equal(layer.weight, copy.weight)
    assert not list(copy.buffers())
