"""Checkpoints that others wrote: bare state dicts, wrapped ones, legacy files, pickled modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import CheckpointError, UnsafeCheckpointError
from cctool.base.networks import copied
from cctool.checkpoint.file.torch_file import load_torch_file

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "module", "weights", "params", "model_state")
_PREFIXES = ("module.", "_orig_mod.", "model.")
# torchvision's published DenseNets have names such as `norm.1`; attribute names may no longer contain dots.
_OLD_NAMES = ((re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),)


def _read_with_pickle(path: Path) -> Any:
    """Unpickle a file, which runs any code that it contains: only with --trust-pickle."""
    try:
        with path.open("rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=False)
    except Exception as error:
        text = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(f"{path} cannot be unpickled: {type(error).__name__}: {text}") from error


def bare_tensors(document: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict in what a foreign file holds.

    Looks into the usual wrappers (``state_dict``, ``model``, ...), up to three deep, and takes the state dict
    of a pickled module. Floating-point tensors come out as float32.

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
        keys = document if isinstance(document, Mapping) else [type(document).__name__]
        holds = ", ".join(map(str, list(keys)[:5]))
        raise CheckpointError(f"{path} holds no state dict; it holds {holds or 'nothing'}")
    return {
        name: value.detach().float() if value.is_floating_point() else value.detach()
        for name, value in document.items()
        if isinstance(value, Tensor)
    }


def match_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name a foreign file's tensors as ``model`` does.

    Drops a prefix such as ``module.`` that all names share, knows names that libraries used in the past, and
    lets the model's own modules translate older versions of themselves (``num_batches_tracked`` came with
    torch 0.4.1). If no spelling fits entirely, the one with the most matching names is returned.
    """
    expected = model.state_dict().keys()
    nearest: dict[str, Tensor] = dict(tensors)
    for spelling in _spellings(tensors):
        for translate in (dict[str, Tensor], partial(_translated, model)):
            candidate = translate(spelling)
            if candidate.keys() == expected:
                return candidate
            if len(candidate.keys() & expected) > len(nearest.keys() & expected):
                nearest = candidate
    return nearest


def _spellings(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    spelling = dict(tensors)
    yield spelling
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in spelling)), None):
        spelling = {name.removeprefix(prefix): value for name, value in spelling.items()}
        yield spelling
    for old, new in _OLD_NAMES:
        renamed = {old.sub(new, name): value for name, value in spelling.items()}
        if renamed.keys() != spelling.keys():
            yield renamed


def _translated(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let each module rename what older versions of it stored, as `load_state_dict` does internally."""
    state: dict[str, Any] = dict(tensors)
    for prefix, module in copied(model).named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        module._load_from_state_dict(state, start, {"assign_to_params_buffers": True}, True, [], [], [])
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _is_state_dict(document: Mapping[Any, Any]) -> bool:
    return bool(document) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))
        for name, value in document.items()
    )


def read_foreign(path: Path, *, trust_pickle: bool) -> Any:
    """Read a torch file of unknown origin; unpickle only with ``trust_pickle``.

    Raises:
        UnsafeCheckpointError: if it needs pickle and ``trust_pickle`` is off.
    """
    try:
        return load_torch_file(path)
    except UnsafeCheckpointError as error:
        if trust_pickle:
            return _read_with_pickle(path)
        raise UnsafeCheckpointError(
            f"{error}; if you trust whoever wrote it, --trust-pickle together with --arch loads it"
        ) from None
