"""Checkpoints that others wrote: bare state dicts, wrapped ones, legacy files, pickled modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cctool.checkpoint.torch_file import load_torch_zip
from cctool.errors import CheckpointError, UnsafeCheckpointError

__all__ = ["bare_tensors", "read_with_pickle"]

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "module", "weights", "params", "model_state")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_with_pickle(path: Path) -> Any:
    """Unpickle a file, running whatever code it contains: only on the user's explicit word."""
    try:
        with path.open("rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=False)
    except Exception as error:
        text = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path} cannot be unpickled: {type(error).__name__}: {text[0][:200] if text else ''}"
        ) from error


def bare_tensors(document: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict in what a foreign file holds.

    Looks into the usual wrappers (``state_dict``, ``model``, ...), takes a pickled module's own state dict
    and drops a prefix such as ``module.`` that all names share. Floating-point tensors come out as float32.

    Raises:
        CheckpointError: if there is no state dict in it.
    """
    if isinstance(document, nn.Module):
        document = document.state_dict()
    for _ in range(3):
        if isinstance(document, Mapping) and not _is_state_dict(document):
            key = next(
                (key for key in _WRAPPERS if isinstance(document.get(key), (Mapping, nn.Module))), None
            )
            if key is None:
                break
            inner = document[key]
            document = inner.state_dict() if isinstance(inner, nn.Module) else inner
    if not isinstance(document, Mapping) or not _is_state_dict(document):
        holds = (
            ", ".join(map(str, list(document)[:5]))
            if isinstance(document, Mapping)
            else type(document).__name__
        )
        raise CheckpointError(f"{path} holds no state dict; it holds {holds or 'nothing'}")
    tensors = {name: value.detach() for name, value in document.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    return {
        name: value.float() if value.is_floating_point() and value.dtype != torch.float32 else value
        for name, value in tensors.items()
    }


def _is_state_dict(document: Mapping[Any, Any]) -> bool:
    return bool(document) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))
        for name, value in document.items()
    )


def read_foreign(path: Path, *, trust_pickle: bool) -> Any:
    """Read a torch file of unknown origin; unpickle only with ``trust_pickle``.

    Raises:
        UnsafeCheckpointError: if it needs pickle and nobody vouched for it.
    """
    try:
        return load_torch_zip(path)
    except UnsafeCheckpointError as error:
        if trust_pickle:
            return read_with_pickle(path)
        raise UnsafeCheckpointError(
            f"{error}; if you trust whoever wrote it, --trust-pickle together with --arch loads it"
        ) from None
