"""Every ordered pair of methods composes through files, on three networks, one of them the user's own.

Each later method joins `METHODS` and is tried before and after all others; transforms are tried before and
after one of each kind, and each other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import cctool
from cctool.cli.main import app

DATA = ("--data", "digits", "--limit", "32", "--batch-size", "16")
QUIET = ("--quiet", "--device", "cpu")

METHODS: dict[str, tuple[str, ...]] = {
    "train": ("train", "INPUT", "--epochs", "1", "--lr", "0.01", *DATA),
    "distill": ("distill", "INPUT", "--teacher", "TEACHER", "--epochs", "1", "--lr", "0.01", *DATA),
    "prune-slimming": ("prune", "INPUT", "--method", "slimming", "--rate", "0.3", "--limit", "32"),
    "prune-l1": ("prune", "INPUT", "--method", "l1", "--rate", "0.3", "--limit", "32"),
    "prune-l2": ("prune", "INPUT", "--method", "l2", "--rate", "0.3", "--limit", "32"),
    "prune-elements": ("prune", "INPUT", "--granularity", "element", "--rate", "0.3", "--limit", "32"),
    "prune-random": ("prune", "INPUT", "--method", "random", "--rate", "0.3", "--limit", "32"),
    "quantize-fp16": ("quantize", "INPUT", "--method", "fp16", "--limit", "32"),
    "quantize-bf16": ("quantize", "INPUT", "--method", "bf16", "--limit", "32"),
    "quantize-uint8": ("quantize", "INPUT", "--method", "uint8", "--limit", "32"),
    "quantize-channel": ("quantize", "INPUT", "--method", "uint8", "--per-channel", "--limit", "32"),
}
"""Command lines, with the places of the input and of the teacher."""

TRANSFORMS: dict[str, tuple[str, ...]] = {
    "energy": ("transform", "INPUT", "--keep", "0.5", "--limit", "32"),
    "corner": ("transform", "INPUT", "--keep", "0.5", "--select", "corner", "--kernel", "klt", *DATA),
    "basis": ("transform", "INPUT", "--mode", "basis", "--layers", "stem", "--limit", "32"),
    "features": (
        *("transform", "INPUT", "--target", "features", "--taps", "bn1", "--calibration", "16"),
        *DATA,
    ),
    "fold": ("transform", "INPUT", "--fold", "--limit", "32"),
}
"""Transforms of the user's network, tried before and after the others."""

QUANTIZERS: dict[str, tuple[str, ...]] = {
    "int8": ("quantize", "INPUT", "--method", "int8", "--calibration", "16", *DATA),
    "lsq": ("quantize", "INPUT", "--method", "lsq", "--epochs", "1", "--calibration", "16", *DATA),
}
"""Networks with quantizers, tried before and after the others and two transforms."""

LINES = {**METHODS, **TRANSFORMS, **QUANTIZERS}

OTHERS = ("train", "distill", "prune-l1", "prune-elements", "quantize-channel")

REFUSED = {
    ("prune-elements", weights): "its weight has a mask, which a transform would spread over all coefficients"
    for weights in ("energy", "corner", "basis")
} | {
    ("features", "fold"): "coded feature maps, whose codecs are fitted to the layers as they are",
    ("int8", "fold"): "quantizers, whose ranges and rounding are of the layers as they are",
}
"""Pairs that cannot be, and what is said of them."""

DISTINCT = tuple(name for name in METHODS if name not in ("prune-l2", "prune-random", "quantize-bf16"))
"""Those that differ in more than a criterion or a type; the slow test pairs them all."""

VERBS_ONLY = ("train", "distill", "prune-slimming", "quantize-uint8")

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, in_channels=1, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, stride=4, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 4, num_classes)

    def forward(self, x):
        x = self.bn1(self.stem(x)).relu()
        x = x + self.bn2(self.body(x)).relu()
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))

def make_net(in_channels=1, num_classes=10):
    return Net(in_channels, num_classes)
"""


@dataclass(frozen=True)
class Workplace:
    """A folder with a network's first checkpoint and a teacher."""

    folder: Path
    arch: tuple[str, ...]
    start: Path
    teacher: Path


def cctool_(*arguments: str) -> list[Path]:
    """Run a command in this process and give the paths that it printed."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{' '.join(arguments)}\n{result.output}\n{result.exception}"
    return [Path(line) for line in result.stdout.splitlines()]


def start(folder: Path, *build: str, arch: tuple[str, ...] = ()) -> Workplace:
    """Train a network for an epoch, so that no batch norm is as it was initialised."""
    train = ("--epochs", "1", *DATA, *QUIET)
    (teacher,) = cctool_("train", "--arch", "lenet", *train, "-o", str(folder / "teacher.pt"))
    (first,) = cctool_("train", *build, *train, "-o", str(folder / "start.pt"))
    return Workplace(folder, arch, first, teacher)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workplace]:
    made = {}
    own = tmp_path_factory.mktemp("own")
    (own / "net.py").write_text(NET)
    arch = ("--arch", f"{own / 'net.py'}:make_net")
    made["own"] = start(own, *arch, arch=arch)
    made["resnet20"] = start(tmp_path_factory.mktemp("resnet20"), "--arch", "resnet20", "--arg", "base=4")
    made["mobilenet_student"] = start(
        tmp_path_factory.mktemp("mobilenet"), "--arch", "mobilenet_student", "--arg", "base=4"
    )
    return made


def apply(place: Workplace, method: str, source: Path, output: Path) -> Path:
    """Run one method of the table."""
    places_ = {"INPUT": str(source), "TEACHER": str(place.teacher)}
    line = [places_.get(word, word) for word in LINES[method]]
    (written,) = cctool_(*line, *place.arch, *QUIET, "--force", "-o", str(output))
    return written


LOAD = """
import json, sys, torch, cctool
paths, arch, inputs = json.loads(sys.argv[1]), sys.argv[2] or None, torch.load(sys.argv[3])
with torch.no_grad():
    torch.save({path: cctool.load(path, arch=arch).model(inputs) for path in paths}, sys.argv[4])
"""


def check_new_process(place: Workplace, files: list[Path]) -> None:
    """Load files in a new process; logits must be equal to the last bit."""
    arch = place.arch[1] if place.arch else None
    shape = cctool.load(files[0], arch=arch).spec.input_shape
    inputs = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    torch.save(inputs, place.folder / "inputs.pt")
    command = [sys.executable, "-c", LOAD, json.dumps([str(f) for f in files]), arch or ""]
    subprocess.run([*command, place.folder / "inputs.pt", place.folder / "logits.pt"], check=True)
    logits = torch.load(place.folder / "logits.pt")
    for file in files:
        with torch.no_grad():
            assert torch.equal(logits[str(file)], cctool.load(file, arch=arch).model(inputs)), file.name


def check_pairs(place: Workplace, pairs: Iterable[tuple[str, str]], export: str) -> None:
    """Apply every ordered pair and look at each result."""
    arch = place.arch[1] if place.arch else None
    pairs = list(pairs)
    firsts = {m: apply(place, m, place.start, place.folder / f"{m}.pt") for m, _ in dict(pairs).items()}
    results = []
    for first, second in pairs:
        output = place.folder / f"{first}+{second}.pt"
        results.append(apply(place, second, firsts[first], output))
        history = cctool.load(output, arch=arch).history
        verbs = [step.verb for step in history]
        assert verbs == ["train", LINES[first][0], LINES[second][0]], output.name
        for step, file in zip(history[1:], (place.start, firsts[first]), strict=True):
            assert step.parent is not None
            assert step.parent.path == file.name
            assert step.parent.file == hashlib.sha256(file.read_bytes()).hexdigest()
    check_new_process(place, results)
    for result in results:
        trained = apply(place, "train", result, place.folder / "trained.pt")
        before, after = (cctool.load(f, arch=arch).model.state_dict() for f in (result, trained))
        assert any(not torch.equal(before[name], after[name]) for name in before), result.name
        exported = place.folder / ("exported.onnx" if export == "onnx" else "exported.pt")
        cctool_(
            "export", str(result), "--format", export, *place.arch, *QUIET, "--force", "-o", str(exported)
        )
        assert exported.stat().st_size > 0


def test_every_pair_on_the_users_own_network(places: dict[str, Workplace]) -> None:
    check_pairs(places["own"], itertools.product(DISTINCT, DISTINCT), "state-dict")


def transform_pairs(name: str) -> list[tuple[str, str]]:
    """A transform before and after every verb, and before every transform."""
    after = [other for other in OTHERS if (other, name) not in REFUSED]
    before = [other for other in (*OTHERS, *TRANSFORMS) if (name, other) not in REFUSED]
    return [*((name, other) for other in before), *((other, name) for other in after)]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_before_and_after_every_verb(places: dict[str, Workplace], name: str) -> None:
    check_pairs(places["own"], transform_pairs(name), "state-dict")


def quantizer_pairs(name: str) -> list[tuple[str, str]]:
    """A quantization before and after every verb, and two transforms."""
    others = (*OTHERS, "energy", "features")
    return [*((name, other) for other in others), *((other, name) for other in others)]


@pytest.mark.parametrize("name", ["int8", pytest.param("lsq", marks=pytest.mark.slow)])
def test_quantizers_before_and_after_every_verb(places: dict[str, Workplace], name: str) -> None:
    check_pairs(places["own"], quantizer_pairs(name), "state-dict")


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_before_and_after_every_verb_export_to_onnx(
    places: dict[str, Workplace], name: str
) -> None:
    check_pairs(places["own"], quantizer_pairs(name), "onnx")


@pytest.mark.parametrize(("first", "second"), REFUSED)
def test_pairs_that_cannot_be_are_refused_in_a_line(
    places: dict[str, Workplace], first: str, second: str
) -> None:
    place = places["own"]
    source = apply(place, first, place.start, place.folder / f"{first}.pt")
    line = [str(source) if word == "INPUT" else word for word in TRANSFORMS[second]]
    output = place.folder / "refused.pt"
    result = CliRunner().invoke(app, [*line, *place.arch, *QUIET, "-o", str(output)])
    assert result.exit_code == 1
    assert REFUSED[first, second] in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not output.exists()


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_student"])
def test_every_verb_before_and_after_a_cut(places: dict[str, Workplace], name: str) -> None:
    cut = "prune-slimming"
    pairs = [pair for pair in itertools.product(VERBS_ONLY, VERBS_ONLY) if cut in pair]
    check_pairs(places[name], pairs, "state-dict")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_student"])
def test_every_pair_of_verbs(places: dict[str, Workplace], name: str) -> None:
    check_pairs(places[name], itertools.product(VERBS_ONLY, VERBS_ONLY), "state-dict")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "resnet20", "mobilenet_student"])
def test_every_pair_exports_to_onnx(places: dict[str, Workplace], name: str) -> None:
    check_pairs(places[name], itertools.product(METHODS, METHODS), "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_before_and_after_every_verb_export_to_onnx(
    places: dict[str, Workplace], name: str
) -> None:
    check_pairs(places["own"], transform_pairs(name), "onnx")
