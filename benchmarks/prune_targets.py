"""How near `cctool prune --target macs=0.5` lands, with single channels and with multiples of eight.

Runs the command itself; the figure is the MACs of the written checkpoint, counted anew, over the dense ones.

    python benchmarks/prune_targets.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from typer.testing import CliRunner

import record
from cctool import load
from cctool.cli.main import app
from cctool.graph.cost import measure

SEED = 0
NETWORKS = ["resnet20", "vgg16", "mobilenet_student", "torchvision:resnet50", "torchvision:densenet121"]
TARGET = 0.5


def command(*line: str) -> None:
    result = CliRunner().invoke(app, line)
    if result.exit_code:
        raise SystemExit(f"cctool {' '.join(line)}: {result.output}")


def macs(path: Path) -> int:
    checkpoint = load(path)
    return measure(checkpoint.model, checkpoint.spec.input_shape).total.macs


def rows(name: str, folder: Path) -> list[dict[str, object]]:
    source = folder / f"{name.rpartition(':')[2]}.pt"
    command("train", "--arch", name, "--epochs", "0", "--seed", str(SEED), "-q", "-o", str(source))
    dense, found = macs(source), []
    for scope in ("local", "global"):
        for round_to in (1, 8):
            product = folder / "product.pt"
            line = [
                "--method",
                "l2",
                "--scope",
                scope,
                "--target",
                f"macs={TARGET}",
                "--round-to",
                str(round_to),
            ]
            start = time.perf_counter()
            command("prune", str(source), *line, "-q", "--force", "-o", str(product))
            seconds = time.perf_counter() - start
            share = macs(product) / dense
            found.append(
                {
                    "network": name,
                    "scope": scope,
                    "round_to": round_to,
                    "macs": dense,
                    "share": round(share, 5),
                    "error": round(abs(share - TARGET) / TARGET, 5),
                    "seconds": round(seconds, 1),
                }
            )
            print(found[-1], flush=True)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = [row for name in NETWORKS for row in rows(name, Path(folder))]
    record.write("prune_targets", "python benchmarks/prune_targets.py", SEED, found)


if __name__ == "__main__":
    main()
