"""Encoded tensors in one byte arena with a JSON index.

A zip entry costs about 300 bytes, which would eat the gain of small packed tensors; here a part costs its
bytes and a line of index. Each part starts at a multiple of its element size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.payload import DTYPES, canonical
from cctool.checkpoint.spec import Shape
from cctool.errors import CorruptCheckpointError

__all__ = ["pack", "unpack"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    dtype: str
    shape: Shape
    offset: int = Field(ge=0, strict=True)


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    encoding: str
    shape: Shape
    dtype: str
    parameters: dict[str, JsonValue]
    parts: dict[str, _Part]


def pack(tensors: Mapping[str, EncodedTensor]) -> tuple[str, Tensor]:
    """Lay encoded tensors into one arena.

    Returns:
        The index as JSON text and the arena, a uint8 tensor of shape (bytes,). Tensors that are the same
        object are stored once: the index gives them the same offsets.
    """
    index: dict[str, Any] = {}
    chunks: list[Tensor] = []
    offsets: dict[int, int] = {}
    end = 0
    for name, encoded in tensors.items():
        parts = {}
        # Sorted, as the index has them: what was loaded lies as what was made.
        for key, value in sorted(encoded.parts.items()):
            part = value.detach().cpu().contiguous()
            if id(value) not in offsets:
                start = -(-end // part.element_size()) * part.element_size()
                if start > end:
                    chunks.append(torch.zeros(start - end, dtype=torch.uint8))
                chunks.append(part.reshape(-1).view(torch.uint8))
                offsets[id(value)] = start
                end = start + part.numel() * part.element_size()
            parts[key] = {
                "dtype": str(part.dtype).removeprefix("torch."),
                "shape": list(part.shape),
                "offset": offsets[id(value)],
            }
        index[name] = {
            "encoding": encoded.encoding,
            "shape": list(encoded.shape),
            "dtype": encoded.dtype,
            "parameters": dict(encoded.parameters),
            "parts": parts,
        }
    return canonical(index), torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)


def unpack(index: str, arena: Tensor) -> dict[str, EncodedTensor]:
    """Read what `pack` wrote; parts are views of the arena.

    Raises:
        CorruptCheckpointError: if the index is malformed or points outside the arena.
    """
    if arena.dtype != torch.uint8 or arena.dim() != 1:
        raise CorruptCheckpointError("the arena of encoded tensors is not a row of bytes")
    try:
        entries = {name: _Entry.model_validate(entry) for name, entry in json.loads(index).items()}
    except (ValidationError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"the index of encoded tensors is malformed: {type(error).__name__}"
        ) from None
    views: dict[tuple[int, str, tuple[int, ...]], Tensor] = {}
    shared: dict[str, EncodedTensor] = {}
    found = {}
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise CorruptCheckpointError(f"{name}: unknown element type {entry.dtype!r}")
        # Tied tensors have equal entries, and come back as one object.
        same = canonical(entry.model_dump(mode="json"))
        if same not in shared:
            parts = {}
            for key, part in entry.parts.items():
                place = (part.offset, part.dtype, part.shape)
                if place not in views:
                    views[place] = _view(arena, part, f"{name}.{key}")
                parts[key] = views[place]
            shared[same] = EncodedTensor(entry.encoding, entry.shape, entry.dtype, parts, entry.parameters)
        found[name] = shared[same]
    return found


def _view(arena: Tensor, part: _Part, name: str) -> Tensor:
    dtype = DTYPES.get(part.dtype)
    if dtype is None:
        raise CorruptCheckpointError(f"{name}: unknown element type {part.dtype!r}")
    length = math.prod(part.shape) * dtype.itemsize
    if part.offset % dtype.itemsize or part.offset + length > arena.numel():
        raise CorruptCheckpointError(f"{name}: lies outside the arena of {arena.numel():,} bytes")
    try:
        return arena[part.offset : part.offset + length].view(dtype).reshape(part.shape)
    except RuntimeError:
        # Sizes next to a 0 are backed by nothing and may still overflow.
        raise CorruptCheckpointError(f"{name}: shape {list(part.shape)} is impossible") from None
