"""`cctool evaluate`: sizes, intervals, classes and confusion matrices."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from typer.testing import CliRunner

import cctool
from cctool.checkpoint.checkpoint import Checkpoint, save
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.cli.main import app
from cctool.data.sets.digits import open_digits
from cctool.models import registry
from cctool.operations.inspect import evaluate
from cctool.operations.registries import tables
from cctool.tasks.regression import Regression
from cctool.tasks.table import TASKS

CLASSES = tuple(str(digit) for digit in range(10))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return registry.build("lenet", {}).eval()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    spec = ModelSpec(
        architecture="lenet",
        input_shape=(1, 32, 32),
        classes=CLASSES,
        preprocessing=Preprocessing(mean=(0.4,), std=(0.2,)),
        data="digits",
    )
    save(Checkpoint(network(), spec), tmp_path / "net.pt", tables())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    """The confusion matrix of the digits' test split, without any of the code under test."""
    found = open_digits("digits").split("test")
    images = (found.images.double() / 255 - 0.4) / 0.2
    with torch.no_grad():
        choices = network().double()(images).numpy().argmax(1)
    matrix = np.zeros((10, 10), dtype=int)
    for choice, label in zip(choices, found.labels.tolist(), strict=True):
        matrix[label, choice] += 1
    return matrix


def ran(*arguments: str, exit_code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["evaluate", "net.pt", "--device", "cpu", *arguments])
    assert result.exit_code == exit_code, result.output
    return result


def table(path: str) -> list[list[str]]:
    with Path(path).open(newline="") as stream:
        return list(csv.reader(stream))


def test_shares_have_intervals_and_sizes_are_shown(place: Path, counts: np.ndarray) -> None:
    text = ran().stdout
    assert max(map(len, text.splitlines())) <= 80
    right, n = int(counts.trace()), int(counts.sum())
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    low, high = 100 * expected.low, 100 * expected.high
    assert f"{100 * right / n:.2f} % ({low:.2f}..{high:.2f}, n = {n})" in text
    for words in ("61,706", f"{(place / 'net.pt').stat().st_size:,}", "246,824", "loss", "top-5"):
        assert words in text
    found = json.loads(ran("--json").stdout)
    assert found["intervals"]["top1"] == pytest.approx([low, high])
    assert found["size"] == {
        "parameters": 61_706,
        "file_bytes": (place / "net.pt").stat().st_size,
        "dense_bytes": 246_824,
        "stored_bytes": 246_824,
    }
    assert {"architecture", "data", "split", "n", "metrics", "predictions", "taps", "written"} < set(found)


@pytest.mark.usefixtures("place")
def test_stored_bytes_are_those_of_the_encoding() -> None:
    cctool.save(cctool.quantize(cctool.load("net.pt"), method="uint8")[0], "small.pt")
    result = CliRunner().invoke(app, ["evaluate", "small.pt", "--json"])
    size = json.loads(result.stdout)["size"]
    assert size["dense_bytes"] == 246_824
    assert 61_000 < size["stored_bytes"] < 80_000
    in_memory = cctool.evaluate(cctool.load("small.pt"), data="digits").size
    assert (in_memory.stored_bytes, in_memory.file_bytes) == (size["stored_bytes"], None)


@pytest.mark.usefixtures("place")
def test_each_class_is_measured(counts: np.ndarray) -> None:
    expected = 100 * counts.diagonal() / counts.sum(1)
    result = ran("--per-class", "--json")
    found = json.loads(result.stdout)["classes"]
    assert [row["name"] for row in found] == list(CLASSES)
    assert [row["n"] for row in found] == counts.sum(1).tolist()
    assert [row["values"]["accuracy"] for row in found] == pytest.approx(expected.tolist())
    for row, right, n in zip(found, counts.diagonal(), counts.sum(1), strict=True):
        interval = binomtest(int(right), int(n)).proportion_ci(0.95, method="wilson")
        assert row["intervals"]["accuracy"] == pytest.approx([100 * interval.low, 100 * interval.high])
    text = ran("--per-class").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert f"{expected[1]:.2f}" in text
    assert json.loads(ran("--json").stdout)["classes"] == []
    assert cctool.evaluate(cctool.load("net.pt"), data="digits", per_class=True).classes[1].n == found[1]["n"]


@pytest.mark.usefixtures("place")
def test_the_table_of_classes_is_written(counts: np.ndarray) -> None:
    result = ran("--per-class", "--csv", "c.csv", "--xlsx", "c.xlsx")
    assert result.stdout == "c.csv\nc.xlsx\n"
    assert "Classes" in result.stderr
    head, *rows = table("c.csv")
    assert head == ["class", "accuracy (%)", "accuracy low (%)", "accuracy high (%)", "n"]
    assert [float(row[1]) for row in rows] == pytest.approx(100 * counts.diagonal() / counts.sum(1))
    sheet = openpyxl.load_workbook("c.xlsx")["Classes"]
    assert [cell.value for cell in sheet["E"]] == ["n", *counts.sum(1).tolist()]
    assert "exists already" in ran("--per-class", "--csv", "c.csv", exit_code=1).stderr
    assert ran("--per-class", "--csv", "c.csv", "--force").stdout == "c.csv\n"


@pytest.mark.usefixtures("place")
def test_the_confusion_matrix_is_written(counts: np.ndarray) -> None:
    result = ran("--confusion", "c.csv")
    assert result.stdout == "c.csv\n"
    head, *rows = table("c.csv")
    assert head == ["label", *CLASSES]
    assert [[int(cell) for cell in row[1:]] for row in rows] == counts.tolist()
    assert json.loads(ran("--confusion", "c.xlsx", "--json").stdout)["written"] == ["c.xlsx"]
    ran("--confusion", "c.png")
    with Image.open("c.png") as picture:
        assert min(picture.size) > 400
    report = cctool.evaluate(cctool.load("net.pt"), data="digits", confusion="d.csv")
    assert report.confusion is not None
    assert report.confusion.tolist() == counts.tolist()


@pytest.mark.usefixtures("place")
def test_a_class_without_images_has_no_accuracy(tmp_path: Path) -> None:
    for name in ("3", "7"):
        (tmp_path / "two" / name).mkdir(parents=True)
        for shade in (10, 200):
            Image.new("L", (32, 32), shade).save(tmp_path / "two" / name / f"{shade}.png")
    data = ("--data", f"folder:{tmp_path / 'two'}", "--split", "train", "--per-class")
    found = json.loads(ran(*data, "--json").stdout)
    assert [row["n"] for row in found["classes"]] == [0, 0, 0, 2, 0, 0, 0, 2, 0, 0]
    assert found["classes"][0]["values"]["accuracy"] is None
    assert found["classes"][0]["intervals"] == {}
    ran(*data, "--csv", "c.csv", "--confusion", "c.png")
    assert table("c.csv")[1] == ["0", "", "", "", "0"]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--confusion", "c.gif"], "a name that ends in .png or .csv or .xlsx"),
        (["--per-class", "--csv", "c.xlsx"], "a name that ends in .csv"),
        (["--per-class", "--xlsx", "c.csv"], "a name that ends in .xlsx"),
        (["--csv", "c.csv"], "--csv: it is for the table of --per-class"),
        (["--xlsx", "c.xlsx"], "--xlsx: it is for the table of --per-class"),
        (["--per-class", "--csv", "c.csv", "--confusion", "./c.csv"], "two files would have one name"),
        (["--confusion", "none/c.csv"], "the folder none does not exist"),
    ],
)
def test_wrong_names_are_refused_first(
    options: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "evaluate", None)
    result = CliRunner().invoke(app, ["evaluate", "net.pt", *options])
    assert result.exit_code in (1, 2)
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2
    assert sorted(path.name for path in Path().iterdir()) == ["net.pt"]


@pytest.mark.usefixtures("place")
def test_what_a_task_does_not_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Regression):
        predictions = None  # type: ignore[assignment]

    monkeypatch.setitem(TASKS, "plain", Plain(name="plain"))
    for option in (["--per-class"], ["--confusion", "c.png"]):
        said = ran(*option, "--task", "plain", exit_code=1).stderr
        assert f"{option[0]} needs classes, and the task plain has none" in said
    said = ran("--predictions", "p.csv", "--task", "plain", exit_code=1).stderr
    assert "--predictions: the task plain does not say what a prediction is" in said
    assert sorted(path.name for path in Path().iterdir()) == ["net.pt"]


@pytest.mark.usefixtures("place")
def test_classes_need_labels(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "photos" / "a.png")
    said = ran("--data", f"folder:{tmp_path / 'photos'}", "--confusion", "c.csv", exit_code=1).stderr
    assert "has no labels, which --confusion needs" in said


@pytest.mark.usefixtures("place")
def test_labels_that_the_network_lacks_are_refused_with_the_users_loss_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def two(outputs, labels):\n    return outputs.sum() * 0 + 2\n")
    images, labels = torch.zeros(4, 1, 32, 32), torch.tensor([0, 1, 2, 11])
    with pytest.raises(cctool.CctoolError, match="label 11"):
        cctool.evaluate(
            cctool.load("net.pt"), data=(images, labels), per_class=True, loss=f"{tmp_path / 'mine.py'}:two"
        )
