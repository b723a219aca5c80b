"""docs/benchmarks.md is what the committed results say."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_report", ROOT / "benchmarks" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # as for a script, which finds the files beside it
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec.loader.exec_module(module)
    return module


def test_the_page_is_not_stale(report: ModuleType) -> None:
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == report.render()


def test_every_result_says_how_it_came_about() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {"commit", "command", "seed", "machine", "torch", "rows"} <= result.keys(), path.name
        assert (ROOT / result["command"].split()[1]).is_file(), path.name


def test_the_dct_is_at_least_as_fast_as_the_peers() -> None:
    path = ROOT / "benchmarks" / "results" / "dct_speed.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {row["threads"] for row in rows} == {1, 2}
    assert all(row["shape"] == [64, 64, 56, 56] and row["ratio"] >= 1 for row in rows)


def test_claims_of_the_coder_hold() -> None:
    path = ROOT / "benchmarks" / "results" / "coding_speed.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 4
    for row in rows:
        assert row["symbols"] == 10_000_000
        assert row["ratio_python_encode"] >= 20
        assert row["ratio_python_decode"] >= 20
        assert row["ratio_nncodec"] >= 2
        assert row["entropy"] <= row["bits_per_symbol"]


def test_claims_against_peers_hold() -> None:
    results = ROOT / "benchmarks" / "results"
    speed = json.loads((results / "prune_speed.json").read_text(encoding="utf-8"))["rows"]
    assert {row["network"] for row in speed} == {"resnet50", "densenet121", "mobilenet_v2"}
    assert all(row["ratio"] <= 1.0 for row in speed)
    training = json.loads((results / "train_throughput.json").read_text(encoding="utf-8"))["rows"]
    assert {row["device"] for row in training} >= {"cpu"}
    assert all(row["ratio"] >= 0.95 for row in training)
    for row in json.loads((results / "prune_table.json").read_text(encoding="utf-8"))["rows"]:
        # The peer's fraction is rounded to six digits as ours is.
        assert row["removable"] >= (row["torch_pruning_removable"] or 0.0) - 1e-6, row["architecture"]
    slimming = results / "slimming.json"
    for row in json.loads(slimming.read_text(encoding="utf-8"))["rows"]:
        assert row["n"] == 10_000
        assert row["dense"]["accuracy"] == 90.03
        # Neither network costs more than half, and ours not more than the peer's.
        assert row["cctool"]["macs"] <= row["torch_pruning"]["macs"] <= row["dense"]["macs"] / 2
        assert row["difference"] >= -0.3
