"""`cctool prune --max-drop 1.0` on a trained ResNet-20: the rate found, and whether a larger one holds.

The product's accuracy on both splits is compared with what `cctool evaluate` measures on its own; then the
network is pruned at rates above the one found, with batch-norm statistics estimated again in the same way.

    python benchmarks/prune_budget.py WEIGHTS.pth CIFAR10_DIR
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import record
from cctool.cli.main import app

SEED = 0
BUDGET = 1.0
METHODS = ("slimming", "l2", "taylor")
PREPROCESSING = ("--mean", ".4914,.4822,.4465", "--std", ".2470,.2435,.2616")
BEYOND = (1 / 128, 1 / 64, 1 / 32, 1 / 16)


def command(*line: str) -> Any:
    result = CliRunner().invoke(app, [*line, "--json", "-q"])
    if result.exit_code:
        raise SystemExit(f"cctool {' '.join(line)}: {result.output}")
    return json.loads(result.stdout)


def top1(metrics: Any) -> dict[str, tuple[float, int]]:
    return {found["split"]: (found["values"]["top1"], found["n"]) for found in metrics}


def evaluated(path: Path, data: str, split: str) -> tuple[float, int]:
    found = command("evaluate", str(path), "--data", data, "--split", split)["metrics"]
    return found["values"]["top1"], found["n"]


def row(weights: str, data: str, method: str, folder: Path) -> dict[str, object]:
    product = folder / f"{method}.pt"
    source = (
        "prune",
        weights,
        "--arch",
        "resnet20",
        *PREPROCESSING,
        "--data",
        data,
        "--method",
        method,
        "--scope",
    )
    line = (*source, "global", "--seed", str(SEED))
    report = command(*line, "--max-drop", str(BUDGET), "-o", str(product))["products"][0]["report"]
    budget, after = report["budget"], top1(report["metrics_after"])
    again = {split: evaluated(product, data, split) for split in ("validation", "test")}
    images = "augmented" if budget["augmented"] else "plain"
    beyond = {}
    for more in BEYOND:
        rate = budget["rate"] + more
        further = command(
            *line, "--rate", str(rate), "--recalibrate", str(budget["recalibrated"]), "--recalibrate-images",
            images, "--force", "-o", str(folder / "further.pt"),
        )["products"][0]["report"]  # fmt: skip
        beyond[f"{rate:.4f}"] = round(budget["before"] - top1(further["metrics_after"])["validation"][0], 3)
    found = {
        "method": method,
        "budget": BUDGET,
        "rate": budget["rate"],
        "images": images,
        "trials": len(budget["curve"]),
        "validation_before": top1(report["metrics_before"])["validation"],
        "validation_after": after["validation"],
        "test_before": top1(report["metrics_before"])["test"],
        "test_after": after["test"],
        "equal_to_evaluate": all(tuple(after[split]) == tuple(again[split]) for split in again),
        "drop_at_larger_rates": beyond,
        "macs": report["after"]["macs"] / report["before"]["macs"],
        "parameters": report["after"]["parameters"] / report["before"]["parameters"],
        "curve": [(trial["rate"], round(trial["drop"], 3)) for trial in budget["curve"]],
    }
    print(found, flush=True)
    return found


def main() -> None:
    weights, folder = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as place:
        found = [row(weights, f"cifar10:{folder}", method, Path(place)) for method in METHODS]
    record.write("prune_budget", "python benchmarks/prune_budget.py WEIGHTS.pth CIFAR10_DIR", SEED, found)


if __name__ == "__main__":
    main()
