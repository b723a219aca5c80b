"""Symbols per second of the sparse exponential-Golomb coder, against Python on bitarray and against nncodec.

All tools get the same int8 tensor in the same run and take turns. Everything runs on one thread, and what
counts is the processor time of the best round, for the machine is shared. The Python coder goes symbol by
symbol, as one writes it down from the definition; it is timed on a part of the tensor, since its time per
symbol does not depend on how many there are. Two more ways to use bitarray are there for comparison: a loop
that appends codewords from a table, and bitarray's own C code for a prefix code. nncodec (DeepCABAC, C++)
needs an older numpy, so it runs in an interpreter of its own; timed is its encoder alone.

    python benchmarks/coding_speed.py --nncodec-python PYTHON [--symbols N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitarray import bitarray, decodetree
from torch import Tensor

import record
from cctool.coding.exp_golomb import decode, encode
from cctool.coding.histogram import best_k, entropy_bits, histogram

SEED = 0
# Scales of Laplacians as feature codecs give: 6.8, 5.8, 2.9 and 1.4 times smaller than 8 bits.
SCALES = {"very sparse": 0.2, "sparse": 0.3, "moderate": 1.0, "dense": 5.0}
PART = 300_000


def python_encode(values: list[int], k: int) -> bitarray:
    bits = bitarray()
    for value in values:
        symbol = 2 * value if value >= 0 else -2 * value - 1
        if symbol == 0:
            bits.append(1)
            continue
        number = symbol - 1 + (1 << k)
        digits = number.bit_length()
        bits.append(0)
        for _ in range(digits - k - 1):
            bits.append(0)
        for place in range(digits - 1, -1, -1):
            bits.append(number >> place & 1)
    return bits


def python_decode(bits: bitarray, count: int, k: int) -> list[int]:
    values = []
    at = 0
    for _ in range(count):
        if bits[at]:
            values.append(0)
            at += 1
            continue
        at += 1
        digits = k + 1
        while not bits[at]:
            at += 1
            digits += 1
        number = 0
        for _ in range(digits):
            number = number << 1 | bits[at]
            at += 1
        symbol = number - (1 << k) + 1
        values.append(symbol // 2 if symbol % 2 == 0 else -(symbol + 1) // 2)
    return values


def table_encode(values: list[int], codes: dict[int, bitarray]) -> bitarray:
    bits = bitarray()
    for value in values:
        bits += codes[value]
    return bits


def c_encode(values: list[int], codes: dict[int, bitarray]) -> bitarray:
    bits = bitarray()
    bits.encode(codes, values)
    return bits


def c_decode(bits: bitarray, tree: decodetree) -> list[int]:
    return list(bits.decode(tree))


def laplacian(scale: float, count: int) -> Tensor:
    drawn = np.random.default_rng(SEED).laplace(0, scale, count)
    return torch.from_numpy(drawn.round().clip(-128, 127).astype(np.int8))


def rates(work: dict[str, tuple[int, Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Million symbols per second of each, the best of rounds in which all take turns."""
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds + 1):  # the first round also fills caches and tables
        for name, (_, run) in work.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return {name: round(work[name][0] / seconds / 1e6, 3) for name, seconds in best.items()}


def nncodec(python: str, values: Tensor, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "values.npy"
        np.save(path, values.numpy())
        script = Path(__file__).with_name("coding_peer.py")
        done = subprocess.run(
            [python, str(script), str(path), str(rounds)], capture_output=True, text=True, check=True
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(name: str, scale: float, python: str, count: int, rounds: int) -> dict[str, Any]:
    values = laplacian(scale, count)
    counts = histogram(values, signed=True)
    k = best_k(counts)
    part, few = values[:PART].tolist(), len(values[:PART])
    coded = encode(values, k, signed=True)
    codes = {value: python_encode([value], k) for value in range(-128, 128)}
    tree, bits = decodetree(codes), python_encode(part, k)
    assert torch.equal(decode(coded, k, signed=True, dtype=torch.int8), values)
    assert python_decode(bits, few, k) == part == c_decode(bits, tree)
    assert (
        encode(values[:PART], k, signed=True).payload == bits.tobytes() == table_encode(part, codes).tobytes()
    )

    speed = rates(
        {
            "encode": (count, lambda: encode(values, k, signed=True)),
            "decode": (count, lambda: decode(coded, k, signed=True, dtype=torch.int8)),
            "python_encode": (few, lambda: python_encode(part, k)),
            "python_decode": (few, lambda: python_decode(bits, few, k)),
            "table_encode": (few, lambda: table_encode(part, codes)),
            "c_encode": (few, lambda: c_encode(part, codes)),
            "c_decode": (few, lambda: c_decode(bits, tree)),
        },
        rounds,
    )
    peer = nncodec(python, values, rounds)
    return {
        "values": name,
        "scale": scale,
        "symbols": count,
        "zeros": round(float((values == 0).float().mean()), 4),
        "k": k,
        "rounds": rounds,
        "bits_per_symbol": round(coded.bits / count, 4),
        "entropy": round(entropy_bits(counts) / count, 4),
        "nncodec_bits_per_symbol": round(8 * peer["bytes"] / count, 4),
        "nncodec": peer["version"],
        "million_symbols_per_second": {**speed, "nncodec_encode": round(count / peer["seconds"] / 1e6, 3)},
        "ratio_python_encode": round(speed["encode"] / speed["python_encode"], 1),
        "ratio_python_decode": round(speed["decode"] / speed["python_decode"], 1),
        "ratio_nncodec": round(speed["encode"] * 1e6 * peer["seconds"] / count, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nncodec-python", required=True, help="interpreter of an environment with nncodec")
    parser.add_argument("--symbols", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = (
        "python benchmarks/coding_speed.py --nncodec-python PYTHON "
        f"--symbols {arguments.symbols} --rounds {arguments.rounds}"
    )
    rows = [
        row(name, scale, arguments.nncodec_python, arguments.symbols, arguments.rounds)
        for name, scale in SCALES.items()
    ]
    record.write("coding_speed", command, SEED, rows)


if __name__ == "__main__":
    main()
