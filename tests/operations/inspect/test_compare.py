"""`cctool compare`: several architectures, ONNX files, paths from stdin, and what chance explains."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
import torch
from scipy.stats import binomtest
from typer.testing import CliRunner

import cctool
from cctool.checkpoint.checkpoint import Checkpoint, save
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.cli.main import app
from cctool.data.sets.digits import open_digits
from cctool.models import registry
from cctool.operations.registries import tables
from cctool.tasks.base import Measure
from cctool.tasks.classification import Classification
from cctool.tasks.table import TASKS

NET = """
from torch import nn

def small(num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, num_classes))

def wide(num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""


def built(reference: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return registry.build(reference, {}, user_code={reference}).eval()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.pt and b.pt are LeNets, c.pt and d.pt the user's own networks."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    named = {"a": "lenet", "b": "lenet", "c": "net.py:small", "d": "net.py:wide"}
    for seed, (name, reference) in enumerate(named.items()):
        spec = ModelSpec(
            architecture=reference,
            input_shape=(1, 32, 32),
            classes=tuple(str(digit) for digit in range(10)),
            preprocessing=Preprocessing(mean=(0.4,), std=(0.2,)),
            data="digits",
        )
        save(Checkpoint(built(reference, seed), spec), f"{name}.pt", tables({reference}))
    return tmp_path


def ran(*arguments: str, exit_code: int = 0, piped: str = "") -> Any:
    result = CliRunner().invoke(app, ["compare", *arguments, "--device", "cpu"], input=piped)
    assert result.exit_code == exit_code, result.output
    return result


def rows(*arguments: str, piped: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(ran(*arguments, "--json", piped=piped).stdout)
    return found


def right(model: torch.nn.Module, limit: slice = slice(None)) -> np.ndarray:
    """Which images of the test split a network gets right, without any of the code under test."""
    found = open_digits("digits").split("test")
    images = (found.images.double() / 255 - 0.4) / 0.2
    with torch.no_grad():
        choices = model.double()(images).numpy().argmax(1)
    return (choices == found.labels.numpy())[limit]


def test_the_table_fits_a_terminal_and_json_keeps_its_keys(place: Path) -> None:
    result = ran("a.pt", "b.pt")
    assert max(map(len, result.stdout.splitlines())) <= 80
    for title in ("top-1 %", "95 %", "loss", "parameters", "MACs", "bytes", "smaller", "steps"):
        assert title in result.stdout
    assert " ms" not in result.stdout
    found = rows("a.pt", "b.pt")
    assert [row["file"] for row in found] == ["a.pt", "b.pt"]
    assert found[0]["bytes"] == (place / "a.pt").stat().st_size
    report = found[0]["report"]
    assert {"architecture", "verbs", "metrics", "parameters", "macs"} < set(report)
    assert report["parameters"] == report["size"]["parameters"] == 61_706
    assert report["metrics"]["values"]["top1"] == pytest.approx(100 * right(built("lenet", 0)).mean())


@pytest.mark.usefixtures("place")
def test_differences_on_the_same_images_are_mcnemars() -> None:
    one, two = right(built("lenet", 0)), right(built("lenet", 1))
    b, c = int((one & ~two).sum()), int((two & ~one).sum())
    first, second = (row["report"] for row in rows("a.pt", "b.pt"))
    assert first["differences"] == []
    found = second["differences"][0]
    assert found["measure"] == "top1"
    assert (found["only_first"], found["only_this"]) == (b, c)
    assert found["p"] == pytest.approx(binomtest(b, b + c, 0.5).pvalue)
    assert found["points"] == pytest.approx(100 * (two.mean() - one.mean()))
    assert found["within"] == (found["p"] >= 0.05)


@pytest.mark.usefixtures("place")
def test_a_line_says_what_chance_explains() -> None:
    said = " ".join(ran("a.pt", "a.pt").stdout.split())
    assert (
        "a.pt: top-1 differs from a.pt's by +0.00 points, within the 95 % interval "
        "(McNemar's exact test, p = 1)" in said
    )
    trained, _ = cctool.train(cctool.load("a.pt"), epochs=3, data="digits", lr=0.01)
    cctool.save(trained, "trained.pt")
    result = ran("a.pt", "trained.pt")
    assert "within the 95 %" not in result.stdout
    assert max(map(len, ran("a.pt", "b.pt").stdout.splitlines())) <= 80


@pytest.mark.usefixtures("place")
def test_other_samples_are_compared_unpaired() -> None:
    found = open_digits("digits")
    images = (found.split("test").images.double() / 255 - 0.4) / 0.2
    labels = found.split("test").labels.long()
    first = cctool.load("a.pt")
    reports = [
        cctool.compare([first], data=(images.float()[part], labels[part]))[0]
        for part in (slice(0, 100), slice(100, 300))
    ]
    from cctool.operations.inspect.comparison import Compared, compared, remarks
    from cctool.options.inspect.compare import CompareOptions

    told, _ = compared([Compared("a", 1, r) for r in reports], CompareOptions(), force=False)
    difference = told[1].report.differences[0]
    assert (difference.test, difference.p) == ("newcombe", None)
    assert difference.within
    assert "unpaired" in remarks(told)[0]


@pytest.mark.usefixtures("place")
def test_each_architecture_is_used_for_the_files_that_record_it() -> None:
    found = rows("a.pt", "c.pt", "d.pt", "--arch", "net.py:small", "--arch", "net.py:wide")
    assert [row["report"]["parameters"] for row in found] == [61_706, 10_250, 8_290]
    for row, reference, seed in zip(found[1:], ("net.py:small", "net.py:wide"), (2, 3), strict=True):
        expected = 100 * right(built(reference, seed)).mean()
        assert row["report"]["metrics"]["values"]["top1"] == pytest.approx(expected)


def test_the_users_file_may_have_moved(place: Path) -> None:
    (place / "moved").mkdir()
    (place / "net.py").rename(place / "moved" / "net.py")
    found = rows("c.pt", "d.pt", "--arch", "moved/net.py:wide", "--arch", "moved/net.py:small")
    assert [row["report"]["parameters"] for row in found] == [10_250, 8_290]
    (place / "other.py").write_text(NET.replace("small", "renamed"))
    assert rows("c.pt", "--arch", "other.py:renamed")[0]["report"]["parameters"] == 10_250


@pytest.mark.usefixtures("place")
def test_an_architecture_that_no_file_records_is_named() -> None:
    for archs in (["net.py:small", "net.py:wide"], ["net.py:small", "resnet20"]):
        options = [word for arch in archs for word in ("--arch", arch)]
        said = ran("a.pt", "c.pt", *options, exit_code=2).stderr
        assert f"--arch {archs[1]}: no file records this architecture (recorded: lenet, net.py:small)" in said
    said = ran("c.pt", "d.pt", "--arch", "net.py:small", exit_code=1).stderr
    assert "name it with --arch net.py:wide" in said
    assert "is user code" in ran("c.pt", exit_code=1).stderr


@pytest.mark.usefixtures("place")
def test_foreign_files_take_the_architecture_that_is_left() -> None:
    torch.save(built("lenet", 0).state_dict(), "bare.pth")
    found = rows("c.pt", "bare.pth", "--arch", "net.py:small", "--arch", "lenet")
    assert [row["report"]["architecture"] for row in found] == ["net.py:small", "lenet"]
    assert rows("a.pt", "bare.pth", "--arch", "lenet")[1]["report"]["parameters"] == 61_706
    said = ran("bare.pth", "--arch", "lenet", "--arch", "net.py:small", exit_code=2).stderr
    assert "bare.pth does not say which network it holds" in said


@pytest.mark.usefixtures("place")
def test_onnx_files_are_run_on_the_same_images() -> None:
    cctool.export(cctool.load("b.pt"), output="b.onnx")
    found = rows("b.onnx", "a.pt")
    onnx = found[0]["report"]
    expected = 100 * right(built("lenet", 1)).mean()
    assert onnx["metrics"]["values"]["top1"] == pytest.approx(expected, abs=0.3)
    assert (onnx["parameters"], onnx["macs"], onnx["architecture"]) == (None, None, "onnx")
    assert found[0]["bytes"] == onnx["size"]["file_bytes"] == Path("b.onnx").stat().st_size
    assert found[1]["report"]["differences"][0]["test"] == "mcnemar"
    result = ran("a.pt", "b.onnx", "--latency")
    assert "b.onnx: run on the data and with the preprocessing of a.pt" in result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    reports = cctool.compare([cctool.load("a.pt"), "b.onnx"], data="digits")
    assert reports[1].metrics is not None
    assert reports[1].metrics.values["top1"] == pytest.approx(expected, abs=0.3)


@pytest.mark.usefixtures("place")
def test_onnx_files_that_do_not_fit_are_refused() -> None:
    cctool.export(cctool.load("b.pt"), output="b.onnx")
    assert "b.onnx does not say how its inputs are normalised" in ran("b.onnx", exit_code=2).stderr
    Path("no.onnx").write_bytes(b"nothing")
    assert "onnxruntime cannot load no.onnx" in ran("a.pt", "no.onnx", exit_code=1).stderr
    assert "gone.onnx: no such file" in ran("a.pt", "gone.onnx", exit_code=1).stderr
    student, _ = cctool.train(arch="lenet", arg="num_classes=10", input="3x32x32", data="digits", epochs=1)
    cctool.save(student, "colour.pt")
    said = ran("colour.pt", "b.onnx", exit_code=1).stderr
    assert "b.onnx takes tensor(float)" in said
    assert "not images of 3x32x32" in said


@pytest.mark.usefixtures("place")
def test_an_onnx_file_of_one_image_a_batch_is_run_image_by_image() -> None:
    import onnx

    cctool.export(cctool.load("b.pt"), output="b.onnx")
    document = onnx.load("b.onnx")
    for entry in (*document.graph.input, *document.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(document, "one.onnx")
    found = rows("b.pt", "one.onnx", "--limit", "20")
    values = [row["report"]["metrics"]["values"]["loss"] for row in found]
    assert values[1] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.usefixtures("place")
def test_all_lines_of_stdin_are_files() -> None:
    assert [row["file"] for row in rows("a.pt", "-", piped="b.pt\n\na.pt\n")] == ["a.pt", "b.pt", "a.pt"]
    assert "no path came from stdin" in ran("a.pt", "-", exit_code=1).stderr
    assert "give it once" in ran("-", "-", exit_code=2, piped="a.pt\n").stderr


@pytest.mark.usefixtures("place")
def test_the_comparison_is_written() -> None:
    result = ran("a.pt", "b.pt", "--csv", "t.csv", "--xlsx", "t.xlsx")
    assert result.stdout == "t.csv\nt.xlsx\n"
    assert "top-1 %" in result.stderr
    with Path("t.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    expected = [row["report"] for row in rows("a.pt", "b.pt")]
    for row, report in zip(found, expected, strict=True):
        assert float(row["top-1 (%)"]) == report["metrics"]["values"]["top1"]
        assert [float(row["top-1 low"]), float(row["top-1 high"])] == report["intervals"]["top1"]
        assert int(row["parameters"]) == report["parameters"]
        assert row["ms"] == ""
    assert float(found[1]["top-1 p"]) == expected[1]["differences"][0]["p"]
    sheet = openpyxl.load_workbook("t.xlsx")["Comparison"]
    assert [cell.value for cell in sheet["A"]] == ["file", "a.pt", "b.pt"]
    before = Path("a.pt").read_bytes()
    assert "exists already" in ran("a.pt", "--csv", "t.csv", exit_code=1).stderr
    assert ran("a.pt", "--csv", "t.csv", "--force").stdout == "t.csv\n"
    assert "ends in .csv" in ran("a.pt", "--csv", "a.pt", "--force", exit_code=2).stderr
    assert Path("a.pt").read_bytes() == before
    assert cctool.compare([cctool.load("a.pt")], csv="mine.csv")[0].parameters == 61_706
    assert "61706" in Path("mine.csv").read_text()


@pytest.mark.usefixtures("place")
def test_latency_is_measured_on_request() -> None:
    found = rows("a.pt", "c.pt", "--latency", "--arch", "net.py:small")
    assert all(0 < row["report"]["milliseconds"] < 1000 for row in found)
    assert rows("a.pt")[0]["report"]["milliseconds"] is None
    assert " ms" in ran("a.pt", "--latency").stdout


@pytest.mark.usefixtures("place")
def test_columns_of_two_tasks_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    class Guessing(Classification):
        """Another task: its main measure is not a share."""

        def sums(self, outputs: Any, targets: Any, *, training: bool = False) -> Any:
            return {"sure": self.main_output(outputs).softmax(1).amax(1).sum()}

        def values(self, sums: Any, n: float) -> dict[str, float]:
            return {"sure": float(sums["sure"]) / n}

    guessing = Guessing(name="guessing", measures=(Measure("sure", "certainty"),))
    first = cctool.compare([cctool.load("a.pt")], data="digits")[0]
    monkeypatch.setitem(TASKS, "guessing", guessing)
    second = cctool.compare([cctool.load("b.pt")], data="digits", task="guessing")[0]
    from cctool.operations.inspect.comparison import Compared, compared
    from cctool.operations.inspect.comparison import tables as shown
    from cctool.options.inspect.compare import CompareOptions

    told, _ = compared(
        [Compared("a", 10, first), Compared("b", 5, second)], CompareOptions(csv="t.csv"), force=False
    )
    (_, columns, lines), (_, sizes, others) = shown(told)
    assert list(columns) == ["file", "steps", "n", "top-1 %", "95 %", "certainty", "loss"]
    assert lines[0][5] is None
    assert lines[1][3:5] == [None, None]
    assert second.metrics is not None
    assert lines[1][5] == second.metrics.values["sure"]
    assert [line[sizes.index("smaller")] for line in others] == ["1.00x", "2.00x"]
    assert told[1].report.differences == ()
    assert Path("t.csv").read_text().splitlines()[0].count("certainty") == 1


@pytest.mark.usefixtures("place")
def test_without_data_only_sizes_are_compared() -> None:
    checkpoint = cctool.load("a.pt")
    spec = checkpoint.spec.model_copy(update={"data": None})
    cctool.save(Checkpoint(checkpoint.model, spec), "blind.pt")
    result = ran("blind.pt", "a.pt")
    assert max(map(len, result.stdout.splitlines())) <= 80
    found = rows("blind.pt", "a.pt")
    assert found[0]["report"]["metrics"] is None
    assert found[1]["report"]["differences"] == []


@pytest.mark.usefixtures("place")
def test_networks_that_number_their_classes_otherwise_are_paired_by_name() -> None:
    first = cctool.load("a.pt")
    names = tuple(reversed(first.spec.classes or ()))
    flipped = Checkpoint(first.model, first.spec.model_copy(update={"classes": names}))
    found = cctool.compare([first, flipped], data="digits")[1].differences[0]
    assert found.test == "mcnemar"


@pytest.mark.usefixtures("place")
def test_a_users_metric_has_a_column_beside_the_tasks_own() -> None:
    Path("my.py").write_text(
        "def sure(outputs, targets):\n    return float(outputs.softmax(1).amax(1).mean())\n"
    )
    options = ["--data", "digits", "--metric", "my.py:sure"]
    result = ran("a.pt", "b.pt", *options)
    assert "sure" in result.stdout.splitlines()[1]
    assert "top-1 %" in result.stdout.splitlines()[1]
    values = [row["report"]["metrics"]["values"]["sure"] for row in rows("a.pt", "b.pt", *options)]
    ran("a.pt", "b.pt", *options, "--csv", "t.csv")
    with Path("t.csv").open() as stream:
        assert [float(row["sure"]) for row in csv.DictReader(stream)] == values
