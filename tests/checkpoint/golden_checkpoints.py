"""The checkpoints under golden/: one of each kind, which every later version must load.

``python tests/checkpoint/golden_checkpoints.py`` writes those that are not there; a file that exists is a
promise and is never written again.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from checkpoint_toys import INPUT, TABLES, cut, logits, make, masked, quantized

from cctool.checkpoint.checkpoint import Checkpoint, save
from cctool.checkpoint.payload import ResumeState
from cctool.quantization.masked import Inner

FOLDER = Path(__file__).parent / "golden"
EXPECTED = FOLDER / "expected.json"


def thinned() -> Checkpoint:
    """The toy with two of four inner channels."""
    return cut(make(seed=3), torch.tensor([1, 3]))


def resumable() -> Checkpoint:
    """The toy in the middle of a training."""
    state = ResumeState({"moment": torch.arange(3.0), "rng": torch.arange(4).byte()}, {"epoch": 2})
    return replace(make(seed=4), resume=state)


def single_weights(inner: Inner | None = None) -> Checkpoint:
    """The toy with half of the single weights of two layers, one bias and one batch norm's scale masked."""
    checkpoint = make(seed=9, width=8)
    generator = torch.Generator().manual_seed(9)
    parameters = dict(checkpoint.model.named_parameters())
    names = ("conv.weight", "bn.weight", "depthwise.weight", "fc.bias")
    shapes = {name: parameters[name].shape for name in names}
    return masked(
        checkpoint, {n: torch.rand(shape, generator=generator) < 0.5 for n, shape in shapes.items()}, inner
    )


def two_of_four() -> Checkpoint:
    """The toy whose last layer keeps two of every four neighbours."""
    pattern = torch.tensor([[True, False, False, True] * 2] * 3)
    return masked(make(seed=10, width=8), {"fc.weight": pattern})


KINDS = {
    "dense.pt": lambda: make(seed=1),
    "dense.safetensors": lambda: make(seed=1),
    "tied.pt": lambda: make("tied", seed=2),
    "thinned.pt": thinned,
    "resumable.pt": resumable,
    "fp16.pt": lambda: quantized(make(seed=5), "fp16"),
    "bf16.pt": lambda: quantized(make(seed=6), "bf16"),
    "uint8.pt": lambda: quantized(make(seed=7), "affine-u8", axis=None),
    "uint8-per-channel.pt": lambda: quantized(make(seed=8), "affine-u8", axis=0),
    "uint8-per-channel.safetensors": lambda: quantized(make(seed=8), "affine-u8", axis=0),
    "thinned-uint8.pt": lambda: quantized(thinned(), "affine-u8", axis=1),
    "masked.pt": single_weights,
    "masked.safetensors": single_weights,
    "masked-2-4.pt": two_of_four,
    "masked-thinned.pt": lambda: masked(thinned(), {"fc.weight": torch.tensor([[True, False]] * 3)}),
    "masked-uint8.pt": lambda: single_weights(Inner("affine-u8")),
    "masked-uint8-per-channel.safetensors": lambda: single_weights(Inner("affine-u8", 0)),
    "masked-fp16.pt": lambda: single_weights(Inner("fp16")),
}


def main() -> None:
    """Write what is missing."""
    FOLDER.mkdir(exist_ok=True)
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    for name, kind in KINDS.items():
        if not (FOLDER / name).exists():
            checkpoint = kind()
            parent = save(checkpoint, FOLDER / name, TABLES)
            expected[name] = {"content": parent.content, "logits": logits(checkpoint).tolist()}
            print(name, (FOLDER / name).stat().st_size)
    expected["input"] = INPUT.flatten().tolist()
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
