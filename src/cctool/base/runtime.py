"""Device, precision, seeds, and how long-running work reports what it does."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import torch

from cctool.base.errors import DeviceError

T = TypeVar("T")


class Reporter(Protocol):
    """Takes the messages and the progress of long-running work; commands print them to stderr."""

    def note(self, text: str) -> None:
        """Say something worth knowing."""

    def warn(self, text: str) -> None:
        """Say something that may be wrong."""

    def progress(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items`` and show how many are done, on a terminal."""


class Silent:
    """A reporter that says nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Say nothing."""

    def progress(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items``."""
        yield from items


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that is available.

    Raises:
        DeviceError: if it is unknown or absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise DeviceError(f"--device {name}: auto, cpu, cuda or cuda:N is allowed")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise DeviceError(
                f"--device {name}: this machine has {count} usable CUDA devices; --device cpu works"
            )
    return torch.device(name)


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch; with ``deterministic``, refuse scheduling-dependent operations."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # cuBLAS reads this when it is first used.
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Setting it imports torch's compiler, which takes a second: only where it changes something.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """Say in a sentence what a device could not do.

    Raises:
        DeviceError: its memory is full; an operator has no deterministic form; or a GPU stopped at an index
            that is out of range, after which torch cannot use it again in this process.
    """
    try:
        yield
    except RuntimeError as error:
        reason = _device_reason(str(error), isinstance(error, torch.OutOfMemoryError))
        if reason is None:
            raise
        raise DeviceError(reason) from error


def _device_reason(text: str, out_of_memory: bool) -> str | None:
    if out_of_memory or "can't allocate memory" in text:
        return "the device's memory is full; a smaller --batch-size or --limit may fit"
    if "does not have a deterministic implementation" in text:
        return (
            f"--deterministic: {text.split()[0]} has no deterministic form on this device; leave "
            "--deterministic out, or --device cpu may have one"
        )
    if "device-side assert" in text:
        return (
            "the GPU stopped at an index out of range, most often a label that the network has no class for; "
            "--device cpu names it"
        )
    return None


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return the autocast context of ``precision`` (``32``, ``bf16`` or ``16``) on ``device``."""
    if str(precision) == "32":
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if str(precision) == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)
