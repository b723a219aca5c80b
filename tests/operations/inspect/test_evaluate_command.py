"""`cctool evaluate`: splits, predictions, unlabelled folders."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cctool.base.errors import CheckpointError, DataError, UsageError, UserCodeError
from cctool.checkpoint.checkpoint import Checkpoint, save
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.cli.main import app
from cctool.data.sets.digits import open_digits
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations.inspect import evaluate
from cctool.operations.registries import tables
from cctool.options.common import DataOptions, ModelOptions, Precision, RuntimeOptions
from cctool.options.inspect.evaluate import EvaluateOptions, SplitName

CLASSES = tuple(str(digit) for digit in range(10))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return registry.build("lenet", {}).eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    spec = ModelSpec(
        architecture="lenet",
        input_shape=(1, 32, 32),
        classes=CLASSES,
        preprocessing=Preprocessing(mean=(0.4,), std=(0.2,)),
        data="digits",
    )
    save(Checkpoint(network(), spec), tmp_path / "net.pt", tables())
    return tmp_path / "net.pt"


def report(path: Path, *, force: bool = False, **options: Any) -> evaluate.EvaluateReport:
    asked = pipeline.Request("evaluate", str(path), runtime=RuntimeOptions(device="cpu"), force=force)
    return pipeline.read(evaluate.run, EvaluateOptions(**options), asked)


def logits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """What the network gives for a split of the digits, without any of the code under test."""
    found = open_digits("digits").split(split)
    images = (found.images.double() / 255 - 0.4) / 0.2
    with torch.no_grad():
        return network().double()(images).numpy(), found.labels.numpy()


@pytest.mark.parametrize("split", list(SplitName))
def test_each_split_is_measured_whole(path: Path, split: SplitName) -> None:
    scores, labels = logits(split.value)
    found = report(path, split=split)
    assert found.metrics is not None
    assert (found.split, found.n, found.metrics.n) == (split.value, len(labels), len(labels))
    assert found.metrics.values["top1"] == pytest.approx(100 * (scores.argmax(1) == labels).mean())


def test_the_test_split_is_the_default(path: Path) -> None:
    assert report(path).split == "test"


def test_batch_size_does_not_matter_and_limit_does(path: Path) -> None:
    whole = report(path, data=DataOptions(batch_size=64)).metrics
    other = report(path, data=DataOptions(batch_size=7)).metrics
    assert whole is not None
    assert other is not None
    assert other.values == pytest.approx(whole.values, rel=1e-5)
    assert report(path, data=DataOptions(limit=50)).n == 50


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_predictions_are_the_networks(path: Path, tmp_path: Path) -> None:
    report(path, predictions=str(tmp_path / "p.csv"))
    scores, labels = logits("test")
    written = rows(tmp_path / "p.csv")
    assert [row["predicted"] for row in written] == [CLASSES[index] for index in scores.argmax(1)]
    assert [row["label"] for row in written] == [CLASSES[label] for label in labels]
    exponents = np.exp(scores - scores.max(1, keepdims=True))
    expected = (exponents / exponents.sum(1, keepdims=True)).max(1)
    assert [float(row["probability"]) for row in written] == pytest.approx(expected.tolist(), abs=2e-5)
    assert [row["file"] for row in written] == [str(index) for index in range(len(labels))]


def test_predictions_are_not_overwritten(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "p.csv"
    target.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        report(path, predictions=str(target))
    assert target.read_text() == "mine"
    report(path, predictions=str(target), force=True)
    assert len(rows(target)) == 360


def test_with_predictions_their_path_is_the_product(path: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "p.csv")
    arguments = ["evaluate", str(path), "--data", "digits", "--limit", "20", "--predictions", target]
    result = CliRunner().invoke(app, arguments)
    assert result.stdout == f"{target}\n"
    assert "top-1" in result.stderr


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    found = open_digits("digits").split("test")
    for index in range(5):
        Image.fromarray(found.images[index, 0].numpy()).save(folder / f"{index}.png")
    return folder


def test_unlabelled_folders_get_predictions(path: Path, tmp_path: Path, unlabelled: Path) -> None:
    found = report(path, data=DataOptions(data=f"folder:{unlabelled}"), predictions=str(tmp_path / "p.csv"))
    assert found.metrics is None
    written = rows(tmp_path / "p.csv")
    assert [row["file"] for row in written] == [f"{index}.png" for index in range(5)]
    assert {row["label"] for row in written} == {""}
    scores, _ = logits("test")
    assert [row["predicted"] for row in written] == [CLASSES[index] for index in scores[:5].argmax(1)]


def test_unlabelled_folders_cannot_be_measured(path: Path, unlabelled: Path) -> None:
    with pytest.raises(DataError, match="--predictions"):
        report(path, data=DataOptions(data=f"folder:{unlabelled}"))


def test_an_unknown_preprocessing_is_a_warning(path: Path, tmp_path: Path) -> None:
    said: list[str] = []

    class Listening:
        def note(self, text: str) -> None: ...

        def warn(self, text: str) -> None:
            said.append(text)

        def progress(self, items: Any, description: str, total: int | None = None) -> Any:
            return iter(items)

    torch.save(network().state_dict(), tmp_path / "foreign.pth")
    asked = pipeline.Request(
        "evaluate", str(tmp_path / "foreign.pth"), model=ModelOptions(arch="lenet"), reporter=Listening()
    )
    options = EvaluateOptions(data=DataOptions(data="digits"))
    pipeline.read(evaluate.run, options, asked)
    assert any("preprocessing of this model is unknown" in text for text in said)
    said.clear()
    told = replace(asked, model=ModelOptions(arch="lenet", mean=(0.4,), std=(0.2,)))
    found = pipeline.read(evaluate.run, options, told)
    assert said == []
    assert found.metrics == report(path).metrics


def test_precision_changes_the_loss(path: Path) -> None:
    half = pipeline.Request(
        "evaluate", str(path), runtime=RuntimeOptions(device="cpu", precision=Precision.BF16)
    )
    other = pipeline.read(evaluate.run, EvaluateOptions(), half).metrics
    found = report(path).metrics
    assert other.values["loss"] != found.values["loss"]
    assert other.values["loss"] == pytest.approx(found.values["loss"], rel=0.05)


def test_loss_and_metric_can_be_the_users(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def two(outputs, labels):\n    return outputs.sum() * 0 + 2\n"
        "def count(outputs, labels):\n    return len(labels)\n"
        "def wrong(outputs, labels):\n    return outputs\n"
    )

    def run(**options: str) -> Any:
        named = {name: f"{file}:{value}" for name, value in options.items()}
        asked = pipeline.Request("evaluate", str(path), user_code=tuple(named.values()))
        return pipeline.read(evaluate.run, EvaluateOptions(**named), asked).metrics.values

    values = run(loss="two", metric="count")
    assert (values["loss"], values["count"]) == (2, 360)
    with pytest.raises(UserCodeError, match=r"mine\.py:wrong"):
        run(metric="wrong")


def test_the_predictions_name_ends_in_csv() -> None:
    with pytest.raises(UsageError, match=r"ends in \.csv"):
        EvaluateOptions(predictions="p.txt")


@pytest.mark.cuda
def test_cuda_gives_what_the_cpu_gives(path: Path) -> None:
    """Loss within 0.1 %, top-1 within one image."""
    asked = pipeline.Request("evaluate", str(path), runtime=RuntimeOptions(device="cuda"))
    found, expected = pipeline.read(evaluate.run, EvaluateOptions(), asked).metrics, report(path).metrics
    assert expected is not None
    assert found.values["loss"] == pytest.approx(expected.values["loss"], rel=1e-3)
    assert found.values["top1"] == pytest.approx(expected.values["top1"], abs=100 / 360 + 1e-6)
