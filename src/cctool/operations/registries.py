"""The composition root: the one place that puts together the registries that a checkpoint refers to.

The library's `cctool.load`, every command and every worker process use this. No registry depends on which
modules happen to be imported.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

from cctool.base.runtime import Silent
from cctool.base.user_code import looks_like_user_code
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.checkpoint import save as save_checkpoint
from cctool.checkpoint.tables import Tables
from cctool.models import registry
from cctool.operations.keep import events
from cctool.operations.opening import open_checkpoint
from cctool.options.common import ModelOptions
from cctool.quantization.encodings.table import ENCODINGS


def tables(user_code: Collection[str] = ()) -> Tables:
    """The registries that a checkpoint refers to; of user code only the references in ``user_code`` run."""
    return Tables(
        build=partial(registry.build, user_code=frozenset(user_code)),
        edits=events.edit_kinds(),
        encodings=ENCODINGS,
    )


def load(path: Path | str, *, arch: str | None = None) -> Checkpoint:
    """Load a checkpoint: a module that trains, with its spec and history.

    Args:
        path: a file that cctool wrote, or a foreign one whose architecture ``arch`` names.
        arch: ``net.py:factory`` of a network of the caller's own (its code runs only if it is named here,
            and may have moved since the file was written), or the architecture of a foreign file.

    Raises:
        CheckpointError: if the file is missing, damaged or unsafe, or foreign and ``arch`` is not given.
        ArchitectureError: if it holds user code that was not named.
        UsageError: if ``arch`` is not what the file holds.
    """
    # Naming an architecture allows its code to run, if it is the user's.
    named = frozenset() if arch is None or not looks_like_user_code(arch) else frozenset({arch})
    return open_checkpoint(Path(path), ModelOptions(arch=arch), tables(named), named, Silent())


def save(checkpoint: Checkpoint, path: Path | str, *, overwrite: bool = False) -> None:
    """Write a checkpoint atomically and read it back.

    Masked weights are stored without their zeros, quantized weights that are on their grid as integers.

    Raises:
        CheckpointError: if it cannot be written, or exists and ``overwrite`` is false.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"save() takes a Checkpoint, not {type(checkpoint).__name__}")
    known = tables()
    save_checkpoint(events.stored(checkpoint, known, settle=False), path, known, overwrite=overwrite)
