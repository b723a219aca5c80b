"""The run folder of one training: logs, environment, and what resuming needs.

``NAME.run`` next to the product ``NAME.pt`` holds ``product.txt``, ``log.txt``, ``command.txt``,
``environment.json``, ``metrics.csv`` and ``last.pt``; on request ``epoch-NNNN.pt``, ``tensorboard`` and
``mlflow``; ``best.pt`` if training was interrupted; and the job and logs of worker processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TypeVar

import torch

from cctool import __version__
from cctool.base.errors import CheckpointError
from cctool.base.runtime import Reporter
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.file.atomic import write_atomically
from cctool.checkpoint.tables import Tables
from cctool.options.paths import NamedFile

T = TypeVar("T")

# What a new training may delete; other files in the folder are the user's.
_OURS = (
    "product.txt", "log.txt", "command.txt", "environment.json", "metrics.csv", "last.pt", "best.pt",
    "start.pt", "mlflow-run.txt", "epoch-*.pt", "job*.json", "worker-*.log", "tensorboard", "mlflow",
)  # fmt: skip


_PRODUCT = "product.txt"


def product_in(folder: Path) -> Path | None:
    """The product that a run folder belongs to, next to it; None if it does not say.

    ``NAME.pt`` and ``NAME.safetensors`` have one folder. A folder that was renamed along with its product is
    still that one's, so of the recorded file name the ending tells. Folders of older versions record none.
    """
    try:
        recorded = (folder / _PRODUCT).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder.with_name(f"{folder.stem}{Path(recorded).suffix}") if recorded else None


class RunFolder:
    """Paths in the run folder of the product ``output``, and what is written there."""

    def __init__(self, output: Path, tables: Tables) -> None:
        self.path = output.with_name(f"{output.stem}.run")
        self._product = output
        self._tables = tables
        # Checkpoints: the last completed epoch, with all that resuming needs; what worker processes start
        # from; the best epoch so far, of a training that was interrupted.
        self.last = self.path / "last.pt"
        self.start = self.path / "start.pt"
        self.best = self.path / "best.pt"

    def refuse_earlier(self, *, force: bool) -> None:
        """Refuse to overwrite the completed epochs of an earlier training.

        Raises:
            CheckpointError: naming the options that resume it or start again.
        """
        if not self.last.exists() or force:
            return
        other = self.other_product()
        if other is not None:
            raise CheckpointError(
                f"{self.path} holds the training of {other}, which --force would delete; another -o keeps it"
            )
        raise CheckpointError(
            f"{self.path} holds an earlier training; --resume goes on with it, --force starts anew"
        )

    def other_product(self) -> Path | None:
        """The product whose training the folder holds, if that is known to be another one than ``output``."""
        product = product_in(self.path) if self.last.exists() else None
        return None if product == self._product else product

    def refuse_other_product(self) -> None:
        """Refuse to resume the training of another product.

        Raises:
            CheckpointError: naming both.
        """
        other = self.other_product()
        if other is not None:
            raise CheckpointError(
                f"{self.path} holds the training of {other}, not of {self._product}: --resume -o {other} "
                "goes on with it"
            )

    def refuse_reading(self, read: Iterable[NamedFile]) -> None:
        """Refuse to begin a training that would delete what it reads: a file of the earlier one here.

        Raises:
            CheckpointError: naming the file.
        """
        ours = self.path.resolve()
        for file in read:
            path = file.path.resolve()
            inside = path.relative_to(ours).parts if path.is_relative_to(ours) else ()
            if inside and any(fnmatchcase(inside[0], pattern) for pattern in _OURS):
                raise CheckpointError(
                    f"{file.path} is in the run folder of {self.path.stem}, which a new training empties; "
                    "--resume goes on with that training, another -o keeps it"
                )

    def begin(self, device: torch.device, *, resume: bool) -> None:
        """Make the folder, empty it unless resuming, and write the command and the environment."""
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file; the run folder cannot be made there")
        with self._writing():
            if not resume:
                self._clean()
            self.path.mkdir(exist_ok=True)
            (self.path / _PRODUCT).write_text(f"{self._product.name}\n", encoding="utf-8")
            # Appended, because a resumed training has several commands.
            with (self.path / "command.txt").open("a", encoding="utf-8") as stream:
                stream.write(f"{shlex.join(sys.argv)}\n")
            text = json.dumps(_environment(device), indent=2)
            (self.path / "environment.json").write_text(f"{text}\n", encoding="utf-8")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an OSError into a CheckpointError that names the folder."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"cannot write into {self.path}: {error.strerror or error}") from error

    def discard(self) -> None:
        """Remove what a training without a completed epoch wrote, and the folder if nothing else is in it."""
        if self.last.exists() or not self.path.is_dir():
            return
        with self._writing():
            self._clean()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def _clean(self) -> None:
        for pattern in _OURS:
            for found in self.path.glob(pattern):
                if found.is_dir():
                    shutil.rmtree(found)
                else:
                    found.unlink()

    def log(self, text: str) -> None:
        """Add a line with the time to ``log.txt``."""
        if self.path.is_dir():
            with self._writing(), (self.path / "log.txt").open("a", encoding="utf-8") as stream:
                stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def save(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write a checkpoint into the folder, replacing an earlier one of that name."""
        save(checkpoint, path, self._tables, overwrite=True)

    def load(self, path: Path) -> Checkpoint:
        """Read a checkpoint of the folder."""
        return load(path, self._tables)

    def keep_copy(self, epoch: int) -> None:
        """Copy ``last.pt`` to a name with the number of its epoch."""

        def copy(stream: IO[bytes]) -> None:
            with self.last.open("rb") as source:
                shutil.copyfileobj(source, stream)

        write_atomically(self.path / f"epoch-{epoch:04d}.pt", copy)


class LoggedReporter:
    """Passes everything to another reporter, and writes notes and warnings to ``log.txt``."""

    def __init__(self, reporter: Reporter, folder: RunFolder) -> None:
        self._reporter = reporter
        self._folder = folder

    def note(self, text: str) -> None:
        """Say something worth knowing."""
        self._folder.log(text)
        self._reporter.note(text)

    def warn(self, text: str) -> None:
        """Say something that may be wrong."""
        self._folder.log(f"warning: {text}")
        self._reporter.warn(text)

    def progress(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Pass ``items`` on and show how far it is, where someone looks."""
        return self._reporter.progress(items, description, total)


def _environment(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "cctool": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "variables": {
            key: os.environ[key] for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES") if key in os.environ
        },
    }
