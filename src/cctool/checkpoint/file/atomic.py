"""Writing a file so that a crash at any moment leaves the old file or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from cctool.base.errors import CctoolError, CheckpointError

try:
    import fcntl
except ImportError:  # Windows has no flock; there temporary files stay until they are removed by hand.
    fcntl = None  # type: ignore[assignment]


_SUFFIX = ".cctool-tmp"


def write_atomically(
    path: Path,
    write: Callable[[IO[bytes]], object],
    check: Callable[[Path], None] | None = None,
    *,
    overwrite: bool = True,
) -> None:
    """Write to a temporary file next to ``path``, flush it to disk, check it, rename it into place.

    Args:
        path: the target; a symbolic link is followed.
        write: fills the open temporary file.
        check: reads the temporary file back and raises if the content is not what was meant.
        overwrite: whether an existing target may be replaced.

    Raises:
        CheckpointError: if the folder is missing, the disk is full or the target exists; the target is then
            unchanged.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist; create it first")
    if not overwrite and path.exists():
        raise _exists(path)
    remove_stale(path.parent.glob(f".*{_SUFFIX}"), Path.unlink)
    temporary = path.with_name(f".{secrets.token_hex(8)}{_SUFFIX}")
    try:
        with _open_locked(temporary) as stream:
            guarded = _Guarded(stream)
            try:
                write(guarded)  # type: ignore[arg-type]
            except Exception:
                if guarded.error is not None:
                    raise guarded.error from None
                raise
            stream.flush()
            os.fsync(stream.fileno())
            if check is not None:
                check(temporary)
            if overwrite:
                temporary.replace(path)
            else:
                _rename_new(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_bytes(path: Path, content: bytes, *, overwrite: bool = True) -> None:
    """Write bytes as `write_atomically` does, and read them back."""

    def check(temporary: Path) -> None:
        if temporary.read_bytes() != content:
            raise CctoolError(f"{path}: reading back gave other bytes than were written")

    write_atomically(path, lambda stream: stream.write(content), check, overwrite=overwrite)


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """Give the error that says why ``path`` could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else error.strerror or str(error)
    return CheckpointError(f"cannot write {path}: {reason}; nothing was left under that name")


def _rename_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:
        # File systems without hard links: the window between test and rename is small but real.
        if path.exists():
            raise _exists(path) from None
        temporary.replace(path)


def _exists(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} exists already; --force replaces it")


class _Guarded:
    """A file that remembers its first OSError, which torch's writer would replace by a message of its own."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            written = 0
            view = memoryview(data).cast("B")
            while written < len(view):
                written += self._stream.write(view[written:])
            return written
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.error = self.error or error
            raise

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(size)


def _open_locked(temporary: Path) -> IO[bytes]:
    """Create ``temporary`` and lock it; the system releases the lock even when this process is killed."""
    while True:
        stream = temporary.open("xb+")
        if fcntl is None:
            return stream
        hold_lock(stream)
        # Another writer that cleans up may have removed the file before it was locked.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(stream.fileno()).st_ino == temporary.stat().st_ino:
                return stream
        stream.close()


def hold_lock(stream: IO[bytes]) -> None:
    """Lock an open file until it is closed, where the system has locks."""
    if fcntl is not None:
        # Some network file systems have no locks. `remove_stale` gets none either there, and removes nothing.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)


def remove_stale(locks: Iterable[Path], remove: Callable[[Path], None]) -> None:
    """Call ``remove`` with each of the lock files whose lock is free, which means that its writer is dead."""
    if fcntl is None:
        return
    for lock in locks:
        with contextlib.suppress(OSError), lock.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(lock)


def _sync_folder(folder: Path) -> None:
    # Windows cannot open folders; there the rename is as durable as the system makes it.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
