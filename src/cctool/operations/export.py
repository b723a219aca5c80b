"""`cctool export`: write the network for other programs, and verify what was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from cctool.analysis.sparsity import nonfinite
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.errors import CheckpointError, ExportError
from cctool.formats.records import ExportRequest, Samples, Written
from cctool.formats.table import FORMATS
from cctool.operations.context import Context
from cctool.operations.sources import open_source
from cctool.options.common import DataOptions
from cctool.options.export import DEFAULT_SUFFIXES, ExportFormat, ExportOptions

if TYPE_CHECKING:
    from cctool.data.records import DataSource

__all__ = ["ExportReport", "beside", "export", "refuse_existing", "run", "samples_of"]


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        architecture: of the network.
        input_shape: (C, H, W) that it was exported for.
        files: what was written, with how it was verified.
    """

    architecture: str
    input_shape: tuple[int, int, int]
    files: tuple[Written, ...]


def run(checkpoint: Checkpoint, options: ExportOptions, context: Context) -> ExportReport:
    """Export a checkpoint.

    Raises:
        CheckpointError: if the output exists, or cannot be written, or weights are not finite.
        ExportError: if the exported model does not compute what the model does; no file is left.
    """
    kind = options.effective_format
    path = Path(options.output) if options.output else beside(context.output, DEFAULT_SUFFIXES[kind])
    refuse_existing((path,), context)
    written = export(checkpoint, kind, path, options.data, context, allow_nonfinite=options.allow_nonfinite)
    return ExportReport(checkpoint.spec.architecture, checkpoint.spec.input_shape, (written,))


def export(
    checkpoint: Checkpoint,
    kind: ExportFormat,
    path: Path,
    data: DataOptions,
    context: Context,
    *,
    allow_nonfinite: bool = False,
) -> Written:
    """Write one file in one format, verified on the data where there is any.

    Raises:
        ExportError: if weights are not finite and ``allow_nonfinite`` is false, or the file is wrong.
    """
    if not allow_nonfinite:
        _refuse_nonfinite(checkpoint)
    samples = samples_of(checkpoint, data, context) if kind is ExportFormat.ONNX else None
    request = ExportRequest(
        checkpoint=checkpoint,
        path=path,
        input_shape=checkpoint.spec.input_shape,
        samples=samples,
        seed=context.runtime.seed,
        overwrite=context.force,
        allow_nonfinite=allow_nonfinite,
    )
    written = FORMATS[kind](request)
    for note in written.notes:
        context.reporter.note(f"{path.name}: {note}")
    return written


def beside(source: Path, suffix: str) -> Path:
    """Replace the suffix of the input's name, as in `student.pt` -> `student.onnx`."""
    return source.with_name(f"{source.stem}{suffix}")


def refuse_existing(paths: tuple[Path, ...], context: Context) -> None:
    """Refuse to start work whose result could not be written.

    Raises:
        CheckpointError: if a path exists and may not be replaced, or its folder does not exist.
    """
    for path in paths:
        if path.exists() and not context.force:
            raise CheckpointError(f"{path} exists already; --force replaces it")
        if path.exists() and path.samefile(context.output):
            raise CheckpointError(f"{path} is the input itself; name another file")
        if not path.parent.is_dir():
            raise CheckpointError(f"{path}: the folder {path.parent} does not exist; create it first")


def samples_of(checkpoint: Checkpoint, options: DataOptions, context: Context) -> Samples | None:
    """Preprocessed images to compare on, from the data named or the checkpoint's last; None without."""
    source = open_source(options, checkpoint, context)
    if source is None:
        return None
    split = next(name for name in ("test", "validation", "train") if name in source.loaders)
    return Samples(f"{source.reference}, {split} split", _images(source, split, checkpoint, options))


def _images(source: DataSource, split: str, checkpoint: Checkpoint, options: DataOptions) -> Iterator[Tensor]:
    from cctool.data.batches import batches

    known = checkpoint.spec.preprocessing
    found = batches(
        source.split(split),
        batch_size=options.batch_size,
        mean=known.mean if known else source.mean,
        std=known.std if known else source.std,
        workers=options.workers,
    )
    for batch in found:
        yield batch.images


def _refuse_nonfinite(checkpoint: Checkpoint) -> None:
    found = nonfinite(checkpoint.model)
    if found:
        bad = sum(fault.nan + fault.infinite for fault in found)
        raise ExportError(
            f"INPUT holds {bad:,} NaN or infinite values in {len(found)} tensors, {found[0].name} first; "
            "`cctool analyze` lists them all, --allow-nonfinite exports them all the same"
        )
