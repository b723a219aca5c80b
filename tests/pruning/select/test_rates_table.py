"""Tables of rates: what is read, what is refused, and what each family gets."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cctool.base.errors import UsageError
from cctool.options.prune.choices import PruneMethod
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.planner import Planner
from cctool.pruning.select.rates import read_rates


def test_json_objects_lists_and_csv_say_the_same(tmp_path: Path) -> None:
    expected = {"conv1": 0.25, "layer.2": 0.5}
    (tmp_path / "a.json").write_text(json.dumps(expected))
    rows = [{"family": name, "rate": rate, "accuracy": 90} for name, rate in expected.items()]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text("Layer, top1, Rate\nconv1,91.2,0.25\nlayer.2,90.1,.5\n\n,,\n")
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbfname,rate\r\nconv1,0.25\r\nlayer.2,0.5\r\n")
    for name in ("a.json", "b.json", "c.csv", "d.csv"):
        assert read_rates(str(tmp_path / name)) == expected, name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"\.csv or \.json"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "3", "an object of name: rate"),
        ("a.json", '{"conv": 1.0}', r"row 1 \(conv: 1\.0\)"),
        ("a.json", '{"conv": -0.1}', "row 1"),
        ("a.json", '{"conv": true}', "row 1"),
        ("a.json", '{"conv": "half"}', "row 1"),
        ("a.json", '{"conv": NaN}', "row 1"),
        ("a.json", "{}", "holds no rates"),
        ("a.csv", "family,fraction\nconv,0.5\n", "must name a column rate"),
        ("a.csv", "", "empty"),
        ("a.csv", "family,rate\nconv,0.5\nconv,0.25\n", "two rates"),
        ("a.csv", "family,rate\n,0.5\n", "without a name"),
        ("a.csv", "layer,rate\nconv,0.3\nfc,0,5\n", r"row 2 \(fc,0,5\): the header has 2 cells, this row 3"),
        ("a.csv", "layer,rate\nconv,0.3\nfc\n", r"row 2 \(fc\): the header has 2 cells, this row 1"),
        ("a.csv", "layer,rate\nconv,0.3\nfc,\n", r"row 2 \(fc: without a rate\)"),
        ("a.csv", "layer,rate,Rate\nconv,.1,.5\n", "names the column rate twice"),
        ("a.csv", "layer,Layer,rate\nconv,fc,.5\n", "names the column layer twice"),
        ("a.csv", "family,layer,rate\nconv,fc,.5\n", r"row 1 \(family conv, layer fc\): has several"),
        ("a.json", '[{"layer": "conv", "rate": 0.3}, {"layer": "fc", "rate": null}]', r"row 2 \(fc: without"),
        ("a.json", '[{"layer": "conv", "rate": 0.3}, {"layer": "fc"}]', r"row 2 \(fc: without a rate\)"),
        ("a.json", '{"conv": 0.3, "fc": null}', r"row 2 \(fc: without a rate\)"),
        ("a.json", '[{"layer": "conv", "name": "fc", "rate": 0.3}]', "has several names"),
    ],
)
def test_malformed_tables_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        read_rates(str(tmp_path / name))


def test_a_row_may_have_its_name_in_either_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("family,layer,rate\nconv,,.5\n,fc,.25\nx,x,.75\n")
    assert read_rates(str(tmp_path / "a.csv")) == {"conv": 0.5, "fc": 0.25, "x": 0.75}


def test_a_missing_table_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_rates(str(tmp_path / "none.csv"))


class Net(nn.Module):
    """Two chains into a sum, then a third family."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.c, self.d = nn.Conv2d(8, 20, 1), nn.Conv2d(20, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.a(x) + self.b(x)).relu())  # type: ignore[no-any-return]


def kept(tmp_path: Path, rates: dict[str, float]) -> tuple[list[int], list[str]]:
    (tmp_path / "r.json").write_text(json.dumps(rates))
    options = PruneOptions(method=PruneMethod.L1, rates=str(tmp_path / "r.json"))
    planner = Planner(Net(), (torch.randn(1, 3, 4, 4),), options)
    result = planner.verified(planner.by_options())
    return [int(mask.sum()) for mask in result.selection.kept], list(result.report.notes)


def test_each_family_gets_its_own_rate(tmp_path: Path) -> None:
    assert kept(tmp_path, {"a": 0.25, "c": 0.9}) == ([6, 2], [])
    # a layer that is not its family's first names it, too
    assert kept(tmp_path, {"b": 0.5, "c.weight": 0.1})[0] == [4, 18]


def test_silent_families_keep_their_width_and_are_named(tmp_path: Path) -> None:
    widths, notes = kept(tmp_path, {"c": 0.5})
    assert widths == [8, 10]
    assert notes == [f"not named in {tmp_path / 'r.json'}, so they keep their width: a"]


def test_the_smallest_of_a_familys_rates_counts(tmp_path: Path) -> None:
    widths, notes = kept(tmp_path, {"b": 0.25, "a.weight": 0.75, "c": 0.5})
    assert widths == [6, 10]
    assert notes == ["a: the smallest of its layers' rates counts (b 0.25, a.weight 0.75)"]


def test_unknown_names_are_refused_with_what_is_near(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"aa is no family or layer .*near: a"):
        kept(tmp_path, {"aa": 0.5})
    # the output's width is never cut
    with pytest.raises(UsageError, match="d is no family"):
        kept(tmp_path, {"d": 0.5})
