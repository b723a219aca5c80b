"""Weights that libraries publish: found in their own caches, downloaded only if that is allowed, verified."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from cctool.base.downloads import DOWNLOAD_VARIABLE, download_allowed
from cctool.base.errors import ArchitectureError, CorruptCheckpointError
from cctool.checkpoint.file.checksum import verify_checksum

_DIGITS_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")


@dataclass(frozen=True)
class Published:
    """Published weights of a network, and what they were trained with.

    Attributes:
        label: how notes and the history name the file.
        arguments: of the builder that makes the network of these weights.
        input_shape: (C, H, W).
        classes: distinct names in the order of the outputs; None if the library does not tell.
        mean: of each channel, subtracted from images in 0..1.
        std: of each channel, which divides then.
        fetch: finds the file in the library's cache or downloads it, verifies it and gives its path; raises
            ArchitectureError if it is not there, CorruptCheckpointError if it is another one.
    """

    label: str
    arguments: Mapping[str, Any]
    input_shape: tuple[int, int, int]
    classes: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fetch: Callable[[], Path]


def from_address(reference: str, address: str) -> Path:
    """The file of an address in torch's cache (``$TORCH_HOME/hub/checkpoints``), whose name has its SHA-256.

    Args:
        reference: how errors name the network.
        address: ends in ``NAME-DIGITS.pth``, where DIGITS begin the SHA-256 of the file.

    Raises:
        ArchitectureError: if it is not there and cannot or must not be downloaded.
        CorruptCheckpointError: if its SHA-256 is another one.
    """
    name = PurePosixPath(address).name
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    digits = _DIGITS_IN_NAME.search(name)
    if digits is None:
        raise ArchitectureError(f"{reference}: the name of {name} has no SHA-256 by which to verify the file")
    if not path.is_file():
        if not download_allowed():
            raise _missing(reference, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), hash_prefix=digits[1], progress=False)
        except (OSError, RuntimeError) as error:
            raise _failed(reference, name, error) from error
    refuse_other_file(path, digits[1])
    return path


def from_hub(reference: str, repository: str, names: Sequence[str]) -> Path:
    """The first of these files of a repository in the cache of ``huggingface_hub``.

    The cache stores a file under its SHA-256, by which it is verified.

    Raises:
        ArchitectureError: if none is there and none can or must be downloaded, or its SHA-256 is not known.
        CorruptCheckpointError: if its SHA-256 is another one.
    """
    import huggingface_hub

    cached = (huggingface_hub.try_to_load_from_cache(repository, name) for name in names)
    path = next((Path(found) for found in cached if isinstance(found, str)), None)
    if path is None:
        if not download_allowed():
            raise _missing(reference, Path(huggingface_hub.constants.HF_HUB_CACHE, repository, names[0]))
        try:
            path = Path(huggingface_hub.hf_hub_download(repository, names[0]))
        # The client has errors of many kinds: of the network, of the server, of the repository.
        except Exception as error:
            raise _failed(reference, f"{names[0]} of {repository}", error) from error
    digits = path.resolve().name
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise ArchitectureError(f"{reference}: {path} is not stored under its SHA-256, by which to verify it")
    refuse_other_file(path, digits)
    return path


def refuse_other_file(path: Path, digits: str) -> None:
    """Raise CorruptCheckpointError unless the SHA-256 of a file begins with ``digits``."""
    found, _ = verify_checksum(path)
    if not found.startswith(digits):
        raise CorruptCheckpointError(
            f"{path} is damaged: its SHA-256 begins with {found[: len(digits)]}, and not with {digits} as "
            "its name says; delete it"
        )


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names of which no two are equal: each that is there more than once gets its number, from 0.

    >>> distinct(["crane", "dog", "crane"])
    ('crane (0)', 'dog', 'crane (2)')
    """
    count = Counter(names)
    return tuple(f"{name} ({i})" if count[name] > 1 else name for i, name in enumerate(names))


def _missing(reference: str, path: Path) -> ArchitectureError:
    return ArchitectureError(
        f"{reference}: its published weights are not in {path}; put the file there, or set "
        f"{DOWNLOAD_VARIABLE}=1 to let the library download it"
    )


def _failed(reference: str, what: str, error: Exception) -> ArchitectureError:
    text = " ".join(str(error).split())[:200]
    return ArchitectureError(f"{reference}: cannot download {what}: {type(error).__name__}: {text}")
