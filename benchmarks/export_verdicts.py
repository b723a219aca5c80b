"""How often exports of 40 small networks are refused though they are right, or accepted though they are not.

python benchmarks/export_verdicts.py --seeds 10

Each network is exported once. Its file, and ten copies of it with a fault each at other places, are judged by
the code of `cctool export` with ten seeds each, which draw the random inputs and nothing else. A fault that
moves no channel of the outputs by more than the limit that was stated for the true file is none; `differs`
counts the files whose verdict is not the same at all seeds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "toys"))

import record
import verdict_faults as faults
import verdict_toys as toys

STEPS = 60  # of training

NETWORKS = (
    *((toy, steps, "float") for toy in toys.TOYS for steps in (0, STEPS)),
    *(
        (toy, STEPS, "int8")
        for toy in ("classifier", "depthwise", "residual", "unet", "autoencoder", "attention")
    ),
    *((toy, 0, "int8") for toy in ("normed", "deep", "offset", "gated")),
    *((toy, STEPS, "int4") for toy in ("normed", "two_heads", "tiny")),
    *((toy, STEPS, "codec") for toy in ("classifier", "normed")),
    ("depthwise", STEPS, "pruned"),
)


def measure(toy: str, steps: int, state: str, seeds: int, folder: Path) -> dict[str, Any]:
    """Verdicts on one network's file and on its faulty copies."""
    made = faults.exported(faults.checkpoint(toy, steps, state), folder / "true.onnx")
    row: dict[str, Any] = {"network": toy, "steps": steps, "state": state, "seeds": seeds}
    truths = [faults.judged(made, made.path, seed) for seed in range(seeds)]
    accepted = [found for found in truths if isinstance(found, list)]
    outputs = [output for found in accepted for agreement in found for output in agreement.outputs]
    measured = [o for o in outputs if o.limit and o.place_error is not None]
    row["accepted"] = len(accepted)
    row["closest"] = max((o.place_error / o.limit for o in measured), default=0.0)
    row["limit"] = max((o.limit / o.place_signal for o in measured if o.place_signal), default=0.0)
    row["passes"] = sum(sum(a.forward_passes.values()) for a in accepted[0]) if accepted else 0
    for fault in faults.FAULTS:
        counts: Counter[str] = Counter()
        for place in range(seeds):
            path = folder / "faulty.onnx"
            if not faults.plant(made, fault, path, place):
                continue
            # One and the same file at every seed.
            verdicts = {isinstance(faults.judged(made, path, seed), list) for seed in range(seeds)}
            if verdicts == {False}:
                counts["refused"] += 1
            elif len(verdicts) > 1:
                counts["differs"] += 1
            elif accepted and faults.moved(made, path, accepted[-1]) < 1:
                counts["none"] += 1
            else:
                counts["accepted"] += 1
        row[fault] = dict(counts)
    return row


def main() -> None:
    """Measure all networks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    seeds = parser.parse_args().seeds
    warnings.simplefilter("ignore")
    rows = []
    for network in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(*network, seeds, Path(folder)))
        print(rows[-1], file=sys.stderr, flush=True)
    record.write("export_verdicts", f"python benchmarks/export_verdicts.py --seeds {seeds}", 0, rows)


if __name__ == "__main__":
    main()
