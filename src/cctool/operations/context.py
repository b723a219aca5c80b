"""What every operation gets with its checkpoint and options, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cctool import __version__
from cctool.base.errors import CheckpointError
from cctool.base.runtime import Reporter
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics, Parent, Signal, Step
from cctool.checkpoint.tables import Tables
from cctool.options.common import ModelOptions, RuntimeOptions, TaskOptions
from cctool.options.paths import NamedFile, refuse_same_files
from cctool.tasks.table import measure_named

if TYPE_CHECKING:
    from cctool.data.records import DataSource


Told = str | tuple[str, Sequence[str], Sequence[Sequence[object]]]
"""A part of a report as people read it: a sentence, or title, columns and rows of a table."""

ShownTables = Sequence[tuple[str, Sequence[str], Sequence[Sequence[object]]]]
"""Title, columns and rows of each table that a command shows of its report."""


@dataclass(frozen=True)
class Outcome:
    """One product of an operation.

    Attributes:
        checkpoint: the result, without the new line of history, which the pipeline adds.
        report: a frozen dataclass that becomes JSON.
        label: distinguishes several products of one command in their file names, as ``step1``.
        metrics_before: of the input network.
        metrics_after: of the result.
        notes: what was not done, and why.
        others: other files that were read, by role.
        continues: after a resumed training, the unfinished line of history that the new one replaces; its
            parent and size before are kept. It must not be in ``checkpoint.history`` too.
        signal: what a quantization left of the outputs' signal.
    """

    checkpoint: Checkpoint
    report: Any
    label: str = ""
    metrics_before: tuple[Metrics, ...] = ()
    metrics_after: tuple[Metrics, ...] = ()
    notes: tuple[str, ...] = ()
    others: Mapping[str, Parent] = field(default_factory=dict)
    continues: Step | None = None
    signal: Signal | None = None


@dataclass(frozen=True)
class Context:
    """Where an operation runs.

    Attributes:
        device: where it computes.
        runtime: precision, seed and determinism.
        model_options: how networks are named on the command line.
        tables: registries for loading and saving.
        user_code: references of the user's functions that are named on this command line.
        reporter: prints notes, warnings and progress.
        output: path of the product.
        force: whether existing files may be replaced.
        stamp: outcome -> its checkpoint with the line of history that the pipeline would add; for files
            that are written before the operation ends.
        opened: the data set that the command line names, if it was opened before there was a network.
        asked: what the command line says about the task, and the user's loss and metric.
        judges: how networks are judged, by their task; filled by `task.judge_of`.
        said: notes that are given once in a command.
        read: the files that the command reads, which it must not replace.
        given: keywords of the options that were given, and not left at their defaults.
    """

    device: torch.device
    runtime: RuntimeOptions
    model_options: ModelOptions
    tables: Tables
    user_code: frozenset[str]
    reporter: Reporter
    output: Path
    force: bool
    stamp: Callable[[Outcome], Checkpoint]
    opened: DataSource | None = None
    asked: TaskOptions = field(default_factory=TaskOptions)
    judges: dict[Any, Any] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    read: tuple[NamedFile, ...] = ()
    given: frozenset[str] = frozenset()

    def say_once(self, note: str) -> None:
        """Give a note, unless this command gave it before."""
        if note not in self.said:
            self.said.add(note)
            self.reporter.note(note)


def beside(source: Path, suffix: str) -> Path:
    """The path of a file next to the input, as `student.pt` -> `student.onnx`."""
    return source.with_name(f"{source.stem}{suffix}")


def refuse_existing(paths: tuple[Path, ...], context: Context) -> None:
    """Refuse to start work whose result could not be written.

    Raises:
        CheckpointError: if a path exists and may not be replaced, or its folder does not exist.
    """
    refuse_taken(paths, context.read, force=context.force)


def refuse_taken(paths: tuple[Path, ...], read: Sequence[NamedFile], *, force: bool) -> None:
    """Refuse paths that may not be written: `refuse_existing` for a command of several inputs.

    Raises:
        CheckpointError: if a path exists and ``force`` is false, is read, or its folder does not exist.
        UsageError: if two paths are the same.
    """
    refuse_same_files(read, (NamedFile("this command", path) for path in paths))
    for path in paths:
        if path.exists() and not force:
            raise CheckpointError(f"{path} exists already; --force replaces it")
        if not path.parent.is_dir():
            raise CheckpointError(f"{path}: the folder {path.parent} does not exist; create it first")


def header(checkpoint: Checkpoint, counted: tuple[str, str]) -> list[tuple[str, str]]:
    """Name and value of each line of a workbook's header: what it is about, ``counted`` included."""
    spec, origin = checkpoint.spec, checkpoint.origin
    arguments = ", ".join(f"{key}={value}" for key, value in spec.arguments.items())
    verbs = " > ".join(step.verb for step in checkpoint.history) or "none"
    notes = [("Network", f"{spec.architecture}({arguments})"), counted, ("History", verbs)]
    if origin is not None:
        notes += [("File", origin.path), ("SHA-256 of the file", origin.file)]
    return [*notes, ("Written by", f"cctool {__version__}")]


def metric_lines(before: Sequence[Metrics], after: Sequence[Metrics]) -> Iterator[str]:
    """One line for each metric and split: its value before and after."""
    earlier = {metrics.split: metrics for metrics in before}
    for metrics in after:
        for name, value in metrics.values.items():
            old = earlier[metrics.split].values.get(name) if metrics.split in earlier else None
            change = f"{old:.4g} -> " if old is not None else ""
            measure = measure_named(name)
            yield f"{metrics.split} {measure.title} {change}{measure.shown(value)} (n={metrics.n:,})"
