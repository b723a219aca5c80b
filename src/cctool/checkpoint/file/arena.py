"""Tensors in one byte arena, and the index entries that say where each of them is.

A zip entry costs about 300 bytes, which would cancel the gain of small packed tensors. Here a tensor costs
its bytes and a line of the index. Each starts at a multiple of its element size.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.payload import DTYPES, as_bytes, canonical_json
from cctool.checkpoint.spec import Shape


class PlainEntry(BaseModel):
    """A tensor that is stored as it is: its type (such as ``float32``), shape, and place in the arena.

    Attributes:
        offset: bytes into the arena; a multiple of the element size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    dtype: str
    shape: Shape
    offset: int = Field(ge=0, strict=True)


class Entry(BaseModel):
    """An encoded tensor: what `EncodedTensor` says, and where its parts are."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    encoding: str
    shape: Shape
    dtype: str
    parameters: dict[str, JsonValue]
    parts: dict[str, PlainEntry]


class ArenaWriter:
    """Appends tensors to an arena; equal calls give equal bytes."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._end = 0
        self._held: list[Tensor] = []  # alive until the end: ids are compared
        self._offsets: dict[int, int] = {}
        self._parts: dict[bytes, int] = {}

    def entry(self, encoded: EncodedTensor) -> dict[str, Any]:
        """Append the parts of an encoded tensor; parts that are the same object are stored once."""
        parts = {}
        # Sorted as in the index, so that a loaded checkpoint is written with the bytes that it was read from.
        for key, value in sorted(encoded.parts.items()):
            if id(value) not in self._offsets:
                self._held.append(value)
                offset = self._offsets[id(value)] = self._lay(value)
                self._parts.setdefault(_hash(value), offset)
            parts[key] = _line(value, self._offsets[id(value)])
        return {
            "encoding": encoded.encoding,
            "shape": list(encoded.shape),
            "dtype": encoded.dtype,
            "parameters": dict(encoded.parameters),
            "parts": parts,
        }

    def plain(self, tensor: Tensor) -> dict[str, Any]:
        """Append a tensor as it is, or let it share a part that has the same bytes; one tensor a part."""
        key = _hash(tensor)
        offset = self._parts.get(key)
        if not tensor.numel() or offset is None or offset % tensor.element_size():
            return _line(tensor, self._lay(tensor))
        del self._parts[key]
        return _line(tensor, offset)

    def finished(self) -> Tensor:
        """All bytes, uint8 (bytes,)."""
        return torch.cat(self._chunks) if self._chunks else torch.empty(0, dtype=torch.uint8)

    def _lay(self, tensor: Tensor) -> int:
        # Rounded up to a multiple of the element size, so that readers can take aligned views.
        start = -(-self._end // tensor.element_size()) * tensor.element_size()
        if start > self._end:
            self._chunks.append(torch.zeros(start - self._end, dtype=torch.uint8))
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        self._chunks.append(flat.view(torch.uint8))
        self._end = start + tensor.nbytes
        return start


def _hash(tensor: Tensor) -> bytes:
    return hashlib.sha256(as_bytes(tensor)).digest()


def _line(tensor: Tensor, offset: int) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "offset": offset}


class ArenaReader:
    """Reads tensors from an arena, uint8 (bytes,), as `ArenaWriter` makes it.

    Raises:
        CorruptCheckpointError: if it is something else; by all methods, if an entry points outside of it.
    """

    def __init__(self, arena: Any) -> None:
        if not isinstance(arena, Tensor) or arena.dtype != torch.uint8 or arena.dim() != 1:
            raise CorruptCheckpointError("the arena of encoded tensors is not a row of bytes")
        self._arena = arena
        self._views: dict[tuple[int, str, tuple[int, ...]], Tensor] = {}
        self._copied = 0

    def encoded(self, name: str, entry: Entry) -> EncodedTensor:
        """An encoded tensor, whose parts are views of the arena; equal places are the same object."""
        _dtype(name, entry.dtype)
        parts = {}
        for key, part in entry.parts.items():
            place = (part.offset, part.dtype, part.shape)
            if place not in self._views:
                self._views[place] = self._view(part, f"{name}.{key}")
            parts[key] = self._views[place]
        return EncodedTensor(entry.encoding, entry.shape, entry.dtype, parts, entry.parameters)

    def plain(self, name: str, entry: PlainEntry) -> Tensor:
        """A copy of a tensor. Entries that overlap are refused once their copies exceed the arena's size."""
        view = self._view(entry, name)
        self._copied += view.nbytes
        if self._copied > self._arena.numel():
            raise CorruptCheckpointError(f"{name}: more tensors lie in the arena than it has bytes")
        return view.clone()

    def _view(self, part: PlainEntry, name: str) -> Tensor:
        dtype = _dtype(name, part.dtype)
        length = math.prod(part.shape) * dtype.itemsize
        if part.offset % dtype.itemsize or part.offset + length > self._arena.numel():
            raise CorruptCheckpointError(f"{name}: lies outside the arena of {self._arena.numel():,} bytes")
        try:
            return self._arena[part.offset : part.offset + length].view(dtype).reshape(part.shape)
        except RuntimeError:
            # If one size is 0, no bytes back the others, and their product may overflow.
            raise CorruptCheckpointError(f"{name}: shape {list(part.shape)} is impossible") from None


def _dtype(name: str, dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise CorruptCheckpointError(f"{name}: unknown element type {dtype!r}")
    return DTYPES[dtype]


def unpack(index: str, arena: Tensor) -> dict[str, EncodedTensor]:
    """Read the encoded tensors of a file of format 1; parts are views of the arena.

    Raises:
        CorruptCheckpointError: if the index is malformed or points outside the arena.
    """
    reader = ArenaReader(arena)
    try:
        entries = {name: Entry.model_validate(entry) for name, entry in json.loads(index).items()}
    except (ValidationError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"the index of encoded tensors is malformed: {type(error).__name__}"
        ) from None
    shared: dict[str, EncodedTensor] = {}
    found = {}
    for name, entry in entries.items():
        # Tied tensors have equal entries, and come back as one object.
        same = canonical_json(entry.model_dump(mode="json"))
        if same not in shared:
            shared[same] = reader.encoded(name, entry)
        found[name] = shared[same]
    return found
