"""Workbooks are read back by openpyxl, and their formulas by a program that computes them."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import openpyxl
import pytest
import torch
from torch import nn

from cctool.analysis.crosscheck import check_against_thop
from cctool.analysis.layers import tabulate
from cctool.analysis.sheets import macs_report, sparsity_report
from cctool.analysis.sparsity import nonfinite, sparsity
from cctool.analysis.table import Chart, Column, Report, Table, complement, mean_by, total_sum
from cctool.analysis.workbook import WRITERS, write_report
from cctool.base.errors import CheckpointError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec
from cctool.graph.cost import measure
from cctool.options.inspect.analyze import TABLE_SUFFIXES

NOTES = (("Network", "toy"),)


def toy() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[4].weight[:, :30] = 0
    return model


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    model = toy()
    cost = measure(model, (3, 8, 8))
    table = tabulate(Checkpoint(model, ModelSpec(architecture="x", input_shape=(3, 8, 8))), cost)
    check = check_against_thop(model, (3, 8, 8), cost)
    return {
        "macs": macs_report(table, check, NOTES),
        "sparsity": sparsity_report(sparsity(model), nonfinite(model), NOTES),
    }


def column(report: Report, key: str) -> int:
    return [column.key for column in report.table.columns].index(key) + 1


def test_sheet_layout(reports: dict[str, Report], tmp_path: Path) -> None:
    write_report(reports["macs"], tmp_path / "a.xlsx")
    book = openpyxl.load_workbook(tmp_path / "a.xlsx")
    assert book.sheetnames == ["MACs", "MACs chart", "thop", "Notes"]
    sheet = book["MACs"]
    assert sheet.freeze_panes == "B2"
    assert [cell.value for cell in sheet[1]] == [c.title for c in reports["macs"].table.columns]
    assert sheet.auto_filter.ref == f"A1:{sheet.cell(1, sheet.max_column).column_letter}5"
    macs = column(reports["macs"], "macs")
    assert sheet.cell(2, 1).value == "0"
    assert sheet.cell(2, macs).value == 8 * 36 * 27
    assert sheet.cell(2, macs).number_format.startswith("#,##0")
    assert sheet.cell(6, 1).value == "Total"
    letter = sheet.cell(1, macs).column_letter
    assert sheet.cell(6, macs).value == f"=SUM({letter}2:{letter}5)"
    assert len(book["MACs chart"]._charts) == 1
    assert book["MACs chart"]["A2"].value == "='MACs'!A2"
    assert book["Notes"]["B2"].value == "toy"


def test_columns_are_wide_enough(reports: dict[str, Report], tmp_path: Path) -> None:
    write_report(reports["macs"], tmp_path / "a.xlsx")
    sheet = openpyxl.load_workbook(tmp_path / "a.xlsx")["MACs"]
    for cells in sheet.iter_cols(max_row=5, min_row=2):
        width = sheet.column_dimensions[cells[0].column_letter].width
        texts = [f"{v:.2f}" if isinstance(v := cell.value, float) else str(v or "") for cell in cells]
        assert width > max(map(len, texts))


def test_sparsity_columns_are_distillers(reports: dict[str, Report], tmp_path: Path) -> None:
    write_report(reports["sparsity"], tmp_path / "a.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert rows[0] == [
        "Name", "Shape", "NNZ (dense)", "NNZ (sparse)", "Cols (%)", "Rows (%)", "Ch (%)", "2D (%)", "3D (%)",
        "Fine (%)", "Std", "Mean", "Abs-Mean",
    ]  # fmt: skip
    assert rows[1][:2] == ["0.weight", "8x3x3x3"]
    assert rows[-1][0] == "Total"
    assert float(rows[-1][9]) == pytest.approx(100 * (54 + 150) / (216 + 1440))


def test_totals_of_csv_and_json_are_the_rows_sums(reports: dict[str, Report], tmp_path: Path) -> None:
    report = reports["macs"]
    write_report(report, tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text())["table"]
    for key in ("macs", "parameters", "bytes", "norm_ops"):
        assert document["totals"][key] == sum(row[key] for row in document["rows"])
    assert document["totals"]["macs"] == 8 * 36 * 27 + 5 * 288


def evaluate(formula: str, sheet: Any) -> float:
    """A reader of the few functions that totals use, apart from the code that wrote them."""

    def numbers(area: str) -> list[float]:
        return [cell.value or 0 for (cell,) in sheet[area]]

    text = formula.removeprefix("=")
    text = re.sub(r"SUMPRODUCT\((\w+:\w+),(\w+:\w+)\)", r"product('\1','\2')", text)
    text = re.sub(r"SUM\((\w+:\w+)\)", r"total('\1')", text)
    text = text.replace("=0,", "==0,").replace("IF(", "either(")
    names = {
        "total": lambda area: sum(numbers(area)),
        "product": lambda a, b: sum(x * y for x, y in zip(numbers(a), numbers(b), strict=True)),
        "either": lambda condition, yes, no: yes if condition else no,
    }
    return float(eval(text, {"__builtins__": {}}, names))  # noqa: S307 - our own workbook


@pytest.mark.parametrize("name", ["macs", "sparsity"])
def test_formulas_give_the_values_that_other_files_hold(
    reports: dict[str, Report], tmp_path: Path, name: str
) -> None:
    report = reports[name]
    write_report(report, tmp_path / "a.xlsx")
    sheet = openpyxl.load_workbook(tmp_path / "a.xlsx").worksheets[0]
    last = len(report.table.rows) + 2
    formulas = 0
    for x, expected in enumerate(report.table.totals()[1:], start=2):
        formula = sheet.cell(last, x).value
        assert (formula is None) == (expected is None)
        if formula is not None:
            formulas += 1
            assert evaluate(formula, sheet) == pytest.approx(expected)
    assert formulas >= 5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("soffice") is None, reason="needs LibreOffice")
def test_libreoffice_computes_the_same_totals(reports: dict[str, Report], tmp_path: Path) -> None:
    write_report(reports["sparsity"], tmp_path / "a.xlsx")
    command = ["soffice", "--headless", "--convert-to", "csv", "--outdir", str(tmp_path), "a.xlsx"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    total = list(csv.reader(io.StringIO((tmp_path / "a.csv").read_text())))[-1]
    assert total[0] == "Total"
    assert float(total[9]) == pytest.approx(100 * (54 + 150) / (216 + 1440), abs=0.005)


def strange() -> Report:
    columns = (
        Column("name", "Name", "text"),
        Column("a", "A", "numbers", "0.00", total_sum("a")),
        Column("b", "B", "numbers", "0.00", complement("a", "b")),
        Column("c", "C", "numbers", "0.00", mean_by("c", "a")),
    )
    rows = (("=1+1", 1.0, 4.0, math.nan), ("bad\x00name", 2.0, None, math.inf), ("x", None, 4.0, 1.0))
    return Report("strange", Table("Odd", columns, rows, Chart("t", "name", "a", "a")))


def test_formulas_and_control_characters_in_names_stay_text(tmp_path: Path) -> None:
    write_report(strange(), tmp_path / "a.xlsx")
    sheet = openpyxl.load_workbook(tmp_path / "a.xlsx")["Odd"]
    assert (sheet["A2"].value, sheet["A2"].data_type) == ("=1+1", "s")
    assert sheet["A3"].value == "bad?name"
    assert [(sheet[f"D{y}"].value, sheet[f"D{y}"].data_type) for y in (2, 3)] == [("#NUM!", "e")] * 2


def test_json_has_null_for_what_json_cannot_say(tmp_path: Path) -> None:
    write_report(strange(), tmp_path / "a.json")
    rows = json.loads((tmp_path / "a.json").read_text())["table"]["rows"]
    assert [row["c"] for row in rows] == [None, None, 1.0]


def test_an_empty_table_can_be_written(tmp_path: Path) -> None:
    report = sparsity_report((), (), NOTES)
    for suffix in TABLE_SUFFIXES:
        write_report(report, tmp_path / f"a{suffix}")
    assert openpyxl.load_workbook(tmp_path / "a.xlsx")["Sparsity"]["A2"].value == "Total"


def test_every_suffix_has_a_writer_and_others_are_refused(tmp_path: Path) -> None:
    assert set(WRITERS) == set(TABLE_SUFFIXES)
    with pytest.raises(UsageError, match=r"\.ods"):
        write_report(strange(), tmp_path / "a.ods")


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        write_report(strange(), path)
    assert path.read_text() == "mine"
    write_report(strange(), path, overwrite=True)
    assert path.read_text().startswith("Name,")
