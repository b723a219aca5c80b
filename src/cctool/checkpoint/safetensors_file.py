"""The `.safetensors` file: the same content, with spec, history and digests in its metadata."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from cctool.checkpoint.arena import pack, unpack
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.payload import Payload, canonical
from cctool.checkpoint.records import parse_digests, parse_history, parse_spec
from cctool.checkpoint.torch_file import FORMAT_VERSION
from cctool.errors import CheckpointError, CorruptCheckpointError

__all__ = ["read_safetensors", "write_safetensors"]

_ARENA = "cctool.arena"


def write_safetensors(payload: Payload, stream: IO[bytes]) -> None:
    """Write ``payload``; tied tensors are stored once and named in the metadata."""
    import safetensors.torch

    if payload.resume is not None:
        raise CheckpointError("a .safetensors file cannot hold the state for --resume; write a .pt file")
    dense, aliases, seen = {}, {}, dict[tuple[int, tuple[int, ...], tuple[int, ...]], str]()
    encoded = {}
    for name, value in payload.tensors.items():
        if isinstance(value, EncodedTensor):
            encoded[name] = value
            continue
        key = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
        if value.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            # The library refuses tensors that overlap in memory.
            dense[name] = value.detach().cpu().contiguous().clone()
    metadata = {
        "format": "pt",
        "cctool": str(FORMAT_VERSION),
        "spec": canonical(payload.spec.model_dump(mode="json")),
        "history": canonical(payload.history.model_dump(mode="json")),
        "digests": canonical(dict(payload.digests)),
        "aliases": canonical(aliases),
        "order": canonical(list(payload.tensors)),
    }
    if encoded:
        metadata["encoded"], dense[_ARENA] = pack(encoded)
    _write_sorted(safetensors.torch.save(dense, metadata=metadata), stream)


def _write_sorted(data: bytes, stream: IO[bytes]) -> None:
    """Write with a sorted header: the library orders the metadata by a random hash."""
    (length,) = struct.unpack("<Q", data[:8])
    header = canonical(json.loads(data[8 : 8 + length])).encode()
    header += b" " * (-len(header) % 8)
    stream.write(struct.pack("<Q", len(header)) + header)
    stream.write(memoryview(data)[8 + length :])


def read_safetensors(path: Path) -> Payload | dict[str, Tensor]:
    """Read a file; one without our metadata comes back as its bare tensors.

    Raises:
        CorruptCheckpointError: if it cannot be read.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CorruptCheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    if "cctool" not in metadata:
        return tensors
    if metadata["cctool"] != str(FORMAT_VERSION):
        raise CorruptCheckpointError(
            f"{path} is of format {metadata['cctool']!r}; this cctool reads format {FORMAT_VERSION}"
        )
    everything: dict[str, Tensor | EncodedTensor] = dict(tensors)
    try:
        if "encoded" in metadata:
            everything.update(unpack(metadata["encoded"], everything.pop(_ARENA, torch.empty(0))))  # type: ignore[arg-type]
        for name, source in json.loads(metadata["aliases"]).items():
            everything[name] = everything[source]
        ordered = {name: everything[name] for name in json.loads(metadata["order"])}
    except (KeyError, ValueError, TypeError, AttributeError):
        raise CorruptCheckpointError(f"{path}: its metadata does not fit its tensors") from None
    return Payload(
        spec=parse_spec(metadata.get("spec")),
        history=parse_history(metadata.get("history")),
        tensors=ordered,
        digests=parse_digests(metadata.get("digests")),
    )
