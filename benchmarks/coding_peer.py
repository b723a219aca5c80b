"""Time nncodec's encoder on a saved int8 array; `coding_speed.py` runs this in nncodec's own environment.

python benchmarks/coding_peer.py VALUES.npy ROUNDS
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time

import numpy as np
from nncodec.extensions import deepCABAC
from nncodec.nnc_core.hdsp.hdsp_tool import HDSP_OPTS_OFF

ROW = 1000
# As nncodec's own encoder starts a tensor: its default length of unary codes, no search for parameters.
UNARY_LENGTH = 11


def main() -> None:
    values = np.load(sys.argv[1]).astype(np.int32)
    values = values.reshape(-1, ROW) if len(values) % ROW == 0 else values[None]
    skipped = np.zeros(len(values), dtype=np.int32)
    best, size = float("inf"), 0
    for _ in range(int(sys.argv[2])):
        encoder = deepCABAC.Encoder()
        encoder.initCtxModels(UNARY_LENGTH, 0)
        start = time.process_time()
        encoder.encodeLayer(values, 0, 0, 0, 0, 0, skipped, *HDSP_OPTS_OFF(), 0, 0)
        size = encoder.finish().size
        best = min(best, time.process_time() - start)
    version = importlib.metadata.version("nncodec")
    print(json.dumps({"seconds": best, "bytes": int(size), "version": version}))


if __name__ == "__main__":
    main()
