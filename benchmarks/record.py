"""What a result says of its making: commit, command, seed, machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def described(command: str, seed: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows with what says how they came about."""
    folder = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "commit": commit,
        "command": command,
        "seed": seed,
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": rows,
    }


def write(name: str, command: str, seed: int, rows: list[dict[str, Any]]) -> Path:
    """Write rows to `benchmarks/results/NAME.json`, and each to stdout as a JSON line."""
    record = described(command, seed, rows)
    for row in rows:
        print(json.dumps(row))
    target = Path(__file__).parent / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return target
