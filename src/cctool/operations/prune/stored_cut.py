"""Cutting what a file stores as a plan cuts the model's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cctool.checkpoint.encoding import EncodedTensor
from cctool.operations.context import Context
from cctool.pruning.cut.surgery import CutPlan

__all__ = ["cut_stored"]


def cut_stored(
    stored: Mapping[str, EncodedTensor], plan: CutPlan, context: Context
) -> dict[str, EncodedTensor]:
    """Cut stored integers, scales and bits as a plan cuts the model's tensors; nothing is rounded again."""
    cut: dict[str, EncodedTensor] = {}
    done: dict[int, EncodedTensor] = {}
    parts: dict[int, Tensor] = {}
    for name, encoded in stored.items():
        if id(encoded) not in done:
            smaller = encoded
            for piece in plan.tensors.get(name, ()):
                take = context.tables.encodings[encoded.encoding].take
                smaller = take(smaller, piece.dim, piece.keep.cpu())
            done[id(encoded)] = _sharing(smaller, encoded, parts)
        cut[name] = done[id(encoded)]
    return cut


def _sharing(smaller: EncodedTensor, encoded: EncodedTensor, parts: dict[int, Tensor]) -> EncodedTensor:
    """Let what was one part before the cut, as the bits of a mask and its weight, be one part after it."""
    shared = {}
    for name, part in smaller.parts.items():
        before = encoded.parts.get(name)
        known = part if before is None else parts.setdefault(id(before), part)
        shared[name] = known if torch.equal(known, part) else part
    return replace(smaller, parts=shared)
