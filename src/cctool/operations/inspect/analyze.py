"""`cctool analyze`: what a checkpoint holds, what it computes, and how it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cctool.analysis.crosscheck import CrossCheck, check_against_thop
from cctool.analysis.layers import LayerTable, tabulate
from cctool.analysis.sheets import macs_report, sparsity_report
from cctool.analysis.sparsity import NonFinite, TensorSparsity, nonfinite, sparsity
from cctool.analysis.table import Report
from cctool.analysis.workbook import write_report
from cctool.base.errors import ExportError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec, Parent, Step
from cctool.formats.records import Written
from cctool.graph.cost import measure
from cctool.operations.context import Context, beside, header, refuse_existing
from cctool.operations.data import say_unlooked_at
from cctool.operations.inspect.export import export
from cctool.options.inspect.analyze import AnalyzeOptions, View
from cctool.options.inspect.export import ExportFormat
from cctool.transforms.plain import plain_model


@dataclass(frozen=True)
class Analysis:
    """Counts of a network.

    Attributes:
        layers: a row for each layer, with totals.
        sparsity: a row for each weight.
        cross_check: thop's figures compared with these.
    """

    layers: LayerTable
    sparsity: tuple[TensorSparsity, ...]
    cross_check: CrossCheck


@dataclass(frozen=True)
class AnalyzeReport:
    """The report on a checkpoint.

    Attributes:
        source: name and hashes of the file; None for a fresh network.
        spec: how to build it; counts are for its input size.
        history: the steps that led to it, oldest first.
        nonfinite: tensors that hold NaN or infinities.
        analysis: counts; None if only history or spec was asked for.
        written: files.
    """

    source: Parent | None
    spec: ModelSpec
    history: tuple[Step, ...]
    nonfinite: tuple[NonFinite, ...]
    analysis: Analysis | None = None
    written: tuple[Written, ...] = field(default=())


def run(checkpoint: Checkpoint, options: AnalyzeOptions, context: Context) -> AnalyzeReport:
    """Analyze a checkpoint and write the files that the options ask for.

    Raises:
        ArchitectureError: if the network does not run on its input size.
        CheckpointError: if a file exists already, or cannot be written.
        ExportError: if the ONNX file is refused; other files are kept, and named.
    """
    targets = _targets(options, context)
    refuse_existing(tuple(targets.values()), context)
    if "onnx" not in targets:
        say_unlooked_at("samples are for comparing the file of --onnx", context)
    faults = nonfinite(checkpoint.model)
    if faults:
        bad = sum(fault.nan + fault.infinite for fault in faults)
        context.reporter.warn(f"{bad:,} NaN or infinite values in {len(faults)} tensors")
    analysis = _analyze(checkpoint) if options.view is View.LAYERS or targets else None
    written = []
    if analysis is not None:
        for kind, report in _reports(checkpoint, analysis, faults).items():
            if kind in targets:
                write_report(report, targets[kind], overwrite=context.force)
                written.append(Written(str(targets[kind]), kind, targets[kind].stat().st_size))
    if "onnx" in targets:
        written.insert(0, _exported(checkpoint, targets["onnx"], options, context, kept=written))
    return AnalyzeReport(
        source=checkpoint.origin,
        spec=checkpoint.spec,
        history=checkpoint.history,
        nonfinite=faults,
        analysis=analysis,
        written=tuple(written),
    )


def _exported(
    checkpoint: Checkpoint, path: Path, options: AnalyzeOptions, context: Context, *, kept: list[Written]
) -> Written:
    """The ONNX file; a refusal says which files of the command were written all the same."""
    try:
        return export(checkpoint, ExportFormat.ONNX, path, options.data, context)
    except ExportError as error:
        if not kept:
            raise
        names = " and ".join(file.path for file in kept)
        raise ExportError(f"{error}; {names} {'was' if len(kept) == 1 else 'were'} written") from error


def _targets(options: AnalyzeOptions, context: Context) -> dict[str, Path]:
    """Paths of the files to write, by kind."""
    asked = (
        ("onnx", options.onnx, options.onnx_file, ".onnx"),
        ("macs", options.macs, options.macs_file, ".macs.xlsx"),
        ("sparsity", options.sparsity, options.sparsity_file, ".sparsity.xlsx"),
    )
    targets = {
        kind: Path(named) if named else beside(context.output, suffix)
        for kind, wanted, named, suffix in asked
        if wanted or named
    }
    paths = [path.resolve() for path in targets.values()]
    if len(set(paths)) < len(paths):
        raise UsageError(f"two files would have one name: {', '.join(map(str, targets.values()))}")
    return targets


def _analyze(checkpoint: Checkpoint) -> Analysis:
    shape, plain = checkpoint.spec.input_shape, plain_model(checkpoint.model)
    cost = measure(plain, shape)
    return Analysis(
        layers=tabulate(checkpoint, cost),
        sparsity=sparsity(checkpoint.model),
        cross_check=check_against_thop(plain, shape, cost),
    )


def _reports(checkpoint: Checkpoint, analysis: Analysis, faults: tuple[NonFinite, ...]) -> dict[str, Report]:
    shape, origin = "x".join(map(str, checkpoint.spec.input_shape)), checkpoint.origin
    notes = header(checkpoint, ("Input counted", f"{shape}, batch of one"))
    if origin is not None and origin.content is not None:
        notes.insert(-1, ("SHA-256 of the content", origin.content))
    return {
        "macs": macs_report(analysis.layers, analysis.cross_check, tuple(notes)),
        "sparsity": sparsity_report(analysis.sparsity, faults, tuple(notes)),
    }
