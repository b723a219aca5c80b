"""The compact form of files with encoded tensors: one arena of bytes and one compressed text.

A zip entry costs about 300 bytes, a pickled tensor 150 and a digest in a table 100. Together that is as much
as the weights of a small network in few bits. Here a tensor costs its bytes and its compressed index line.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from cctool.base.errors import CheckpointError, CorruptCheckpointError
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.arena import ArenaReader, ArenaWriter, Entry, PlainEntry
from cctool.checkpoint.file.payload import (
    Payload,
    ResumeState,
    canonical_json,
    combined_digest,
    parse,
    place,
)
from cctool.checkpoint.spec import History, ModelSpec

COMPACT_VERSION = 2
"""Format version of files of this form."""
_SMALL = 4096
"""Bytes up to which dense tensors go into the arena."""
_LINES: TypeAdapter[list[tuple[str, Entry | PlainEntry | str | None]]] = TypeAdapter(
    list[tuple[str, Entry | PlainEntry | str | None]]
)


@dataclass(frozen=True)
class Compact:
    """What a file of this form holds in either container, except resume state.

    Attributes:
        text: uint8 (bytes,), the compressed JSON of ``{"history", "index", "spec"}``.
        arena: uint8 (bytes,), all encoded and all small tensors.
        dense: the other tensors by name, tied ones only once.
        digest: SHA-256 over the digests of all tensors, hexadecimal.
    """

    text: Tensor
    arena: Tensor
    dense: Mapping[str, Tensor]
    digest: str


def packed(payload: Payload) -> Compact:
    """Put a payload into the compact form; equal payloads give equal bytes."""
    writer = ArenaWriter()
    lines: dict[str, dict[str, Any] | str | None] = {}
    dense: dict[str, Tensor] = {}
    first: dict[object, str] = {}
    sources = {name: first.setdefault(_identity(name, v), name) for name, v in payload.tensors.items()}
    # Encoded ones first, so that the scale of a quantizer can share the bytes of its encoded weight's scale.
    for name, value in payload.tensors.items():
        if isinstance(value, EncodedTensor) and sources[name] == name:
            lines[name] = writer.entry(value)
    for name, value in payload.tensors.items():
        if sources[name] != name:
            lines[name] = sources[name]
        elif isinstance(value, Tensor) and value.nbytes > _SMALL:
            lines[name], dense[name] = None, value
        elif isinstance(value, Tensor):
            lines[name] = writer.plain(value)
    text = {
        "history": payload.history.model_dump(mode="json"),
        "index": [[name, lines[name]] for name in payload.tensors],
        "spec": payload.spec.model_dump(mode="json"),
    }
    digest = combined_digest(payload.digests)
    return Compact(compressed(canonical_json(text)), writer.finished(), dense, digest)


def _identity(name: str, value: Tensor | EncodedTensor) -> object:
    """A key that is equal for tied tensors."""
    if isinstance(value, EncodedTensor):
        return id(value)
    return place(value) if value.numel() else name


def unpacked(
    text: Any, arena: Any, dense: Mapping[str, Tensor], digest: Any, resume: ResumeState | None = None
) -> Payload:
    """Read what `packed` wrote, with types not checked yet; parts of encoded tensors are views of the arena.

    Raises:
        CorruptCheckpointError: if it is malformed.
        SpecError: if its spec or history is.
    """
    reader = ArenaReader(arena)
    if not isinstance(digest, str):
        raise CorruptCheckpointError("the digest is missing or is no text")
    try:
        found = json.loads(inflated(text))
        lines = _LINES.validate_python(found["index"])
        spec, history = canonical_json(found["spec"]), canonical_json(found["history"])
    except (ValidationError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"the compressed text is malformed: {type(error).__name__}") from None
    return Payload(
        spec=parse(ModelSpec, spec, "spec"),
        history=parse(History, history, "history"),
        tensors=_tensors(lines, reader, dict(dense)),
        resume=resume,
        digest=digest,
    )


def _tensors(
    lines: list[tuple[str, Entry | PlainEntry | str | None]], reader: ArenaReader, dense: dict[str, Tensor]
) -> dict[str, Tensor | EncodedTensor]:
    tensors: dict[str, Tensor | EncodedTensor] = {}
    for name, line in lines:
        if name in tensors:
            raise CorruptCheckpointError(f"the index names {name} twice")
        if isinstance(line, Entry):
            tensors[name] = reader.encoded(name, line)
        elif isinstance(line, PlainEntry):
            tensors[name] = reader.plain(name, line)
        else:
            held = dense if line is None else tensors
            source = name if line is None else line
            if source not in held:
                raise CorruptCheckpointError(f"the index names {source}, which is not in the file")
            tensors[name] = held.pop(source) if line is None else held[source]
    if dense:
        raise CorruptCheckpointError(f"the index does not name {', '.join(sorted(dense)[:3])}")
    return tensors


_HEAD = struct.Struct("<I")
_MAX_TEXT = 16 * 2**20
_MAX_RATIO = 64
_FREE = 2**20
"""Bytes of text that even the shortest stream may expand to."""


def compressed(text: str) -> Tensor:
    """A text as uint8 (bytes,): its length in UTF-8 as 4 bytes, little endian, and a zlib stream (RFC 1950).

    Raises:
        CheckpointError: if it is longer than 16 MiB.
    """
    data = text.encode()
    if len(data) > _MAX_TEXT:
        raise CheckpointError(f"spec, history and index are {len(data):,} bytes; {_MAX_TEXT:,} are allowed")
    stream = zlib.compress(data, 9)
    # A text that shrinks more than readers accept is stored uncompressed.
    if len(data) > _allowed(len(stream)):
        stream = zlib.compress(data, 0)
    return torch.frombuffer(bytearray(_HEAD.pack(len(data)) + stream), dtype=torch.uint8)


def inflated(stored: Any) -> str:
    """Read what `compressed` wrote, uint8 (bytes,).

    Raises:
        CorruptCheckpointError: if it is malformed, or, before anything is inflated, if it claims more than
            16 MiB, or more than both 1 MiB and 64 times its own length.
    """
    if not isinstance(stored, Tensor) or stored.dtype != torch.uint8 or stored.dim() != 1:
        raise CorruptCheckpointError("the compressed text is not a row of bytes")
    data = stored.contiguous().numpy().tobytes()
    if len(data) < _HEAD.size:
        raise CorruptCheckpointError("the compressed text is cut off")
    (length,) = _HEAD.unpack_from(data)
    if length > _allowed(len(data) - _HEAD.size):
        raise CorruptCheckpointError(f"the compressed text claims {length:,} bytes, more than is allowed")
    inflater = zlib.decompressobj()
    try:
        # One byte more than declared: a longer text is noticed, and 0 would mean no limit.
        found = inflater.decompress(data[_HEAD.size :], length + 1)
        if len(found) != length or not inflater.eof or inflater.unused_data:
            raise CorruptCheckpointError("the compressed text has another length than it declares")
        return found.decode()
    except (zlib.error, UnicodeDecodeError):
        raise CorruptCheckpointError("the compressed text is damaged") from None


def _allowed(stream: int) -> int:
    return min(_MAX_TEXT, max(_FREE, _MAX_RATIO * stream))
