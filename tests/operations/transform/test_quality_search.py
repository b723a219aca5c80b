"""The search for a quality, on a curve that is known in closed form and on networks; sweeps; report files."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cctool.base.errors import CheckpointError, TransformError, UsageError
from cctool.checkpoint.checkpoint import load
from cctool.cli.main import app
from cctool.operations.registries import tables
from cctool.operations.transform.quality_search import QUALITIES, QualityTrial, search_quality
from cctool.options.inspect.evaluate import SplitName
from cctool.transforms.codec.taps import taps_of
from coded_toys import TAPS, evaluated, lenet_file, transformed


def curve(quality: float) -> QualityTrial:
    ratio = 20 / (1 + quality / 10)
    return QualityTrial(quality, ratio, 8 / ratio)


@pytest.mark.parametrize("ratio", [2.0, 4.0, 8.0, 15.0])
def test_the_ratio_is_reached_and_hardly_exceeded(ratio: float) -> None:
    found, tried = search_quality(ratio, curve)
    assert ratio <= found.ratio <= ratio * 1.006
    assert found.quality == pytest.approx(10 * (20 / ratio - 1), rel=0.02)
    assert found in tried
    assert len(tried) < 15


def test_what_the_finest_reaches_is_not_made_coarser() -> None:
    found, tried = search_quality(1.5, curve)
    assert (found.quality, len(tried)) == (100, 1)


def test_what_cannot_be_reached_gives_the_coarsest() -> None:
    found, tried = search_quality(19, curve)
    assert found == curve(1.0)
    assert [trial.quality for trial in tried] == [100, 1]


def test_a_staircase_ends_too() -> None:
    found, tried = search_quality(5, lambda quality: QualityTrial(quality, 10 if quality < 33.3 else 2, 1))
    assert found.quality == pytest.approx(33.3, abs=0.06)
    assert len(tried) < 16


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lenet_file(tmp_path_factory.mktemp("search"))


def test_the_ratio_is_what_evaluate_counts(net: Path, tmp_path: Path) -> None:
    product = transformed(net, tmp_path / "c.pt", ratio=4.0, k=1)
    search = product.report.search
    assert search.split == "validation"
    assert search.n == 40
    # The smallest maps are one element, so the steps of the ratio are coarse.
    assert 4 <= search.found.ratio < 4.2
    taps = evaluated(Path(product.path), split=SplitName.VALIDATION).taps
    elements, bits = sum(tap.elements for tap in taps), sum(tap.bits for tap in taps)
    assert 8 * elements / bits == pytest.approx(search.found.ratio)
    quality = {hook.codec.quality for hook in taps_of(load(Path(product.path), tables()).model).values()}
    assert quality == {search.found.quality}
    (note,) = [note for note in product.report.notes if "was asked for" in note]
    assert "on 40 validation images, 4 was asked for" in note
    assert product.step.options["features"]["ratio"] == 4.0  # type: ignore[index, call-overload]


def test_a_ratio_needs_steps(net: Path, tmp_path: Path) -> None:
    with pytest.raises(TransformError, match="--kernel identity has none"):
        transformed(net, tmp_path / "c.pt", "identity", ratio=2.0)
    assert list(tmp_path.iterdir()) == []


def test_a_ratio_out_of_reach_gives_quality_1_and_a_warning(net: Path, tmp_path: Path) -> None:
    arguments = ["transform", str(net), "--target", "features", "--target", "ratio=8", "--taps", "features.2"]
    shown = CliRunner().invoke(
        app, [*arguments, "--data", "digits", "--limit", "40", "-o", str(tmp_path / "c.pt")]
    )
    assert shown.exit_code == 0
    assert "ratio=8 is out of reach" in " ".join(shown.stderr.split())
    hooks = taps_of(load(tmp_path / "c.pt", tables()).model)
    assert {hook.codec.quality for hook in hooks.values()} == {1.0}


def test_the_sweep_is_a_table_and_a_plot(net: Path, tmp_path: Path) -> None:
    product = transformed(net, tmp_path / "c.pt", sweep=True)
    with (tmp_path / "c.sweep.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(float(row["Quality"]), row["Split"]) for row in rows] == [
        (quality, split) for quality in QUALITIES for split in ("validation", "test")
    ]
    assert {row["n"] for row in rows} == {"40"}
    ratios = [float(row["vs 8 bit"]) for row in rows if row["Split"] == "test"]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 1.2 * ratios[-1]
    assert (tmp_path / "c.sweep.png").read_bytes().startswith(b"\x89PNG")
    # The product is the one at the default quality.
    middle = next(row for row in rows if row["Quality"] == "50.0" and row["Split"] == "test")
    assert float(middle["vs 8 bit"]) == pytest.approx(product.report.ratio_8bit)
    assert float(middle["Top-1 (%)"]) == pytest.approx(product.report.metrics_after[-1].values["top1"])
    plain = transformed(net, tmp_path / "d.pt")
    assert plain.content == product.content or plain.report.ratio_8bit == product.report.ratio_8bit
    (tmp_path / "c.pt").unlink()
    with pytest.raises(CheckpointError, match=r"c\.sweep\.csv exists already"):
        transformed(net, tmp_path / "c.pt", sweep=True)


def test_reports_stand_where_they_were_asked_for(net: Path, tmp_path: Path) -> None:
    files = {"report_file": str(tmp_path / "taps.csv"), "histograms": str(tmp_path / "pictures")}
    product = transformed(net, tmp_path / "c.pt", **files)
    assert product.report.written == tuple(files.values())
    with (tmp_path / "taps.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["Tap"] for row in rows] == [*TAPS, "Total"]
    tap = product.report.taps[0]
    assert float(rows[0]["Mean"]) == pytest.approx(tap.mean)
    assert float(rows[0]["k=0 vs 8 bit"]) == pytest.approx(
        8 * tap.elements / (tap.payload_bits[0] + tap.side_bits)
    )
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert set(pictures) == {f"{name}.png" for name in TAPS}
    with pytest.raises(CheckpointError, match="exists already"):
        transformed(net, tmp_path / "d.pt", **files)
    with_zeros = evaluated(
        Path(product.path),
        histograms=str(tmp_path / "zeros"),
        zero_bar=True,
        report_file=str(tmp_path / "e.json"),
    )
    assert (tmp_path / "zeros" / "features.2.png").read_bytes() != pictures["features.2.png"]
    assert with_zeros.written == (str(tmp_path / "e.json"), str(tmp_path / "zeros"))
    notes = dict(json.loads((tmp_path / "e.json").read_text())["notes"])
    assert notes["Measured on"] == "digits, test split, n=40"
    assert "with codecs" in notes["top1 on test (n=40)"]


def test_the_zero_bar_is_for_histograms(net: Path) -> None:
    with pytest.raises(UsageError, match="--zero-bar is for --histograms"):
        evaluated(net, zero_bar=True)
