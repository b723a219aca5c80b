"""Time of the DCT of a batch of feature maps, against torch-dct in the same run; scipy for information.

A (64, 64, 56, 56) float32 batch: the two-dimensional DCT of whole maps (for cctool one block of 56 x 56), its
inverse, and the DCT of 8 x 8 blocks, for which the others get the maps cut into blocks and the result put
together again. All compute the orthonormal DCT-II; their results are compared before anything is timed. The
tools take turns; the ratio is that of the medians. OpenMP threads sleep while they
wait, as in cctool's commands.

    python benchmarks/dct_speed.py [ROUNDS]
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import scipy.fft
import torch
import torch_dct
from torch import Tensor

import record
from cctool.transforms.kernels.blocks import block_forward, block_inverse

SEED = 0
SHAPE = (64, 64, 56, 56)
BLOCK = 8

Tool = Callable[[Tensor], Tensor]


def cut(x: Tensor) -> Tensor:
    n, c, height, width = x.shape
    return x.view(n, c, height // BLOCK, BLOCK, width // BLOCK, BLOCK).transpose(3, 4)


def joined(blocks: Tensor) -> Tensor:
    return blocks.transpose(3, 4).reshape(SHAPE)


def scipy_dct(x: Tensor) -> Tensor:
    return torch.from_numpy(
        scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho", workers=torch.get_num_threads())
    )


def scipy_idct(x: Tensor) -> Tensor:
    return torch.from_numpy(
        scipy.fft.idctn(x.numpy(), axes=(-2, -1), norm="ortho", workers=torch.get_num_threads())
    )


WORKS: dict[str, dict[str, Tool]] = {
    "whole maps": {
        "cctool": lambda x: block_forward(x, "dct", SHAPE[3]),
        "torch_dct": lambda x: torch_dct.dct_2d(x, norm="ortho"),
        "scipy": scipy_dct,
    },
    "whole maps, inverse": {
        "cctool": lambda x: block_inverse(x, "dct", SHAPE[3]),
        "torch_dct": lambda x: torch_dct.idct_2d(x, norm="ortho"),
        "scipy": scipy_idct,
    },
    "8 x 8 blocks": {
        "cctool": lambda x: block_forward(x, "dct", BLOCK),
        "torch_dct": lambda x: joined(torch_dct.dct_2d(cut(x), norm="ortho")),
        "scipy": lambda x: joined(scipy_dct(cut(x))),
    },
}


def row(work: str, threads: int, rounds: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))
    tools = WORKS[work]
    expected = tools["scipy"](x)
    errors = {name: float((run(x) - expected).abs().max()) for name, run in tools.items()}
    assert max(errors.values()) < 1e-4, errors
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    for _ in range(rounds):
        for name, run in tools.items():
            start = time.perf_counter()
            run(x)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "work": work,
        "shape": SHAPE,
        "threads": threads,
        "rounds": rounds,
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio": round(medians["torch_dct"] / medians["cctool"], 2),
        "ratio_scipy": round(medians["scipy"] / medians["cctool"], 2),
        "errors": errors,
    }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    command = " ".join(["python", "benchmarks/dct_speed.py", *sys.argv[1:]])
    with torch.no_grad():
        rows = [row(work, threads, rounds) for threads in (1, 2) for work in WORKS]
    record.write("dct_speed", command, SEED, rows)


if __name__ == "__main__":
    main()
