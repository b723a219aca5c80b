"""`cctool export`: write the network for other programs, and verify what was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from cctool.analysis.sparsity import nonfinite
from cctool.base.errors import ExportError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.formats.records import ExportRequest, Samples, Written
from cctool.formats.table import FORMATS
from cctool.operations.context import Context, beside, refuse_existing
from cctool.operations.data import open_source, say_unlooked_at
from cctool.operations.inspect.export_networks import Converted, bare_checkpoint, converted, quantizer_notes
from cctool.operations.judge.task import judge_of
from cctool.operations.keep import events
from cctool.options.common import DataOptions
from cctool.options.inspect.export import DEFAULT_SUFFIXES, ExportFormat, ExportOptions
from cctool.quantization.network.attach import quantizers_of
from cctool.transforms.codec.taps import taps_of
from cctool.transforms.layers.base import swapped_layers
from cctool.transforms.plain import plain_model

if TYPE_CHECKING:
    from cctool.data.records import DataSource, Split


# Formats that hold the computation, and not the tensors alone.
_PROGRAMS = (ExportFormat.ONNX, ExportFormat.PT2)


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        architecture: of the network.
        input_shape: (C, H, W) that it was exported for.
        files: that were written, with the result of their verification.
    """

    architecture: str
    input_shape: tuple[int, int, int]
    files: tuple[Written, ...]


def run(checkpoint: Checkpoint, options: ExportOptions, context: Context) -> ExportReport:
    """Export a checkpoint.

    Raises:
        CheckpointError: if the output exists, or cannot be written, or weights are not finite.
        ExportError: if the exported model does not compute the same as the network; no file is left then.
    """
    kind = options.effective_format
    path = Path(options.output) if options.output else beside(context.output, DEFAULT_SUFFIXES[kind])
    refuse_existing((path,), context)
    if kind not in _PROGRAMS:
        say_unlooked_at(f"the tensors of a {kind} file are compared without samples", context)
    written = export(
        checkpoint,
        kind,
        path,
        options.data,
        context,
        allow_nonfinite=options.allow_nonfinite,
        codec=not options.without_codec,
        int4=options.int4,
    )
    return ExportReport(checkpoint.spec.architecture, checkpoint.spec.input_shape, (written,))


def export(
    checkpoint: Checkpoint,
    kind: ExportFormat,
    path: Path,
    data: DataOptions,
    context: Context,
    *,
    allow_nonfinite: bool = False,
    codec: bool = True,
    int4: bool = False,
) -> Written:
    """Write one file in one format, and verify it on the data set if there is one.

    Swapped layers become ordinary ones, or products of small factors. In ONNX and PT2 codecs become
    arithmetic; in ONNX quantized weights become integers.

    Args:
        checkpoint: to write.
        kind: the format.
        path: of the file.
        data: whose images the outputs are compared on.
        context: of the command.
        allow_nonfinite: write even NaN or infinite weights.
        codec: whether an ONNX or PT2 file codes the maps of taps.
        int4: whether an ONNX file packs two weights of 4 or fewer bits into a byte.

    Raises:
        ExportError: if weights are not finite and ``allow_nonfinite`` is false, or verification fails.
    """
    if not allow_nonfinite:
        _refuse_nonfinite(checkpoint)
    program = kind in _PROGRAMS
    samples = samples_of(checkpoint, data, context) if program else None
    if program:
        checkpoint = events.for_programs(checkpoint)
    taps = len(taps_of(checkpoint.model))
    if taps and not (codec and program):
        checkpoint = events.plain_checkpoint(checkpoint, ["tap"])
    made = converted(checkpoint, kind, codec=codec) if program else Converted(None)
    request = ExportRequest(
        checkpoint=checkpoint if program else bare_checkpoint(checkpoint),
        path=path,
        input_shape=checkpoint.spec.input_shape,
        samples=samples,
        seed=context.runtime.seed,
        overwrite=context.force,
        allow_nonfinite=allow_nonfinite,
        network=made.network,
        coded=bool(taps) and codec,
        weights=made.weights,
        quantized=quantizers_of(checkpoint.model) is not None,
        packed=int4,
        task=judge_of(checkpoint, context).task,
        reporter=context.reporter,
    )
    written = FORMATS[kind](request)
    notes = (
        *written.notes,
        *made.notes,
        *quantizer_notes(checkpoint, kind),
        *_transform_notes(checkpoint, taps, kind, codec=codec),
    )
    if int4 and not any(weight.bits <= 4 for weight in made.weights):
        notes = (*notes, "--int4: the network has no weights of 4 bits or fewer")
    written = replace(written, notes=notes)
    for note in notes:
        context.reporter.note(f"{path.name}: {note}")
    return written


def _transform_notes(
    checkpoint: Checkpoint, taps: int, kind: ExportFormat, *, codec: bool
) -> tuple[str, ...]:
    """Notes on what became of swapped layers and taps."""
    notes = []
    layers, strange = swapped_layers(checkpoint.model), swapped_layers(plain_model(checkpoint.model))
    if strange:
        notes.append(f"{len(strange)} layers of complex numbers are written by their own parameters")
    layers = {name: layer for name, layer in layers.items() if name not in strange}
    if layers:
        factored = sum(layer.factored() is not None for layer in layers.values())
        small = f"{factored} as small factors, " if factored and kind in _PROGRAMS else ""
        notes.append(f"{len(layers)} swapped layers are written {small}as the weights that they make")
    if taps and kind not in _PROGRAMS:
        notes.append(f"{taps} codecs are left out: they are no tensors of the network")
    elif taps:
        notes.append(f"{taps} codecs are {'part of the network' if codec else 'left out'}")
    elif not codec:
        notes.append("--without-codec: the network has none")
    return tuple(notes)


def samples_of(checkpoint: Checkpoint, options: DataOptions, context: Context) -> Samples | None:
    """Preprocessed images to compare outputs on; None without data."""
    source = open_source(options, checkpoint, context)
    if source is None:
        return None
    # Images that the network was not trained on, if there are any.
    split = next(name for name in ("test", "validation", "train") if name in source.loaders)
    served = source.split(split)
    if served.loaded is None:
        served = served.take(_spread(len(served)))
    images = _images(served, source, checkpoint, options)
    return Samples(f"{source.reference}, {split} split", images, len(served))


def _spread(count: int) -> list[int]:
    """Indices in an order whose every beginning is spread evenly over all of them.

    They are sorted by the fractional parts of multiples of the golden ratio. A comparison that stops early
    has then seen all classes of a data set that is sorted by class.
    """
    golden = (5**0.5 - 1) / 2
    return sorted(range(count), key=lambda index: index * golden % 1)


def _images(
    split: Split, source: DataSource, checkpoint: Checkpoint, options: DataOptions
) -> Iterator[Tensor]:
    from cctool.data.serving.batches import batches

    known = checkpoint.spec.preprocessing
    found = batches(
        split,
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
