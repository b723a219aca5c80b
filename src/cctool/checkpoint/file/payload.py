"""What a file holds before any module is built, hashes over it, and its JSON texts as records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, JsonValue, ValidationError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cctool.base.errors import CheckpointError, CorruptCheckpointError, SpecError
from cctool.base.networks import companion_tensors
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.spec import History, ModelSpec

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
"""Element types that a checkpoint may hold, by name."""

_MAX_TEXT = 64 * 2**20
_R = TypeVar("_R", bound=BaseModel)


@dataclass(frozen=True)
class ResumeState:
    """What training needs besides the weights to continue bit for bit.

    Attributes:
        tensors: optimizer moments, generator states, best weights.
        state: everything that is not a tensor, as JSON.
    """

    tensors: Mapping[str, Tensor]
    state: Mapping[str, JsonValue]


@dataclass(frozen=True)
class Payload:
    """Spec, history and tensors of one file, dense or encoded, on the CPU.

    Attributes:
        digests: SHA-256 of each tensor, see `tensor_digests`; empty if the file holds only `digest`.
        digest: `combined_digest` of them, from a file that holds no others.
    """

    spec: ModelSpec
    history: History
    tensors: Mapping[str, Tensor | EncodedTensor]
    resume: ResumeState | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    digest: str | None = None


MemoryPlace = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]


def place(tensor: Tensor) -> MemoryPlace:
    """Address, type, shape and strides of a tensor: equal for tensors that are tied."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


def as_bytes(tensor: Tensor) -> memoryview:
    """Bytes of a tensor in C order, little endian as on every platform that torch supports."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _digest(name: str, tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{name}: tensors of type {dtype} cannot be stored; allowed: {', '.join(DTYPES)}"
        )
    if is_lazy(tensor) or tensor.is_meta:
        raise CheckpointError(f"{name} has no values yet; run the model once before saving it")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise CheckpointError(f"{name}: a {tensor.layout} tensor cannot be stored; make it dense")
    digest = hashlib.sha256(f"{dtype}{list(tensor.shape)}".encode())
    digest.update(as_bytes(tensor))
    return digest.hexdigest()


def _encoded_digest(owner: str, encoded: EncodedTensor) -> str:
    head = {
        "encoding": encoded.encoding,
        "shape": encoded.shape,
        "dtype": encoded.dtype,
        "parameters": dict(encoded.parameters),
        "parts": {name: _digest(owner, part) for name, part in sorted(encoded.parts.items())},
    }
    return hashlib.sha256(canonical_json(head).encode()).hexdigest()


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text.

    Raises:
        SpecError: if a number is NaN or infinite, which JSON does not know.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise SpecError(f"spec, history or state cannot be written as JSON: {error}") from None


def tensor_digests(payload: Payload) -> dict[str, str]:
    """SHA-256 of each tensor over element type, shape and bytes; resume tensors as ``resume/NAME``."""
    digests = {
        name: _encoded_digest(name, value) if isinstance(value, EncodedTensor) else _digest(name, value)
        for name, value in payload.tensors.items()
    }
    if payload.resume is not None:
        digests |= {f"resume/{name}": _digest(name, value) for name, value in payload.resume.tensors.items()}
        text = canonical_json(dict(payload.resume.state))
        digests["resume"] = hashlib.sha256(text.encode()).hexdigest()
    return digests


def combined_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 over all digests and their names, for files too small to hold one for each tensor."""
    return hashlib.sha256(canonical_json(dict(digests)).encode()).hexdigest()


def content_hash(payload: Payload, digests: Mapping[str, str]) -> str:
    """SHA-256 over spec, history and the model's tensors, by which history refers to a parent.

    Equal for the same content in ``.pt`` and ``.safetensors``; resume state is left out.
    """
    text = canonical_json(
        {
            "spec": payload.spec.model_dump(mode="json"),
            "history": payload.history.model_dump(mode="json"),
            "tensors": {name: digests[name] for name in payload.tensors},
        }
    )
    return hashlib.sha256(text.encode()).hexdigest()


def dense_texts(payload: Payload) -> dict[str, str]:
    """Spec, history and digests as JSON texts, for a file whose tensors are all dense."""
    return {
        "spec": canonical_json(payload.spec.model_dump(mode="json")),
        "history": canonical_json(payload.history.model_dump(mode="json")),
        "digests": canonical_json(dict(payload.digests)),
    }


def dense_payload(
    texts: Mapping[str, Any], tensors: Mapping[str, Tensor | EncodedTensor], resume: ResumeState | None = None
) -> Payload:
    """Validate what `dense_texts` gave, as a file holds it, and put it together with the file's tensors.

    Raises:
        SpecError: if spec or history are malformed.
        CorruptCheckpointError: if the digests are.
    """
    spec, history = (
        parse(ModelSpec, texts.get("spec"), "spec"),
        parse(History, texts.get("history"), "history"),
    )
    try:
        digests = json.loads(texts.get("digests"))  # type: ignore[arg-type]
    except (TypeError, ValueError, RecursionError):
        raise CorruptCheckpointError("the digests are not JSON text") from None
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        raise CorruptCheckpointError("the digests are not a table of texts")
    return Payload(spec, history, tensors, resume, digests)


def parse(record: type[_R], text: Any, what: str) -> _R:
    """Validate the JSON text of a spec or a history. Raises SpecError with the first thing that is wrong."""
    if not isinstance(text, str) or len(text) > _MAX_TEXT:
        raise SpecError(f"the {what} is missing or is not JSON text")
    try:
        found = record.model_validate_json(text)
        # JSON values inside may hold NaN or 1e999, which pydantic accepts.
        canonical_json(found.model_dump(mode="json"))
        return found
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or what
        raise SpecError(f"the {what} is malformed at {place}: {problem['msg']}") from None


def fingerprint_of(model: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 over a network's tensors and their names, except those of companions and those ``without``."""
    ours = {*without, *companion_tensors(model)}
    hashed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and name not in ours:
            hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            hashed.update(as_bytes(tensor))
    return hashed.hexdigest()
