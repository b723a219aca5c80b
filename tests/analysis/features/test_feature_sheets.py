"""The sheets of coded feature maps, from figures made by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import openpyxl
import pytest

from cctool.analysis.features.bands import bands_of, grouped
from cctool.analysis.features.sheets import feature_report
from cctool.analysis.table import Column, Report, Table, harmonic_mean_by
from cctool.analysis.workbook import write_report
from cctool.transforms.codec.figures import BandCounts, TapFigures


def tap(name: str = "layer1", elements: int = 1000, scale: int = 1, **changes: object) -> TapFigures:
    given: dict[str, object] = {
        "name": name, "shape": (2, 5, 10), "samples": elements // 100, "elements": elements,
        "symbols": elements, "minimum": 0.0, "maximum": 3.0, "mean": 0.5, "zeros": 40.0,
        "zero_symbols": 70.0, "k": 1,
        "payload_bits": tuple(scale * bits for bits in (2400, 2000, 1900, 2100, 2300, 2500)),
        "best_k": 2, "side_bits": 100, "entropy_bits": 1500.0, "clamped_values": 3, "clamped_symbols": 4,
        "sqnr_db": 12.5, "signed": True,
        "bands": (BandCounts("0", (0, 3, 1, 0, 4)), BandCounts("1", (92,))),
    }  # fmt: skip
    return TapFigures(**(given | changes))  # type: ignore[arg-type]


@pytest.fixture
def report() -> Report:
    taps = [tap(), tap("layer2", 3000, 4, clamped_symbols=0)]
    return feature_report(
        taps, [("Network", "toy"), ("top1 on test (n=7)", "90 without codecs, 89 with them")]
    )


def test_ratios_count_side_information_and_add_up(report: Report) -> None:
    values = report.table.values()
    assert values["ratio8_k1"] == [pytest.approx(8000 / 2100), pytest.approx(24000 / 8100)]
    assert values["ratio32_k5"][0] == pytest.approx(32000 / 2600)
    assert values["bits_per_element"] == [2.1, 2.7]
    totals = dict(zip([column.key for column in report.table.columns], report.table.totals(), strict=True))
    assert totals["elements"] == 4000
    assert totals["ratio8_k1"] == pytest.approx(8 * 4000 / (2100 + 8100))
    assert totals["bits_per_element"] == pytest.approx((2100 + 8100) / 4000)
    assert (totals["clamped_symbols"], totals["minimum"], totals["maximum"]) == (4, 0.0, 3.0)


def test_the_best_order_is_marked(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "a.xlsx")
    book = openpyxl.load_workbook(tmp_path / "a.xlsx")
    assert book.sheetnames == ["Taps", "Sub-bands", "Notes"]
    sheet = book["Taps"]
    bold = {sheet.cell(1, cell.column).value for cell in sheet[2] if cell.font.bold}
    assert bold == {"k=2 vs 8 bit", "k=2 vs float32"}
    assert [cell.value for cell in book["Notes"][3]] == [
        "top1 on test (n=7)",
        "90 without codecs, 89 with them",
    ]
    write_report(report, tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text())
    assert [0, "ratio8_k2"] in document["table"]["marked"]
    write_report(report, tmp_path / "a.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert rows[0][:3] == ["Tap", "Map", "Elements"]
    assert rows[1][:3] == ["layer1", "2x5x10", "1000"]
    assert rows[-1][0] == "Total"


def test_the_total_of_ratios_is_a_live_formula(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "a.xlsx")
    sheet = openpyxl.load_workbook(tmp_path / "a.xlsx")["Taps"]
    at = {cell.value: cell.column_letter for cell in sheet[1]}
    elements, ratio = f"{at['Elements']}2:{at['Elements']}3", f"{at['k=1 vs 8 bit']}2:{at['k=1 vs 8 bit']}3"
    expected = f"=IF(SUM({elements})=0,0,SUM({elements})/SUMPRODUCT({elements}/{ratio}))"
    assert sheet[f"{at['k=1 vs 8 bit']}4"].value == expected


def test_bands_are_signed_and_in_order(report: Report) -> None:
    low, high = bands_of(tap())
    # By unsigned symbol 0, -1, 1, -2, 2.
    assert (low.name, low.symbols, low.counts) == ("i+j=0", (-1, 1, 2), (3, 1, 4))
    assert (high.zeros, high.total) == (92, 92)
    (unsigned, _) = bands_of(tap(signed=False))
    assert unsigned.symbols == (1, 2, 4)
    rows = report.others[0].rows
    assert rows[0][:6] == ("layer1", "i+j=0", 8, 0.0, -1, 2)
    assert rows[1][3:] == (100.0, 0, 0, 0.0)


def test_neighbouring_bands_are_joined_where_there_are_many() -> None:
    bands = bands_of(tap(bands=tuple(BandCounts(str(i), (i, 1)) for i in range(127))))
    joined = grouped(bands, 16)
    assert len(joined) == 16
    assert joined[0].name == "i+j=0 to 7"
    assert sum(band.total for band in joined) == sum(band.total for band in bands)
    assert grouped(bands[:15], 16) == bands[:15]


def test_exact_maps_have_no_noise_ratio() -> None:
    assert feature_report([tap(sqnr_db=None)], []).table.values()["sqnr"] == [None]


def test_tables_without_totals_have_no_such_row(tmp_path: Path) -> None:
    table = Table("a", (Column("x", "X", "Any."), Column("y", "Y", "Any.", "0")), (("one", 1),))
    write_report(Report("a", table), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "X,Y\none,1\n"
    write_report(Report("a", table), tmp_path / "a.xlsx")
    assert openpyxl.load_workbook(tmp_path / "a.xlsx")["a"].max_row == 2
    write_report(Report("a", table), tmp_path / "a.json")
    assert "totals" not in json.loads((tmp_path / "a.json").read_text())["table"]


def test_a_harmonic_mean_of_nothing_is_zero() -> None:
    total = harmonic_mean_by("x", "w")
    assert total.value({"x": [], "w": []}) == 0
    assert total.value({"x": [2.0, None, 4.0], "w": [1, 5, 1]}) == pytest.approx(2 / (0.5 + 0.25))
