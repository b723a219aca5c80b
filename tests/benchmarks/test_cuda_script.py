"""`make test-cuda`: what it counts, what it does without a GPU, and what README says until it has run."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pretended_cuda.plugin import REAL

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "cuda.json"

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_good" /><testcase classname="tests.a" name="test_also" />
<testcase classname="tests.a" name="test_bad"><failure message="x">y</failure></testcase>
<testcase classname="tests.a" name="test_odd"><error message="x">y</error></testcase>
<testcase classname="tests.a" name="test_not"><skipped message="x">y</skipped></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("on_gpu")


def test_it_counts_what_pytest_reports(script: ModuleType) -> None:
    assert script.counted(REPORT) == {
        "passed": 2,
        "failed": ["tests.a::test_bad", "tests.a::test_odd"],
        "skipped": ["tests.a::test_not"],
    }


@pytest.mark.skipif(REAL, reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_writes_nothing() -> None:
    before = RESULT.read_bytes() if RESULT.exists() else None
    found = subprocess.run(
        [sys.executable, "benchmarks/on_gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "no CUDA device" in found.stderr
    assert (RESULT.read_bytes() if RESULT.exists() else None) == before


@pytest.mark.cuda
def test_commands_are_timed_on_both_devices(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = importlib.import_module("devices")
    every = devices.commands

    def only(*arguments: str) -> dict[str, list[str]]:
        return {name: line for name, line in every(*arguments).items() if name in ("evaluate", "analyze")}

    monkeypatch.setattr(devices, "commands", only)
    rows = devices.measured("digits", "lenet", 1)
    assert [row["command"] for row in rows] == ["evaluate", "analyze"]
    assert all(row["cpu"] > 0 and row["cuda"] > 0 for row in rows)
    assert devices.measured("digits", "lenet", 1, until=0.0) == []
    assert torch.cuda.is_available()


def test_readme_says_that_no_gpu_has_run_the_tests_until_one_has() -> None:
    said = "no real GPU has run the CUDA tests yet" in " ".join((ROOT / "README.md").read_text().split())
    assert said == (not RESULT.exists())
