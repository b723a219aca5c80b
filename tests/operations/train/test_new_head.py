"""A fresh last layer for other classes, on checkpoints of every state and on files of others."""

from pathlib import Path

import pytest
import torch
from torch import nn

import cctool
from cctool.base.errors import DataError
from cctool.checkpoint.edits.mask import masks_of
from cctool.quantization.network.attach import quantizers_of
from cctool.transforms.codec.taps import taps_of
from cctool.transforms.layers.base import swapped_layers
from shade_toys import picture_folder, ran

THREE = {"red": 20, "green": 120, "blue": 220}
FAST = ("--epochs", "10", "--lr", "0.01", "--batch-size", "8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("heads")
    picture_folder(place / "three", THREE)
    line = ["--arch", "lenet", "--data", "digits", "--epochs", "1", "--limit", "256", "--batch-size", "32"]
    ran("train", *line, "-o", place / "digits.pt")
    return place


def state(place: Path, name: str) -> Path:
    """The digits network after a command that leaves it in another state."""
    lines = {
        "digits": [],
        "pruned": ["prune", "--method", "l1", "--rate", "0.5"],
        "masked": ["prune", "--granularity", "element", "--rate", "0.6"],
        "coefficients": ["transform", "--kernel", "dct", "--layers", "all"],
        "basis": ["transform", "--mode", "basis", "--kernel", "dct", "--layers", "linear"],
        "coded": ["transform", "--target", "features", "--taps", "features.3", "--data", "digits"],
        "packed": ["quantize", "--method", "int4"],
        "int8": ["quantize", "--method", "int8", "--weight-bits", "5", "--data", "digits", "--limit", "64"],
        "codebook": ["quantize", "--method", "codebook"],
        "lsq": ["quantize", "--method", "lsq", "--data", "digits", "--limit", "64", "--epochs", "1"],
    }
    made = place / f"{name}.pt"
    if not made.exists():
        verb, *options = lines[name]
        ran(verb, place / "digits.pt", *options, "-o", made)
    return made


STATES = ("digits", "pruned", "masked", "coefficients", "basis", "coded", "packed", "int8", "codebook", "lsq")


# Training may move a map out of its codec's range, which has a warning of its own.
@pytest.mark.filterwarnings("ignore:features.3. calibrated for other weights")
@pytest.mark.parametrize("name", STATES)
def test_a_checkpoint_of_any_state_learns_other_classes(place: Path, name: str) -> None:
    source, made = state(place, name), place / f"{name}.three.pt"
    said = ran("train", source, "--new-head", "--data", f"folder:{place / 'three'}", *FAST, "-o", made)
    assert "new head: classifier.2, 3 classes (was 10)" in said
    found = cctool.load(made)
    assert found.spec.classes == tuple(sorted(THREE))
    head = found.model.get_submodule("classifier.2")
    assert type(head) is nn.Linear
    assert (head.out_features, head.in_features) == (3, cctool.load(source).model.classifier[2].in_features)
    assert found.spec.input_shape == (1, 32, 32)
    assert "classifier.2.weight" not in masks_of(found.model)
    assert "classifier.2" not in swapped_layers(found.model)
    held = quantizers_of(found.model)
    if held is not None:
        assert all(not weight.startswith("classifier.2.") for weight in held.state.weights)
        assert held.state.weights
    assert found.history[-1].notes[0] == "new head: classifier.2, 3 classes (was 10)"
    assert found.history[-1].metrics_before == ()
    report = cctool.evaluate(found, data=f"folder:{place / 'three'}")
    assert report.metrics is not None
    assert report.metrics.values["top1"] > 75
    assert report.metrics.values["top1"] == pytest.approx(found.history[-1].metrics_after[-1].values["top1"])


def test_without_training_the_fresh_layer_is_all_that_changes(place: Path) -> None:
    line = [
        "train",
        place / "digits.pt",
        "--new-head",
        "--data",
        f"folder:{place / 'three'}",
        "--epochs",
        "0",
    ]
    ran(*line, "-o", place / "fresh.pt")
    ran(*line, "-o", place / "same.pt")
    ran(*line, "--seed", "1", "-o", place / "seed.pt")
    before, fresh, same, seed = (
        cctool.load(place / f"{name}.pt").model.state_dict() for name in ("digits", "fresh", "same", "seed")
    )
    assert [name for name in fresh if fresh[name].shape != before[name].shape] == [
        *("classifier.2.weight", "classifier.2.bias")
    ]
    assert all(torch.equal(fresh[n], before[n]) for n in fresh if not n.startswith("classifier.2"))
    assert all(torch.equal(fresh[name], same[name]) for name in fresh)
    assert not torch.equal(fresh["classifier.2.weight"], seed["classifier.2.weight"])
    # As torch initialises a linear layer: uniform within 1 / sqrt(inputs).
    bound = 84**-0.5
    assert 0.8 * bound < float(fresh["classifier.2.weight"].abs().max()) <= bound
    assert cctool.load(place / "fresh.pt").history[-1].notes == (
        *("new head: classifier.2, 3 classes (was 10)", "no epoch was trained"),
    )


def test_a_fresh_layer_for_the_same_classes(place: Path) -> None:
    line = ["--data", "digits", "--epochs", "0", "--limit", "64"]
    said = ran("train", place / "digits.pt", "--new-head", *line, "-o", place / "again.pt")
    assert "new head: classifier.2, 10 classes (was 10)" in said
    old, new = (cctool.load(place / f"{name}.pt").model.classifier[2] for name in ("digits", "again"))
    assert old.weight.shape == new.weight.shape
    assert not torch.equal(old.weight, new.weight)


def test_every_other_command_takes_what_came_out(place: Path) -> None:
    data = ["--data", f"folder:{place / 'three'}"]
    ran("train", state(place, "pruned"), "--new-head", *data, *FAST, "-o", place / "first.pt")
    ran("prune", place / "first.pt", "--method", "l1", "--rate", "0.3", *data, "-o", place / "second.pt")
    ran("quantize", place / "second.pt", "--method", "int8", *data, "-o", place / "third.pt")
    said = ran("export", place / "second.pt", "-o", place / "second.onnx")
    assert "onnx, " in said
    assert "verified" in said
    first, thin = (cctool.load(place / f"{name}.pt").model.classifier[2] for name in ("first", "second"))
    assert first.weight.shape[0] == thin.weight.shape[0] == 3
    assert thin.weight.shape[1] == thin.in_features < first.in_features < 84
    # A second fresh layer takes the place of the first: it has more outputs, and as many inputs.
    line = ["--data", "digits", "--epochs", "0", "--limit", "64"]
    ran("train", place / "third.pt", "--new-head", *line, "-o", place / "ten.pt")
    again = cctool.load(place / "ten.pt")
    assert again.model.classifier[2].weight.shape == (10, thin.weight.shape[1])
    assert sum(edit["kind"] == "head" for edit in again.spec.edits) == 1


def test_a_resumed_training_gives_the_same_file(place: Path) -> None:
    line = [
        "train",
        place / "digits.pt",
        "--new-head",
        "--data",
        f"folder:{place / 'three'}",
        "--epochs",
        "2",
    ]
    ran(*line, "-o", place / "whole.pt")
    ran(*line, "-o", place / "parts.pt", "--stop-after", "1")
    ran(*line, "-o", place / "parts.pt", "--resume")
    whole, parts = cctool.load(place / "whole.pt"), cctool.load(place / "parts.pt")
    assert whole.origin is not None
    assert parts.origin is not None
    assert whole.history[-1].notes == parts.history[-1].notes
    assert whole.origin.content == parts.origin.content


def test_a_student_gets_a_fresh_layer_for_a_teachers_classes(place: Path) -> None:
    data = ["--data", f"folder:{place / 'three'}"]
    ran("train", place / "digits.pt", "--new-head", *data, *FAST, "-o", place / "teacher.pt")
    line = ["--teacher", place / "teacher.pt", "--alpha", "0.1", *data, *FAST]
    said = ran("distill", place / "digits.pt", *line, "-o", place / "no.pt", exit_code=1)
    assert "has the class 'blue', which the network does not know" in said
    ran("distill", place / "digits.pt", *line, "--new-head", "-o", place / "student.pt")
    student = cctool.load(place / "student.pt")
    assert student.history[-1].notes == ("new head: classifier.2, 3 classes (was 10)",)
    report = cctool.evaluate(student, data=f"folder:{place / 'three'}")
    assert report.metrics is not None
    assert report.metrics.values["top1"] > 75


def test_tensors_in_memory_say_how_many_classes(place: Path) -> None:
    images, labels = torch.randn(12, 1, 32, 32), torch.arange(12) % 4
    made, _ = cctool.train(
        cctool.load(place / "digits.pt"), data=(images, labels), new_head=True, epochs=1, batch_size=6
    )
    assert made.spec.classes == ("0", "1", "2", "3")
    assert made.model.classifier[2].out_features == 4
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=6)
    with pytest.raises(DataError, match="needs a data set with classes"):
        cctool.train(cctool.load(place / "digits.pt"), data=loader, new_head=True, epochs=1)


def test_a_file_without_a_last_layer(place: Path) -> None:
    tensors = cctool.load(place / "digits.pt").model.state_dict()
    headless = {f"module.{name}": value for name, value in tensors.items() if "classifier.2" not in name}
    torch.save(headless, place / "headless.pth")
    line = ["train", place / "headless.pth", "--arch", "lenet", "--data", f"folder:{place / 'three'}"]
    said = ran(*line, *FAST, "-o", place / "no.pt", exit_code=1)
    assert "lacks classifier.2.bias, classifier.2.weight" in said
    said = ran(*line, *FAST, "--new-head", "-o", place / "headed.pt")
    assert "has no fitting classifier.2.weight, classifier.2.bias: random values take their place" in said
    assert "new head: classifier.2, 3 classes" in said
    found = cctool.load(place / "headed.pt")
    report = cctool.evaluate(found, data=f"folder:{place / 'three'}")
    assert report.metrics is not None
    assert report.metrics.values["top1"] > 75
    # More than the last layer is missing: that is another network.
    torch.save({name: v for name, v in headless.items() if "features.0" not in name}, place / "half.pth")
    line[1] = place / "half.pth"
    said = ran(*line, "--new-head", "-o", place / "no.pt", exit_code=1)
    assert "lacks classifier.2.bias, classifier.2.weight, features.0.bias and 1 more" in said
    assert not (place / "no.pt").exists()


OWN = """
import torch
from torch import nn

class Fixed(nn.Module):
    def __init__(self, reshape: bool = False):
        super().__init__()
        self.reshape, self.first, self.last = reshape, nn.Conv2d(1, 4, 3), nn.Conv2d(4, 10, 1)
    def forward(self, x):
        x = self.last(torch.relu(self.first(x))).mean((2, 3))
        return x.view(len(x), 2, 5).flatten(1) if self.reshape else x

class Normed(Fixed):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(10)
    def forward(self, x):
        return self.norm(super().forward(x))
"""


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("Fixed", (), ""),
        ("Normed", (), "gives this network's outputs: norm too has a value for each of them"),
        ("Fixed", ("--arg", "reshape=true"), "does not take a last layer of 3 outputs"),
    ],
)
def test_networks_of_the_users_own(
    place: Path, tmp_path: Path, name: str, options: tuple[str, ...], why: str
) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN)
    arch = ["--arch", f"{own}:{name}"]
    line = ["--data", "digits", "--epochs", "1", "--limit", "32"]
    ran("train", *arch, *options, *line, "-o", tmp_path / "ten.pt")
    line = ["--new-head", "--data", f"folder:{place / 'three'}", "-o", tmp_path / "three.pt"]
    said = ran("train", tmp_path / "ten.pt", *arch, *line, *FAST, exit_code=1 if why else 0)
    assert (tmp_path / "three.pt").exists() == (tmp_path / "three.run").exists() == (not why)
    assert (why or "new head: last, 3 classes (was 10)") in said
    if not why:
        made = cctool.load(tmp_path / "three.pt", arch=f"{own}:{name}")
        assert made.model.last.weight.shape == (3, 4, 1, 1)


def test_a_fresh_layer_needs_data(place: Path) -> None:
    fresh = ["train", "--arch", "lenet", "--new-head", "-o", place / "no.pt"]
    assert "needs data" in ran(*fresh, exit_code=2)
    assert "--new-head needs data for its classes" in ran(*fresh, "--epochs", "0", exit_code=2)


@pytest.mark.parametrize(
    ("line", "note"),
    [
        (
            ("transform", "--target", "features", "--taps", "last", "--data", "digits", "--limit", "64"),
            "no codec behind last: its maps have a channel for each class",
        ),
        (
            ("quantize", "--method", "int8", "--data", "digits", "--limit", "64"),
            "the fresh last layer is not quantized: `cctool quantize` quantizes it",
        ),
        (("transform", "--kernel", "dct", "--layers", "last"), "the fresh last is an ordinary layer"),
        (("prune", "--granularity", "element", "--rate", "0.6"), "the fresh last layer has no mask"),
    ],
    ids=("coded", "int8", "coefficients", "masked"),
)
def test_what_belonged_to_the_last_layer_is_gone(
    place: Path, tmp_path: Path, line: tuple[str, ...], note: str
) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN)
    arch = ["--arch", f"{own}:Fixed"]
    few = ["--data", "digits", "--epochs", "1", "--limit", "32"]
    ran("train", *arch, *few, "-o", tmp_path / "a.pt")
    verb, *options = line
    ran(verb, tmp_path / "a.pt", *arch, *options, "-o", tmp_path / "b.pt")
    data = ["--data", f"folder:{place / 'three'}", "--epochs", "1"]
    said = ran("train", tmp_path / "b.pt", *arch, "--new-head", *data, "-o", tmp_path / "c.pt")
    assert note in said
    made = cctool.load(tmp_path / "c.pt", arch=f"{own}:Fixed")
    assert any(note in found for found in made.history[-1].notes)
    assert all(edit["kind"] in ("head", "mask", "quantize") for edit in made.spec.edits)
    assert not taps_of(made.model)
    assert made.model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    ran("evaluate", tmp_path / "c.pt", *arch, *data[:2])
