"""Labels go with names: data sets whose classes are some of the network's, in any order, or others."""

import csv
from pathlib import Path

import pytest

import cctool
from cctool.data.classes import by_name, numbers_of
from cctool.data.registry import open_data
from shade_toys import SHADES, picture_folder, ran


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shades")
    picture_folder(place / "all", SHADES)
    picture_folder(place / "two", {"grey": 120, "white": 250})
    # Another order: its "a" comes first, and means the last class of the others.
    picture_folder(place / "odd", {"grey": 120, "crimson": 30})
    picture_folder(place / "others", {"red": 30, "green": 150, "blue": 220})
    line = ["--arch", "lenet", "--input", "1x32x32", "--epochs", "12", "--lr", "0.01", "--batch-size", "8"]
    ran("train", *line, "--data", f"folder:{place / 'all'}", "-o", place / "net.pt")
    return place


def test_a_subset_is_measured_by_name(place: Path) -> None:
    rows = place / "rows.csv"
    said = ran("evaluate", place / "net.pt", "--data", f"folder:{place / 'two'}", "--predictions", rows)
    assert "2 of 5 classes of the network, matched by name: grey, white" in said
    found = list(csv.DictReader(rows.read_text().splitlines()))
    agree = 100 * sum(row["label"] == row["predicted"] for row in found) / len(found)
    assert all(row["label"] == Path(row["file"]).parent.name for row in found)
    report = cctool.evaluate(cctool.load(place / "net.pt"), data=f"folder:{place / 'two'}")
    assert report.metrics is not None
    assert report.metrics.values["top1"] == pytest.approx(agree)
    assert agree > 75


def test_training_on_a_subset_moves_the_right_outputs(place: Path) -> None:
    ran(
        "train", place / "net.pt", "--data", f"folder:{place / 'two'}", "--epochs", "1", "--lr", "0.001",
        "--batch-size", "8", "-o", place / "more.pt",
    )  # fmt: skip
    trained = cctool.load(place / "more.pt")
    assert trained.spec.classes == tuple(sorted(SHADES))
    report = cctool.evaluate(trained, data=f"folder:{place / 'two'}")
    assert report.metrics is not None
    assert report.metrics.values["top1"] > 75


VERBS = (
    ["evaluate"],
    ["train", "--epochs", "1"],
    ["distill", "--epochs", "1", "--teacher", "net.pt"],
    ["prune", "--method", "l1", "--recalibrate", "8"],
    ["quantize", "--method", "int8"],
    ["transform", "--target", "features"],
    ["compare"],
)


@pytest.mark.parametrize("line", VERBS, ids=lambda line: line[0])
@pytest.mark.parametrize(("name", "first"), [("odd", "crimson"), ("others", "blue")])
def test_a_class_that_the_network_lacks_is_refused_by_every_verb(
    place: Path, line: list[str], name: str, first: str
) -> None:
    verb, *options = [str(place / word) if word == "net.pt" else word for word in line]
    before = sorted(place.iterdir())
    said = ran(verb, place / "net.pt", *options, "--data", f"folder:{place / name}", exit_code=1)
    more = "" if name == "odd" else " (and 2 more)"
    assert (
        f"folder:{place / name} has the class '{first}', which the network does not know{more}; "
        "`cctool train --new-head` trains a fresh last layer for its classes"
    ) in said
    assert sorted(place.iterdir()) == before


def test_a_teachers_classes_are_matched_by_name(place: Path) -> None:
    line = ["--arch", "lenet", "--input", "1x32x32", "--epochs", "8", "--lr", "0.01", "--batch-size", "8"]
    data = ["--data", f"folder:{place / 'two'}"]
    ran("distill", "--teacher", place / "net.pt", "--alpha", "1", *line, *data, "-o", place / "student.pt")
    student = cctool.load(place / "student.pt")
    assert student.spec.classes == ("grey", "white")
    report = cctool.evaluate(student, data=f"folder:{place / 'two'}")
    assert report.metrics is not None
    assert report.metrics.values["top1"] > 75
    line[line.index("8")] = "1"
    said = ran(
        "distill", "--teacher", place / "net.pt", *line, "--data", f"folder:{place / 'odd'}",
        "-o", place / "no.pt", exit_code=1,
    )  # fmt: skip
    assert "'crimson', which the teacher" in said


def test_numbers_follow_names() -> None:
    digits = open_data("digits")
    names = tuple(reversed(digits.classes))
    found = by_name(digits, names).split("test")
    assert found.labels is not None
    assert digits.split("test").labels is not None
    assert (found.labels == 9 - digits.split("test").labels).all()  # type: ignore[operator]
    with pytest.raises(cctool.CctoolError, match="stands for two classes"):
        numbers_of(["a"], ["a", "b", "a"], "the set", owner="the network")
    assert "are taken in order" in by_name(digits, None).notes[-1]
