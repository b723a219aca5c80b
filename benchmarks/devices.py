"""Time of each command on the CPU and on a CUDA device, on the same checkpoint and data in turn.

    python benchmarks/devices.py [--data digits] [--arch resnet20] [--repeats 3]

Without a CUDA device it measures nothing and says so. Start-up is left out: the commands run in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cctool.cli.main import app
from record import write


def commands(data: str, arch: str, folder: Path) -> dict[str, list[str]]:
    """Command lines by name; each reads ``start.pt`` and writes into ``folder``."""
    start, product = str(folder / "start.pt"), str(folder / "product.pt")
    on_data = ["--data", data]
    return {
        "train, 1 epoch": ["train", start, *on_data, "--epochs", "1", "-o", product],
        "distill, 1 epoch": ["distill", start, "--teacher", start, *on_data, "--epochs", "1", "-o", product],
        "evaluate": ["evaluate", start, *on_data],
        "prune and measure": ["prune", start, *on_data, "-o", product],
        "quantize and measure": ["quantize", start, *on_data, "-o", product],
        "analyze": ["analyze", start],
        "export and verify": ["export", start, *on_data, "-o", str(folder / "product.onnx")],
    }


def seconds(line: list[str], device: str) -> float:
    """Run one command and give its seconds."""
    extra = ["--device", device, "--quiet"]
    if line[0] not in ("evaluate", "analyze"):
        extra.append("--force")
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        app([*line, *extra], standalone_mode=False)
    return time.perf_counter() - begun


def measured(data: str, arch: str, repeats: int, until: float = math.inf) -> list[dict[str, Any]]:
    """Median seconds of each command on both devices; none is begun after `until`, of the monotonic clock."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = ["-o", str(folder / "start.pt")]
        seconds(["train", "--arch", arch, "--data", data, "--epochs", "0", *start], "cpu")
        for title, line in commands(data, arch, folder).items():
            if time.monotonic() > until:
                break
            seconds(line, "cuda")
            times = [(seconds(line, "cpu"), seconds(line, "cuda")) for _ in range(repeats)]
            cpu, cuda = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = round(cpu / cuda, 2)
            rows.append({"command": title, "cpu": round(cpu, 3), "cuda": round(cuda, 3), "ratio": ratio})
    return rows


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to compare")
    rows = measured(options.data, options.arch, options.repeats)
    command = f"python benchmarks/devices.py --data {options.data.partition(':')[0]} --arch {options.arch}"
    write("devices", f"{command} --repeats {options.repeats}", 0, rows)


if __name__ == "__main__":
    main()
