"""Does a pruned resnet50 get faster in onnxruntime as its MACs fall?

The commands themselves prune (`--target macs=S --round-to 8`) and export; the files then take turns in one
process, one input at a time, and the speed-up of the medians is set against the reduction of MACs.

    python benchmarks/onnx_latency.py [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from typer.testing import CliRunner

import record
from cctool import load
from cctool.cli.main import app
from cctool.graph.cost import measure

SEED = 0
NETWORK = "torchvision:resnet50"
SHARES = (0.75, 0.5, 0.25)
ROUND_TO = 8


def command(*line: str) -> None:
    result = CliRunner().invoke(app, line)
    if result.exit_code:
        raise SystemExit(f"cctool {' '.join(line)}: {result.output}")


def files(folder: Path) -> dict[float, Path]:
    """Checkpoints by the share of MACs that was asked for."""
    made = {1.0: folder / "dense.pt"}
    command("train", "--arch", NETWORK, "--epochs", "0", "--seed", str(SEED), "-q", "-o", str(made[1.0]))
    for share in SHARES:
        made[share] = folder / f"macs{share}.pt"
        line = ["--method", "l2", "--target", f"macs={share}", "--round-to", str(ROUND_TO)]
        command("prune", str(made[1.0]), *line, "-q", "-o", str(made[share]))
    for path in made.values():
        command("export", str(path), "-q", "-o", str(path.with_suffix(".onnx")))
    return made


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    image = np.random.default_rng(SEED).standard_normal((1, 3, 224, 224)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        made = files(Path(name))
        macs = {
            share: measure((network := load(path)).model, network.spec.input_shape).total.macs
            for share, path in made.items()
        }
        sessions = {share: session(path.with_suffix(".onnx")) for share, path in made.items()}
        seconds: dict[float, list[float]] = {share: [] for share in made}
        for turn in range(rounds + 2):
            for share, running in sessions.items():
                start = time.perf_counter()
                running.run(None, {running.get_inputs()[0].name: image})
                if turn >= 2:  # the first turns warm up
                    seconds[share].append(time.perf_counter() - start)
    found = []
    for share in made:
        # turn by turn, so that the machine's drift cancels
        speedup = statistics.median(d / s for d, s in zip(seconds[1.0], seconds[share], strict=True))
        reduction = macs[1.0] / macs[share]
        found.append(
            {
                "asked": share,
                "macs": macs[share],
                "share": round(macs[share] / macs[1.0], 4),
                "milliseconds": round(1000 * statistics.median(seconds[share]), 2),
                "reduction": round(reduction, 3),
                "speedup": round(speedup, 3),
                "efficiency": round(speedup / reduction, 3),
                "rounds": rounds,
            }
        )
        print(found[-1], flush=True)
    record.write("onnx_latency", " ".join(["python benchmarks/onnx_latency.py", *sys.argv[1:]]), SEED, found)


if __name__ == "__main__":
    main()
