"""Confusion matrices as pictures and tables."""

import csv
import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import openpyxl
import pytest
import torch
from PIL import Image

from cctool.analysis import confusion
from cctool.analysis.confusion import draw_confusion, write_confusion
from cctool.base.errors import CheckpointError


def matrix(classes: int) -> torch.Tensor:
    found = torch.randint(0, 3, (classes, classes), generator=torch.Generator().manual_seed(0))
    return found + torch.diag(torch.full((classes,), 90))


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


@pytest.mark.parametrize("classes", [2, 10, 200])
def test_no_two_names_overlap(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures = []
    saved = Figure.savefig

    def keep(self: Figure, *args: object, **kwargs: object) -> None:
        saved(self, *args, **kwargs)
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    names = [f"class ${number} of a long name indeed" for number in range(classes)]
    draw_confusion(matrix(classes), names, "net on data")
    axes = figures[0].axes[0]
    for labels, side in ((axes.get_yticklabels(), 1), (axes.get_xticklabels(), 0)):
        spans = sorted(tuple(text.get_window_extent().get_points()[:, side]) for text in labels)
        assert len(spans) == classes
        assert all(high <= low for (_, high), (low, _) in pairwise(spans))
    texts = [axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel()]
    assert texts == ["net on data", "predicted", "label"]
    assert "%" in figures[0].axes[1].get_ylabel()
    assert bool(axes.texts) == (classes <= 20)


def test_of_very_many_classes_some_are_named() -> None:
    picture = pixels(draw_confusion(matrix(600), [str(number) for number in range(600)], "many"))
    assert max(picture.shape) < 4000


def test_colours_follow_the_share_of_a_row() -> None:
    """Ten times as many samples of a class do not change the picture, but their numbers in the cells."""
    names = [str(number) for number in range(30)]
    counts = matrix(30)
    more = counts.clone()
    more[3] *= 10
    other = counts.clone()
    other[3, 5] += 40
    picture = draw_confusion(counts, names, "t")
    assert draw_confusion(more, names, "t") == picture
    assert draw_confusion(other, names, "t") != picture


def test_rows_without_samples_are_grey_and_odd_names_are_drawn() -> None:
    counts = matrix(3)
    counts[1] = 0
    picture = pixels(draw_confusion(counts, ["猫", "a$b$", "x_{"], "网"))
    grey = (picture == round(0.88 * 255)).all(2)
    assert grey.sum() > 10_000


def test_tables_hold_the_counts(tmp_path: Path) -> None:
    counts, names = matrix(3), ["=cat", "dog", "eel"]
    for suffix in ("csv", "xlsx"):
        write_confusion(counts, names, "t", tmp_path / f"c.{suffix}", (("Network", "net"),))
    with (tmp_path / "c.csv").open(newline="") as stream:
        head, *rows = csv.reader(stream)
    assert head == ["label", *names]
    assert [row[0] for row in rows] == names
    assert [[int(cell) for cell in row[1:]] for row in rows] == counts.tolist()
    sheet = openpyxl.load_workbook(tmp_path / "c.xlsx")["Confusion"]
    cells = [[cell.value for cell in row] for row in sheet.iter_rows()]
    assert cells == [["label", *names], *([n, *row] for n, row in zip(names, counts.tolist(), strict=True))]
    with pytest.raises(CheckpointError, match="exists already"):
        write_confusion(counts, names, "t", tmp_path / "c.csv", ())
    write_confusion(counts, names, "t", tmp_path / "c.png", ())
    with pytest.raises(CheckpointError, match="exists already"):
        write_confusion(counts, names, "t", tmp_path / "c.png", ())


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (99_999, "99999"), (123_456, "1e5"), (4.6e9, "5e9")])
def test_counts_fit_their_cells(count: float, text: str) -> None:
    assert confusion._short(count) == text
