"""Several networks side by side: which file is opened how, how they differ, and the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cctool.analysis.table import WHOLE, Cell, Column, Report, Table
from cctool.analysis.workbook import write_report
from cctool.base.errors import CctoolError, UsageError
from cctool.base.user_code import is_named
from cctool.models.registry import is_user_code
from cctool.operations.context import ShownTables, refuse_taken
from cctool.operations.inspect.compare import CompareReport, Difference, run, run_onnx
from cctool.operations.opening import recorded_architecture
from cctool.options.inspect.compare import CompareOptions
from cctool.options.paths import INPUT, NamedFile
from cctool.tasks.base import LOSS, Measure, main_measure
from cctool.tasks.shares import difference_interval, interval_text, mcnemar

_LEVEL = 0.05


@dataclass(frozen=True)
class Opening:
    """How a file is compared.

    Attributes:
        file: its path as given.
        opened: the checkpoint that is opened: itself, or for an ONNX file the first checkpoint.
        arch: the architecture that the command line names for that checkpoint.
        operation: carries it out.
    """

    file: str
    opened: str
    arch: str | None
    operation: Callable[..., CompareReport]


@dataclass(frozen=True)
class Compared:
    """A row: the file, its bytes, and what was measured."""

    file: str
    bytes: int | None
    report: CompareReport


def is_onnx(file: str) -> bool:
    """Whether a file is an ONNX file, by its name."""
    return file.lower().endswith(".onnx")


def entries(files: Sequence[str], options: CompareOptions, *, force: bool) -> tuple[Opening, ...]:
    """Say how each file is opened.

    An ONNX file is run on the data, and with the preprocessing, of the first checkpoint.

    Raises:
        UsageError: if there are ONNX files only, or an architecture that no file records.
        CheckpointError: if a file cannot be read, or one to be written exists.
    """
    refuse_written(options, files, force=force)
    checkpoints = [file for file in files if not is_onnx(file)]
    if not checkpoints:
        raise UsageError(
            f"{files[0]} does not say how its inputs are normalised: name a checkpoint, too, whose data and "
            "preprocessing it is run with"
        )
    archs = _matched(checkpoints, options.arch)
    first = checkpoints[0]
    return tuple(
        Opening(file, opened, archs[opened], operation_for(file))
        for file in files
        for opened in [first if is_onnx(file) else file]
    )


def operation_for(file: str) -> Callable[..., CompareReport]:
    """What measures a file: a checkpoint itself, or an ONNX file with the help of one."""
    return partial(run_onnx, Path(file)) if is_onnx(file) else run


def refuse_written(options: CompareOptions, files: Sequence[str], *, force: bool) -> None:
    """Refuse files to write that exist, or are among the compared ones.

    Raises:
        CheckpointError: naming the file.
    """
    asked = tuple(Path(path) for path in (options.csv, options.xlsx) if path is not None)
    refuse_taken(asked, [NamedFile(INPUT, Path(file)) for file in files], force=force)


def _matched(files: Sequence[str], archs: tuple[str, ...]) -> dict[str, str | None]:
    """The architecture of the command line for each file."""
    if not archs:
        return dict.fromkeys(files)
    recorded = {file: recorded_architecture(Path(file)) for file in files}
    found = {file: _recorded_as(name, archs) for file, name in recorded.items()}
    left = [arch for arch in archs if arch not in found.values()]
    for file, name in recorded.items():
        if found[file] is None:
            found[file] = _left_for(file, name, archs, left)
    unused = [arch for arch in archs if arch not in found.values()]
    if unused:
        known = ", ".join(sorted({name for name in recorded.values() if name is not None})) or "none"
        raise UsageError(f"--arch {unused[0]}: no file records this architecture (recorded: {known})")
    return found


def _recorded_as(recorded: str | None, archs: tuple[str, ...]) -> str | None:
    """The architecture that a file records, as the command line names it; the user's file may have moved."""
    if recorded is None:
        return None
    same = [arch for arch in archs if arch == recorded or is_named(recorded, (arch,))]
    if same or not is_user_code(recorded):
        return same[0] if same else None
    moved = [arch for arch in archs if is_user_code(arch) and Path(arch).name == Path(recorded).name]
    return moved[0] if len(moved) == 1 else None


def _left_for(file: str, recorded: str | None, archs: tuple[str, ...], left: Sequence[str]) -> str | None:
    """The architecture for a file that records none, or user code of another name."""
    if recorded is not None:
        # As in the other commands, where the user's function may have another name by now.
        renamed = is_user_code(recorded) and len(archs) == len(left) == 1 and is_user_code(left[0])
        return left[0] if renamed else None
    if len(left) == 1 or len(archs) == 1:
        return (left or archs)[0]
    raise UsageError(
        f"{file} does not say which network it holds: one --arch is needed for it that no other file records"
    )


@contextmanager
def blamed_on(file: str) -> Iterator[None]:
    """Let errors name the file that they are about."""
    try:
        yield
    except CctoolError as error:
        if file in str(error):
            raise
        # Of the same class, which decides the exit status.
        raise type(error)(f"{file}: {error}") from error


def compared(
    rows: Sequence[Compared], options: CompareOptions, *, force: bool
) -> tuple[tuple[Compared, ...], tuple[str, ...]]:
    """Say how each network differs from the first, and write the files that the options ask for.

    Returns:
        The rows, and the paths of the files.

    Raises:
        CheckpointError: if a file exists, or cannot be written.
    """
    if not rows:
        return (), ()
    first = rows[0].report
    told = tuple(
        replace(row, report=replace(row.report, differences=_differences(first, row.report) if i else ()))
        for i, row in enumerate(rows)
    )
    paths = tuple(path for path in (options.csv, options.xlsx) if path is not None)
    for path in paths:
        write_report(_sheet(told), Path(path), overwrite=force)
    return told, paths


def _differences(first: CompareReport, other: CompareReport) -> tuple[Difference, ...]:
    if first.metrics is None or other.metrics is None:
        return ()
    found = []
    for name in (name for name in first.intervals if name in other.intervals):
        before, after = first.metrics.values[name], other.metrics.values[name]
        one, two = first.samples, other.samples
        if one is not None and two is not None and one.key == two.key:
            only_first = int((one.hits[name] & ~two.hits[name]).sum())
            only_this = int((two.hits[name] & ~one.hits[name]).sum())
            p = mcnemar(only_first, only_this)
            made = Difference(name, after - before, p >= _LEVEL, "mcnemar", p, only_first, only_this)
        else:
            low, high = difference_interval(before, first.metrics.n, after, other.metrics.n)
            made = Difference(name, after - before, low <= 0 <= high, "newcombe")
        found.append(made)
    return tuple(found)


def remarks(rows: Sequence[Compared]) -> list[str]:
    """A sentence for each network that is not told apart from the first by its task's main measure."""
    said = []
    for row in rows[1:]:
        main = main_measure(row.report.judge)
        for found in row.report.differences:
            if found.measure != main.name or not found.within:
                continue
            test = "McNemar's exact test" if found.p is not None else "unpaired, Newcombe's interval"
            how = test if found.p is None else f"{test}, p = {found.p:.2g}"
            said.append(
                f"{row.file}: {main.title} differs from {rows[0].file}'s by {found.points:+.2f} points, "
                f"within the 95 % interval ({how})"
            )
    return said


def tables(rows: Sequence[Compared]) -> ShownTables:
    """A table of what was measured, and one of sizes and times."""
    return [_measured_table(rows), _size_table(rows)]


def _mains(rows: Sequence[Compared]) -> list[Measure]:
    """By what each network is judged, the main measure of each task, and the loss."""
    mains = {
        measure.name: measure
        for row in rows
        for measure in (row.report.main, main_measure(row.report.judge), LOSS)
    }
    mains[LOSS.name] = mains.pop(LOSS.name)
    return list(mains.values())


def _value(report: CompareReport, measure: Measure) -> float | None:
    return None if report.metrics is None else report.metrics.values.get(measure.name)


def _measured_table(rows: Sequence[Compared]) -> tuple[str, list[str], list[list[object]]]:
    columns = ["file", "steps", "n"]
    lines: list[list[object]] = [
        [row.file, " > ".join(row.report.verbs) or None, row.report.metrics.n if row.report.metrics else None]
        for row in rows
    ]
    for measure in _mains(rows):
        percent = measure.unit == "%"
        columns += [f"{measure.title} {measure.unit}".rstrip(), *(["95 %"] if measure.share else [])]
        for line, row in zip(lines, rows, strict=True):
            value = _value(row.report, measure)
            line.append(f"{value:.2f}" if percent and value is not None else value)
            if measure.share:
                known = row.report.intervals.get(measure.name)
                line.append(None if known is None else interval_text(*known))
    return "", columns, lines


def _size_table(rows: Sequence[Compared]) -> tuple[str, list[str], list[list[object]]]:
    timed = any(row.report.milliseconds is not None for row in rows)
    columns = ["file", "parameters", "MACs", "bytes", "smaller", *(["ms"] if timed else [])]
    lines: list[list[object]] = []
    for row in rows:
        report = row.report
        smaller = _smaller(rows[0], row)
        line: list[object] = [row.file, report.parameters, report.macs, row.bytes]
        line.append(None if smaller is None else f"{smaller:.2f}x")
        if timed:
            line.append(None if report.milliseconds is None else f"{report.milliseconds:.3g}")
        lines.append(line)
    return "", columns, lines


def _smaller(first: Compared, row: Compared) -> float | None:
    return None if not first.bytes or not row.bytes else first.bytes / row.bytes


def _sheet(rows: Sequence[Compared]) -> Report:
    """All figures, a row a network."""
    measures = {m.name: m for row in rows for m in (row.report.main, *row.report.judge.measures, LOSS)}
    columns = [
        Column("file", "file", "Path of the file."),
        Column("architecture", "architecture", "Reference of its architecture."),
        Column("steps", "steps", "Commands that led to it."),
        Column("data", "data", "Data set that it was measured on."),
        Column("split", "split", "Part of the data set."),
        Column("n", "n", "Number of samples.", WHOLE),
    ]
    for measure in measures.values():
        unit = f" ({measure.unit})" if measure.unit else ""
        columns.append(Column(measure.name, f"{measure.title}{unit}", f"Its {measure.title}.", "0.0000"))
        if measure.share:
            columns += [
                Column(f"{measure.name}_{end}", f"{measure.title} {end}", meaning, "0.00")
                for end, meaning in (
                    ("low", "Low end of the 95 % Wilson score interval."),
                    ("high", "High end of the 95 % Wilson score interval."),
                    ("p", "McNemar's exact test against the first network, on the same samples."),
                )
            ]
    columns += [
        Column("parameters", "parameters", "Scalar parameters.", WHOLE),
        Column("macs", "MACs", "Multiply-accumulates of one input.", WHOLE),
        Column("bytes", "bytes", "Bytes of the file.", WHOLE),
        Column("dense_bytes", "dense bytes", "Bytes of all tensors as they compute.", WHOLE),
        Column("stored_bytes", "stored bytes", "Bytes of all tensors as the file stores them.", WHOLE),
        Column("smaller", "smaller", "Bytes of the first file over those of this one.", "0.00"),
        Column("ms", "ms", "Median milliseconds of a batch of one, if it was measured.", "0.000"),
    ]
    lines = tuple(_sheet_row(rows[0], row, list(measures.values())) for row in rows)
    return Report("Comparison", Table("Comparison", tuple(columns), lines))


def _sheet_row(first: Compared, row: Compared, measures: Sequence[Measure]) -> tuple[Cell, ...]:
    report, metrics = row.report, row.report.metrics
    cells: list[Cell] = [row.file, report.architecture, " > ".join(report.verbs), report.data]
    cells += [None, None] if metrics is None else [metrics.split, metrics.n]
    tests = {found.measure: found.p for found in report.differences}
    for measure in measures:
        cells.append(_value(report, measure))
        if measure.share:
            cells += [*report.intervals.get(measure.name, (None, None)), tests.get(measure.name)]
    size = report.size
    cells += [report.parameters, report.macs, row.bytes, size.dense_bytes, size.stored_bytes]
    return (*cells, _smaller(first, row), report.milliseconds)
