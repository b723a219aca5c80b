"""The CUDA tests on a real GPU, then the times of `devices.py`, in one JSON and under eight minutes.

python benchmarks/on_gpu.py

Without a GPU it runs nothing and says so. It exits with 1 if a test failed; the JSON is written all the
same, to `benchmarks/results/cuda.json`, of which `benchmarks/report.py` makes a section of the page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

import devices
from record import described

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "cuda.json"
MOST_SECONDS_OF_TESTS = 300
MOST_SECONDS = 420
"""After which no further command is timed; the one that runs then may take another minute."""

NONE: dict[str, Any] = {"passed": 0, "failed": [], "skipped": []}


def tested(seconds: float, workers: int) -> dict[str, Any]:
    """Run the tests with the marker `cuda`, slow ones left out; count them, and name those that failed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        line = [sys.executable, "-m", "pytest", "-m", "cuda and not slow", "-q", "-n", str(workers)]
        try:
            subprocess.run(
                [*line, "--dist", "worksteal", f"--junitxml={file}"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"ended": False, "seconds": seconds, **NONE}
        ended = file.is_file()
        found = counted(file.read_text(encoding="utf-8")) if ended else NONE
    return {"ended": ended, "seconds": round(time.monotonic() - started, 1), **found}


def counted(report: str) -> dict[str, Any]:
    """What a report of pytest in JUnit's format says: how many passed, and the names of the others."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": sorted(f"{case.get('classname')}::{case.get('name')}" for case in failed),
        "skipped": sorted(f"{case.get('classname')}::{case.get('name')}" for case in skipped),
    }


def main() -> None:
    """Test, measure, write."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: `make test` runs the CUDA tests on a pretended one")
    started = time.monotonic()
    tests = tested(MOST_SECONDS_OF_TESTS, workers=min(4, os.cpu_count() or 1))
    rows = devices.measured("digits", "resnet20", 3, until=started + MOST_SECONDS)
    record = described("python benchmarks/on_gpu.py", 0, rows)
    RESULT.write_text(json.dumps({**record, "tests": tests}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(tests, indent=1))
    sys.exit(0 if tests["ended"] and tests["passed"] and not tests["failed"] else 1)


if __name__ == "__main__":
    main()
