"""The `.safetensors` file: the same content, with spec, history and digests in its metadata."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from cctool.base.errors import CheckpointError, CorruptCheckpointError
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.arena import unpack
from cctool.checkpoint.file.checksum import MARK, ZEROS
from cctool.checkpoint.file.compact import COMPACT_VERSION, packed, unpacked
from cctool.checkpoint.file.payload import (
    MemoryPlace,
    Payload,
    as_bytes,
    canonical_json,
    dense_payload,
    dense_texts,
    place,
)
from cctool.checkpoint.file.torch_file import DENSE_VERSION

_ARENA, _TEXT = "cctool.arena", "cctool.text"
_ALIGNMENT = 64
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_safetensors(payload: Payload, stream: IO[bytes]) -> None:
    """Write ``payload``; tied tensors are stored once and named in the metadata.

    Not by the library's own writer, which copies every tensor twice and orders the metadata by a random hash.
    """
    if payload.resume is not None:
        raise CheckpointError("a .safetensors file cannot hold the state for --resume; write a .pt file")
    signature = {"format": "pt", "checksum": (MARK + ZEROS).decode()}
    if any(isinstance(value, EncodedTensor) for value in payload.tensors.values()):
        compact = packed(payload)
        metadata = {"cctool": str(COMPACT_VERSION), "digest": compact.digest}
        _write({**compact.dense, _ARENA: compact.arena, _TEXT: compact.text}, metadata | signature, stream)
        return
    dense: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[MemoryPlace, str] = {}
    for name, value in payload.tensors.items():
        assert isinstance(value, Tensor)
        if value.numel() and place(value) in seen:
            aliases[name] = seen[place(value)]
        else:
            seen[place(value)] = name
            dense[name] = value
    metadata = {
        "cctool": str(DENSE_VERSION),
        **dense_texts(payload),
        "aliases": canonical_json(aliases),
        "order": canonical_json(list(payload.tensors)),
    }
    _write(dense, metadata | signature, stream)


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], stream: IO[bytes]) -> None:
    # The largest element type first, so that every tensor is aligned without padding.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"a .safetensors file cannot hold {tensor.dtype} ({name}); write a .pt file"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = canonical_json(header).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(head)
    for name in names:
        digest.update(as_bytes(tensors[name]))
    stream.write(head.replace(MARK + ZEROS, MARK + digest.hexdigest().encode()))
    for name in names:
        stream.write(as_bytes(tensors[name]))


def read_safetensors(path: Path, *, signed: bool) -> Payload | dict[str, Tensor]:
    """Read a file; one without our metadata gives its tensors alone.

    Args:
        path: the file.
        signed: whether it holds a checksum of ours, which `verify_checksum` found right.

    Raises:
        CorruptCheckpointError: if it cannot be read.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            tensors: dict[str, Tensor] = {name: _aligned(file.get_tensor(name)) for name in names}
    # The library raises KeyError, AttributeError or its own error, depending on what is wrong.
    except Exception as error:
        raise CorruptCheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    if "cctool" not in metadata and not signed:
        return tensors
    if not signed:
        raise CorruptCheckpointError(f"{path} is damaged: its checksum is missing")
    if metadata.get("cctool") == str(COMPACT_VERSION):
        arena, text = tensors.pop(_ARENA, None), tensors.pop(_TEXT, None)
        return unpacked(text, arena, tensors, metadata.get("digest"))
    if metadata.get("cctool") != str(DENSE_VERSION):
        raise CorruptCheckpointError(
            f"{path} is of format {metadata.get('cctool')!r}; this cctool reads formats {DENSE_VERSION} and "
            f"{COMPACT_VERSION}"
        )
    return dense_payload(metadata, _ordered(path, metadata, tensors))


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address that is aligned as torch's own allocations are.

    Kernels choose the order of their sums by alignment, too: otherwise the logits differ in their last bits.
    """
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _ordered(
    path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]
) -> dict[str, Tensor | EncodedTensor]:
    everything: dict[str, Tensor | EncodedTensor] = {**tensors}
    try:
        if "encoded" in metadata:
            del everything[_ARENA]
            everything |= unpack(metadata["encoded"], tensors[_ARENA])
        for name, source in json.loads(metadata["aliases"]).items():
            everything[name] = everything[source]
        order = json.loads(metadata["order"])
        if len(order) != len(everything):
            raise ValueError("the order does not name each tensor once")
        return {name: everything[name] for name in order}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise CorruptCheckpointError(f"{path}: its metadata does not fit its tensors") from None
