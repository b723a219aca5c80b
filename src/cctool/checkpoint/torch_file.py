"""The `.pt` file: a plain ``torch.save`` zip of strings and tensors, ended by a checksum of all its bytes.

``torch.load(path, weights_only=True)`` opens it anywhere and gives a dictionary; docs/checkpoint-format.md
documents it to the byte. Nothing here unpickles anything but tensors.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from cctool.checkpoint.arena import pack, unpack
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.payload import Payload, ResumeState, canonical
from cctool.checkpoint.records import parse_digests, parse_history, parse_spec
from cctool.errors import CorruptCheckpointError, UnsafeCheckpointError

__all__ = ["FORMAT_VERSION", "load_torch_zip", "parse_pt", "verify_checksum", "write_pt"]

FORMAT_VERSION = 1
_MARK = b"cctool-sha256:"
_COMMENT_BYTES = len(_MARK) + 64
_CHUNK = 1 << 20


def write_pt(payload: Payload, stream: IO[bytes]) -> None:
    """Write ``payload``; equal payloads give equal bytes."""
    encoded = {name: value for name, value in payload.tensors.items() if isinstance(value, EncodedTensor)}
    document: dict[str, Any] = {
        "cctool": FORMAT_VERSION,
        "spec": canonical(payload.spec.model_dump(mode="json")),
        "history": canonical(payload.history.model_dump(mode="json")),
        "digests": canonical(dict(payload.digests)),
        "model": _own_storage({k: v for k, v in payload.tensors.items() if isinstance(v, Tensor)}),
    }
    if encoded:
        index, arena = pack(encoded)
        document["encoded"] = {"index": index, "order": canonical(list(payload.tensors)), "arena": arena}
    if payload.resume is not None:
        document["resume"] = {
            "state": canonical(dict(payload.resume.state)),
            "tensors": _own_storage(payload.resume.tensors),
        }
    # A path would put its temporary name into the archive.
    torch.save(document, stream)
    _append_checksum(stream)


def _own_storage(tensors: Any) -> OrderedDict[str, Tensor]:
    """Make tensors contiguous, each with a storage of its own size; equal storages stay shared."""
    made: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
    result = OrderedDict()
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if key not in made or not tensor.numel():
            value = tensor.detach().cpu().contiguous()
            if value.untyped_storage().nbytes() != value.numel() * value.element_size():
                value = value.clone()
            made[key] = value
        result[name] = made[key]
    return result


def _append_checksum(stream: IO[bytes]) -> None:
    """Put SHA-256 of everything before it into the archive's comment: then any flipped bit is seen."""
    stream.seek(-2, 2)
    stream.write(struct.pack("<H", _COMMENT_BYTES))
    stream.flush()
    stream.seek(0)
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    stream.seek(0, 2)
    stream.write(_MARK + digest.hexdigest().encode())


def verify_checksum(path: Path) -> tuple[str, bool]:
    """Hash a file in one pass.

    Returns:
        SHA-256 of the whole file, and whether it ends in a checksum of ours (which then was right).

    Raises:
        CorruptCheckpointError: if the checksum at its end is not that of the bytes before it.
    """
    size = path.stat().st_size
    digest, left = hashlib.sha256(), max(0, size - _COMMENT_BYTES)
    with path.open("rb") as stream:
        while left and (chunk := stream.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
        tail = stream.read()
    body = digest.hexdigest()
    digest.update(tail)
    if not tail.startswith(_MARK):
        return digest.hexdigest(), False
    if tail != _MARK + body.encode():
        raise CorruptCheckpointError(f"{path} is damaged: its checksum does not match its bytes")
    return digest.hexdigest(), True


def load_torch_zip(path: Path) -> Any:
    """Open a ``torch.save`` file without running any code that it contains.

    Raises:
        UnsafeCheckpointError: if it holds anything but tensors and plain containers.
        CorruptCheckpointError: if it cannot be read.
    """
    if zipfile.is_zipfile(path):
        _refuse_zip_bomb(path)
    try:
        with path.open("rb") as stream:
            document = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(f"{path} needs pickle, which runs code: {_reason(error)}") from None
    except MemoryError:
        raise CorruptCheckpointError(f"{path} asks for more memory than there is") from None
    except Exception as error:
        raise CorruptCheckpointError(f"{path} is not a readable checkpoint: {_line(error)}") from None
    for tensor in _tensors(document):
        # An expanded tensor would let a kilobyte stand for a terabyte.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CorruptCheckpointError(
                f"{path}: a tensor of shape {list(tensor.shape)} is not backed by data"
            )
    return document


def _refuse_zip_bomb(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise CorruptCheckpointError(f"{path} is not a readable archive: {_line(error)}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CorruptCheckpointError(f"{path} holds compressed entries, which torch never writes")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CorruptCheckpointError(f"{path} claims to hold more bytes than it has")


def _tensors(value: Any, depth: int = 0) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict) and depth < 32:
        for item in value.values():
            yield from _tensors(item, depth + 1)
    elif isinstance(value, (list, tuple)) and depth < 32:
        for item in value:
            yield from _tensors(item, depth + 1)


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def _reason(error: BaseException) -> str:
    """What torch says that the pickle contains, without its advice to switch the safety off."""
    import re

    text = str(error)
    names = re.findall(r"(?:Unsupported global: )?GLOBAL ([\w.]+)", text)
    return f"it contains {', '.join(sorted(set(names)))}" if names else _line(error)


def parse_pt(path: Path, document: Any) -> Payload:
    """Read the parts of a cctool document, which `load_torch_zip` returned.

    Raises:
        CorruptCheckpointError: if a part is missing or of the wrong kind.
    """
    version = document.get("cctool")
    if version != FORMAT_VERSION:
        raise CorruptCheckpointError(
            f"{path} is of format {version!r}; this cctool reads format {FORMAT_VERSION}: "
            "install the one that wrote it"
        )
    model = document.get("model")
    if not isinstance(model, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in model.items()
    ):
        raise CorruptCheckpointError(f"{path}: 'model' is not a state dict")
    tensors: dict[str, Tensor | EncodedTensor] = dict(model)
    encoded = document.get("encoded")
    if encoded is not None:
        try:
            found = unpack(encoded["index"], encoded["arena"])
            order = json.loads(encoded["order"])
            both = {**tensors, **found}
            tensors = {name: both.pop(name) for name in order}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CorruptCheckpointError(f"{path}: the encoded tensors are malformed") from None
        if both:
            raise CorruptCheckpointError(f"{path}: tensors without a place in the order: {', '.join(both)}")
    return Payload(
        spec=parse_spec(document.get("spec")),
        history=parse_history(document.get("history")),
        tensors=tensors,
        resume=_parse_resume(path, document.get("resume")),
        digests=parse_digests(document.get("digests")),
    )


def _parse_resume(path: Path, resume: Any) -> ResumeState | None:
    if resume is None:
        return None
    try:
        tensors, state = dict(resume["tensors"]), json.loads(resume["state"])
    except (KeyError, TypeError, ValueError):
        raise CorruptCheckpointError(f"{path}: the resume state is malformed") from None
    return ResumeState(tensors=tensors, state=state)
