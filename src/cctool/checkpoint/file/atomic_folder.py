"""Writing a folder so that a crash at any moment leaves the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cctool.base.errors import CheckpointError
from cctool.checkpoint.file.atomic import hold_lock, remove_stale, unwritable

_SUFFIX = ".cctool-tmp-folder"
_LOCK = ".lock"


@contextlib.contextmanager
def folder_atomically(path: Path, *, overwrite: bool, ours: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a temporary folder to fill, which is renamed to ``path`` if the block ends without an error.

    Args:
        path: the target; a symbolic link is followed.
        overwrite: whether an existing folder of ours may be replaced.
        ours: whether a folder of ours may hold an entry of that name; a folder that holds any other entry is
            never replaced.

    Raises:
        CheckpointError: as `refuse_existing_folder`, or if the disk is full; nothing is left then.
    """
    path = Path(os.path.realpath(path))
    refuse_existing_folder(path, overwrite=overwrite, ours=ours)
    remove_stale(path.parent.glob(f".*{_SUFFIX}/{_LOCK}"), _remove_folder_of)
    temporary = path.with_name(f".{secrets.token_hex(8)}{_SUFFIX}")
    try:
        temporary.mkdir()
        # The system releases the lock even when this process is killed.
        with (temporary / _LOCK).open("xb") as stream:
            hold_lock(stream)
            yield temporary
            for entry in temporary.iterdir():
                with entry.open("rb") as written:
                    os.fsync(written.fileno())
            refuse_existing_folder(path, overwrite=overwrite, ours=ours)
            (temporary / _LOCK).unlink()
            _rename(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing_folder(path: Path, *, overwrite: bool, ours: Callable[[str], bool]) -> None:
    """Refuse a folder that could not be written, before the work for it starts.

    Raises:
        CheckpointError: if ``path`` exists and may not be replaced, or its parent does not exist.
    """
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist; create it first")
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; name a folder")
    if not overwrite:
        raise CheckpointError(f"{path} exists already; --force replaces it")
    foreign = sorted(entry.name for entry in path.iterdir() if not (entry.is_file() and ours(entry.name)))
    if foreign:
        raise CheckpointError(f"{path} holds {foreign[0]}, which is not of this command: name another folder")


def _remove_folder_of(lock: Path) -> None:
    shutil.rmtree(lock.parent, ignore_errors=True)


def _rename(temporary: Path, path: Path) -> None:
    """Rename into place; an existing folder is moved away first, because rename replaces only empty ones."""
    if not path.exists():
        temporary.rename(path)
        return
    aside = path.with_name(f".{secrets.token_hex(8)}{_SUFFIX}")
    path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside)
