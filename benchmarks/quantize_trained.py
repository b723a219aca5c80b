"""Networks trained with quantizers in their loop, from the float network, beside more epochs of floats.

Each row is one `cctool quantize --method ... --epochs N` (or `cctool train` for the row of floats) from the
shell, with its defaults: SGD, a cosine schedule, labels alone; first and last layer at 8 bits. Best epoch by
validation, top-1 on the test split. Rows that are in the file of --partial already are not measured again.

    python benchmarks/quantize_trained.py NETWORK DATA --partial rows.json [--given "--arch resnet20 ..."]
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

TOOL = Path(sys.executable).with_name("cctool")
WAYS = {
    "dorefa w4a4": "quantize --method dorefa --weight-bits 4 --activation-bits 4",
    "pact w4a4": "quantize --method pact --weight-bits 4 --activation-bits 4",
    "lsq w4a4": "quantize --method lsq --weight-bits 4 --activation-bits 4",
    "lsq w2a4": "quantize --method lsq --weight-bits 2 --activation-bits 4",
    "float, trained on": "train --optimizer sgd",
}


def measure(arguments: argparse.Namespace, way: str, product: Path) -> dict[str, Any]:
    """Run one command and read what it states."""
    verb, *given = shlex.split(way)
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [
            *(TOOL, verb, arguments.network, *given, "--epochs", str(arguments.epochs)),
            *("--data", arguments.data, *shlex.split(arguments.given), "--device", arguments.device),
            *("--seed", str(arguments.seed), "--quiet", "--json", "--force", "-o", product),
        ],
        check=True,
        stdout=subprocess.PIPE,
    )
    step = json.loads(done.stdout)["products"][0]["step"]
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began
    return {
        "epochs": arguments.epochs,
        "before": top1(step["metrics_before"]),
        "top1": top1(step["metrics_after"]),
        "n": next(found["n"] for found in step["metrics_after"] if found["split"] == "test"),
        "bytes": product.stat().st_size,
        "cpu_seconds": round(seconds),
    }


def top1(metrics: list[dict[str, Any]]) -> float | None:
    """Top-1 of the test split, in percent; none where a command does not measure it."""
    found = [entry["values"]["top1"] for entry in metrics or [] if entry["split"] == "test"]
    return round(found[0], 2) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("network", help="trained float network")
    parser.add_argument("data", help="data set, as fashion-mnist:DIR")
    parser.add_argument("--name", required=True, help="name of the network in the table")
    parser.add_argument("--given", default="", help="further options of every command, as --arch resnet20")
    parser.add_argument("--partial", required=True, help="JSON file of rows that were measured before")
    parser.add_argument("--only", default="", help="regular expression of the rows to measure")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    partial = Path(arguments.partial)
    rows = json.loads(partial.read_text(encoding="utf-8")) if partial.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        for name, way in WAYS.items():
            done = any(row["network"] == arguments.name and row["method"] == name for row in rows)
            if done or not re.search(arguments.only, name):
                continue
            found = measure(arguments, way, Path(folder) / "product.pt")
            data = arguments.data.split(":")[0]
            rows.append({"network": arguments.name, "data": data, "method": name} | found)
            print(f"# {time.strftime('%H:%M:%S')} {json.dumps(rows[-1])}", flush=True)
            partial.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    command = "python benchmarks/quantize_trained.py NETWORK DATA --name NAME --partial ROWS"
    record.write("quantize_trained", command, arguments.seed, rows)


if __name__ == "__main__":
    main()
