"""The swap edit: what a file says of replaced layers, and what a hostile one may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import CorruptCheckpointError, SpecError
from cctool.checkpoint.build import build_fresh, instantiate
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.edits.mask import MASK, add_masks, masks_of, with_masks
from cctool.checkpoint.edits.thin import THIN
from cctool.checkpoint.spec import ModelSpec
from cctool.checkpoint.tables import Tables
from cctool.options.transform.choices import Axes
from cctool.quantization.encodings.table import ENCODINGS
from cctool.transforms.layers.base import with_swaps
from cctool.transforms.layers.build import coefficient_layer
from cctool.transforms.layers.coefficients import CoefficientLayer, Coefficients
from cctool.transforms.layers.which import transformed_axes
from cctool.transforms.swap import SWAP, put_in_place


class Toy(nn.Module):
    """A convolution, the same linear layer twice, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.fc = nn.Linear(8, 8)
        self.again = self.fc
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        result: Tensor = self.classifier(torch.relu(self.again(torch.relu(self.fc(x)))))
        return result


TABLES = Tables(
    build=lambda name, arguments: Toy(),
    edits={"thin": THIN, "swap": SWAP, "mask": MASK},
    encodings=ENCODINGS,
)
SPEC = ModelSpec(architecture="toy", input_shape=(1, 6, 6))


def toy(kernel: str = "dct", *, masked: bool = True) -> Checkpoint:
    torch.manual_seed(0)
    model = Toy().eval()
    for name in ("conv", "fc", "classifier"):
        layer = model.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        axes = transformed_axes(weight, kernel, axes=Axes.BOTH, block=4, levels=None)
        put_in_place(model, name, coefficient_layer(layer, Coefficients(axes=axes)))
    if masked:
        coefficients = model.get_parameter("fc.coefficients").detach()
        add_masks(model, {"fc.coefficients": coefficients.abs() > 0.1})
    return Checkpoint(model.eval(), with_masks(with_swaps(SPEC, model), model))


def logits(checkpoint: Checkpoint) -> Tensor:
    with torch.no_grad():
        result: Tensor = checkpoint.model.eval()(torch.linspace(-1, 1, 72).reshape(2, 1, 6, 6))
    return result


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kernel", ["dct", "klt", "db2"])
def test_replaced_layers_come_back(kernel: str, suffix: str, tmp_path: Path) -> None:
    checkpoint = toy(kernel)
    save(checkpoint, tmp_path / f"a{suffix}", TABLES)
    loaded = load(tmp_path / f"a{suffix}", TABLES)
    assert torch.equal(logits(checkpoint), logits(loaded))
    assert loaded.model.get_submodule("again") is loaded.model.get_submodule("fc")
    assert list(masks_of(loaded.model)) == ["fc.coefficients"]
    assert not loaded.model.training
    assert with_masks(with_swaps(loaded.spec, loaded.model), loaded.model) == loaded.spec
    assert [edit["module"] for edit in loaded.spec.edits if edit["kind"] == "swap"] == [
        "conv",
        "fc",
        "classifier",
    ]


def test_the_edit_builds_on_the_meta_device_and_a_fresh_network_keeps_its_initialisation() -> None:
    checkpoint = toy(masked=False)
    tensors = checkpoint.model.state_dict()
    built = instantiate(checkpoint.spec, TABLES, tensors)
    assert all(parameter.is_meta for parameter in built.parameters())
    torch.manual_seed(7)
    plain = Toy()
    torch.manual_seed(7)
    fresh = build_fresh(checkpoint.spec, TABLES)
    layer = fresh.get_submodule("conv")
    assert isinstance(layer, CoefficientLayer)
    torch.testing.assert_close(layer.weight, plain.conv.weight)


def edited(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], None]) -> Checkpoint:
    """The same tensors under a changed spec."""
    edits = []
    for edit in checkpoint.spec.model_dump(mode="json")["edits"]:
        change(edit)
        edits.append(edit)
    return replace(checkpoint, spec=checkpoint.spec.model_copy(update={"edits": tuple(edits)}))


def axis_of(module: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(edit: dict[str, Any]) -> None:
        if edit["kind"] == "swap" and edit["module"] == module:
            edit["arguments"]["axes"][0] |= values

    return change


def named(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(edit: dict[str, Any]) -> None:
        if edit["kind"] == "swap" and edit["module"] == "conv":
            edit |= values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (named(layer="torch.nn.Linear"), "unknown layer"),
        (named(module="nowhere"), "no module 'nowhere'"),
        (named(module=""), "not of Toy"),
        (named(arguments={}), "malformed"),
        (named(surprise=1), "malformed"),
        (axis_of("conv", kernel="__import__"), "--kernel __import__"),
        (axis_of("conv", size=9), "the edit says 9"),
        (axis_of("conv", kept=3), "lacks|has"),
        (axis_of("conv", rows=True), "lacks conv.rows_0"),
        (axis_of("conv", size=2**31 - 1, rows=True, block=None, kept=8), "much larger network"),
        (axis_of("conv", size=2**31 - 1, rows=True, block=2**31 - 1, kept=2**31 - 1), "much larger network"),
        (axis_of("fc", kernel="klt"), "fc.basis_0"),
    ],
)
def test_hostile_edits_are_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    save(edited(toy(), change), tmp_path / "a.pt", TABLES)
    with pytest.raises(SpecError, match=message):
        load(tmp_path / "a.pt", TABLES)


@pytest.mark.parametrize("row", [-1, 8])
def test_rows_outside_their_axis_are_refused(row: int, tmp_path: Path) -> None:
    checkpoint = toy()
    layer = checkpoint.model.get_submodule("conv")
    assert isinstance(layer, CoefficientLayer)

    class Cut:
        dim, keep = 0, torch.arange(8)

    cut = layer.taken({"weight": (Cut(),)})
    put_in_place(checkpoint.model, "conv", cut)
    checkpoint = replace(checkpoint, spec=with_swaps(checkpoint.spec, checkpoint.model))
    save(checkpoint, tmp_path / "fine.pt", TABLES)
    assert torch.equal(logits(load(tmp_path / "fine.pt", TABLES)), logits(checkpoint))
    cut.get_buffer("rows_0")[3] = row
    save(checkpoint, tmp_path / "a.pt", TABLES)
    with pytest.raises(CorruptCheckpointError, match="rows_0 names places that the axis of 8"):
        load(tmp_path / "a.pt", TABLES)


def test_a_network_that_is_one_layer_cannot_be_replaced() -> None:
    with pytest.raises(SpecError, match="single layer"):
        put_in_place(nn.Linear(2, 2), "", nn.Linear(2, 2))
