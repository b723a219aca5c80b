"""Load, run, record, write: done once, for every verb.

    INPUT or --arch -> Checkpoint -> operation.run -> Outcome(s) -> + one line of history -> file

An operation never opens its input or writes its product: it gets a checkpoint and yields outcomes. Other
files (a run folder, a workbook) it writes itself.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cctool import __version__
from cctool.base.errors import CheckpointError, UsageError
from cctool.base.networks import copied, nonfinite
from cctool.base.runtime import Reporter, Silent, device_errors, resolve_device, seed_everything
from cctool.base.user_code import looks_like_user_code
from cctool.checkpoint.checkpoint import SUFFIXES, Checkpoint, save
from cctool.checkpoint.file.payload import content_hash
from cctool.checkpoint.spec import Parent, Preprocessing, Size, Step
from cctool.data.records import DataSource
from cctool.graph.execution import refuse_several_inputs
from cctool.models import registry
from cctool.operations.context import Context, Outcome
from cctool.operations.data import open_named, reference_of
from cctool.operations.judge.size import measure
from cctool.operations.judge.task import asked_of, with_task
from cctool.operations.keep import events
from cctool.operations.opening import DataShape, fresh, open_checkpoint, pretrained
from cctool.operations.registries import tables
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.fields import recorded
from cctool.options.paths import INPUT, PRODUCT, NamedFile, files_read, files_written, refuse_same_files


@dataclass(frozen=True)
class Request:
    """The options that every verb has.

    Attributes:
        verb: the command's name, part of the default output's name.
        source: path of the input; None builds a fresh network from ``model.arch``.
        output: path of the product; None for the default.
        force: replace existing files.
        allow_nonfinite: write even NaN or infinite weights.
        model: how the network is named.
        runtime: device, precision, seed.
        user_code: references of user functions, besides the architecture.
        reporter: prints notes, warnings and progress.
        resumes: whether the command continues its earlier run, whose product it may replace.
        said: notes that were given already, for a command that is carried out for several files.
        given: keywords of the options that were given, and not left at their defaults.
    """

    verb: str
    source: str | None
    output: str | None = None
    force: bool = False
    allow_nonfinite: bool = False
    model: ModelOptions = field(default_factory=ModelOptions)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    user_code: tuple[str, ...] = ()
    reporter: Reporter = field(default_factory=Silent)
    resumes: bool = False
    said: set[str] = field(default_factory=set)
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Product:
    """A file that was written: path, content hash, SHA-256 of the file, new line of history, report."""

    path: str
    content: str | None
    file: str
    step: Step
    report: Any


Operation = Callable[[Checkpoint, Any, Context], Iterator[Outcome]]
"""(checkpoint, options, context) -> outcomes."""


def write(operation: Operation, options: Any, request: Request) -> Iterator[Product]:
    """Run an operation that writes checkpoints, and write each outcome as soon as it is yielded.

    Raises:
        UsageError: if the output has an unknown suffix, or two files would have one name.
        CheckpointError: if the input cannot be read, an output exists, or is a file that the command reads.
    """
    output = _output(request)
    checkpoint, context = _prepare(options, request, output, product=output)
    for finished, outcome in _finished(operation, options, request, checkpoint, context):
        path = labelled(output, outcome.label)
        # A step of several may have INPUT's name, though the product as it was named has not.
        refuse_same_files(context.read, [NamedFile(PRODUCT, path)])
        parent = save(finished, path, context.tables, overwrite=request.force or request.resumes)
        yield Product(str(path), parent.content, parent.file, finished.history[-1], outcome.report)


def _finished(
    operation: Operation, options: Any, request: Request, checkpoint: Checkpoint, context: Context
) -> Iterator[tuple[Checkpoint, Outcome]]:
    """Run an operation; yield each outcome as files store it, with its line of history."""
    if not request.allow_nonfinite:
        _refuse_nonfinite(checkpoint, "INPUT holds")
    # Measured before the operation, which may change the model in place.
    before = measure(checkpoint) if checkpoint.origin is not None else None
    context = replace(context, stamp=lambda outcome: _stamped(outcome, options, request, checkpoint, before))
    for outcome in _carried_out(operation, checkpoint, options, context):
        # Encodings are defined by what the CPU computes, so that files do not depend on the device.
        outcome.checkpoint.model.to("cpu")
        outcome = replace(outcome, checkpoint=events.stored(outcome.checkpoint, context.tables))
        finished = context.stamp(outcome)
        if not request.allow_nonfinite:
            _refuse_nonfinite(finished, "the result would hold")
        yield finished, outcome


def _carried_out(
    operation: Operation, checkpoint: Checkpoint, options: Any, context: Context
) -> Iterator[Outcome]:
    with device_errors():
        checkpoint.model.to(context.device)
        yield from operation(checkpoint, options, context)


def write_in_memory(
    operation: Operation,
    options: Any,
    request: Request,
    given: Checkpoint | None,
    source: DataSource | None = None,
) -> Iterator[tuple[Checkpoint, Any]]:
    """Run an operation on a copy of a checkpoint in memory; yield its products and their reports.

    Without ``given`` a fresh network is built; without ``source`` the data set of the options is opened.
    """
    output = Path(request.output or default_output(request.verb, None, request.model.arch))
    copy = None if given is None else _copy(given)
    checkpoint, context = _prepare(options, request, output, copy, source)
    for finished, outcome in _finished(operation, options, request, checkpoint, context):
        yield replace(finished, origin=_origin(finished)), outcome.report


def read_in_memory(
    operation: Callable[..., Any],
    options: Any,
    request: Request,
    given: Checkpoint,
    source: DataSource | None = None,
) -> Any:
    """Run an operation that writes no checkpoint on a copy of one in memory, and return its report."""
    checkpoint, context = _prepare(options, request, Path(request.output or "."), _copy(given), source)
    with device_errors():
        checkpoint.model.to(context.device)
        return operation(checkpoint, options, context)


def _copy(given: Checkpoint) -> Checkpoint:
    """A copy to work on, with what history will call its parent."""
    # A foreign file has no content hash; its SHA-256 is what names it.
    foreign = given.origin is not None and given.origin.content is None
    origin = given.origin if foreign else _origin(given)
    return replace(given, model=copied(given.model), origin=origin)


def _origin(checkpoint: Checkpoint) -> Parent:
    """Where a checkpoint comes from; one changed in memory has the content hash that its file would have."""
    payload = checkpoint.payload()
    content = content_hash(payload, payload.digests)
    if checkpoint.origin is not None and checkpoint.origin.content == content:
        return checkpoint.origin
    return Parent(path="in memory", content=content, file="")


def read(operation: Callable[[Checkpoint, Any, Context], Any], options: Any, request: Request) -> Any:
    """Run an operation that writes no checkpoint, and return its report."""
    output = Path(request.source or ".")
    checkpoint, context = _prepare(options, request, output)
    with device_errors():
        checkpoint.model.to(context.device)
        return operation(checkpoint, options, context)


def _prepare(
    options: Any,
    request: Request,
    output: Path,
    given: Checkpoint | None = None,
    source: DataSource | None = None,
    product: Path | None = None,
) -> tuple[Checkpoint, Context]:
    read = _files_read(options, request, given)
    named_files = [] if product is None else [NamedFile(PRODUCT, product)]
    refuse_same_files(read, (*named_files, *files_written(options)))
    if product is not None:
        _refuse_product(product, request)
    references = (request.model.arch, *request.user_code)
    named = frozenset(reference for reference in references if reference and looks_like_user_code(reference))
    registries = tables(named)
    device = resolve_device(request.runtime.device)
    # Before a fresh network draws its weights.
    seed_everything(request.runtime.seed, deterministic=request.runtime.deterministic)
    data = getattr(options, "data", None)
    named_data = data if data is not None and data.data and source is None else None
    # A function may need the arguments that the checkpoint remembers, so the data wait for the checkpoint.
    waits = named_data is not None and (given or request.source) and looks_like_user_code(named_data.data)
    opened = source
    if named_data is not None and not waits:
        opened = _open(named_data, None, named, request)
    start = getattr(options, "start", None)
    published, new_head = (start.pretrained, start.new_head) if start is not None else (False, False)
    if published and (given is not None or request.source is not None):
        raise UsageError("--pretrained is for a fresh network: leave INPUT out, and name it with --arch")
    if given is not None:
        checkpoint = given
    elif published:
        reference = None if named_data is None else reference_of(named_data, None)
        checkpoint = pretrained(request.model, registries, reference, request.reporter)
    elif request.source is None:
        reference = None if named_data is None else reference_of(named_data, None)
        checkpoint = fresh(request.model, registries, named, _shape(opened), reference)
    else:
        checkpoint = open_checkpoint(
            Path(request.source),
            request.model,
            registries,
            named,
            request.reporter,
            lambda: _shape(_open(named_data, None, named, request) if named_data and waits else opened),
            new_head=new_head,
        )
    refuse_several_inputs(checkpoint.model)
    if named_data is not None:
        if waits:
            opened = _open(named_data, checkpoint.spec.data, named, request)
        # Only the data set: its class names need not be those of a foreign network's outputs.
        update = {"data": reference_of(named_data, checkpoint.spec.data)}
        checkpoint = replace(checkpoint, spec=checkpoint.spec.model_copy(update=update))
    context = Context(
        device=device,
        runtime=request.runtime,
        model_options=request.model,
        tables=registries,
        user_code=named,
        reporter=request.reporter,
        output=output,
        force=request.force,
        stamp=lambda outcome: outcome.checkpoint,
        opened=opened,
        asked=asked_of(options),
        said=request.said,
        read=read,
        given=request.given,
    )
    of_data = None if opened is None else opened.task
    return with_task(checkpoint, of_data, registry.task_of(checkpoint.spec.architecture), context), context


def _open(data: DataOptions, remembered: str | None, named: frozenset[str], request: Request) -> DataSource:
    """The data that a command names, before their network is known."""
    reference = reference_of(data, remembered)
    assert reference is not None
    return open_named(data, reference, named, request.model.input_shape)


def _shape(data: DataSource | None) -> DataShape | None:
    if data is None:
        return None
    return DataShape(data.shape, data.classes, Preprocessing(mean=data.mean, std=data.std))


def default_output(verb: str, source: str | None, arch: str | None) -> Path:
    """The default path of a product: next to the input, or named after the architecture.

    Raises:
        UsageError: if neither is given.
    """
    if source is not None:
        path = Path(source)
        return path.with_name(f"{path.stem}.{verb}.pt")
    if arch is not None:
        return Path(f"{_file_stem(arch)}.{verb}.pt")
    raise UsageError("neither INPUT nor --arch is given: name a checkpoint, or a network to build")


def labelled(output: Path, label: str) -> Path:
    """The path of one of several products of a command.

    >>> str(labelled(Path("a.prune.pt"), "step1"))
    'a.prune.step1.pt'
    """
    return output.with_name(f"{output.stem}.{label}{output.suffix}") if label else output


def _output(request: Request) -> Path:
    if request.output is not None:
        output = Path(request.output)
    else:
        output = default_output(request.verb, request.source, request.model.arch)
    if output.suffix not in SUFFIXES:
        raise UsageError(f"{output}: a checkpoint ends in {' or '.join(SUFFIXES)}")
    if not output.parent.is_dir():
        raise CheckpointError(f"{output}: the folder {output.parent} does not exist; create it first")
    return output


def _refuse_product(output: Path, request: Request) -> None:
    """Refuse a product that could not be written after all the work."""
    if output.is_dir():
        raise CheckpointError(f"{output} is a folder; -o names a file")
    if output.exists() and not request.force and not request.resumes:
        raise CheckpointError(f"{output} exists already; --force replaces it, -o names another file")


def _files_read(options: Any, request: Request, given: Checkpoint | None) -> tuple[NamedFile, ...]:
    """The files that a command reads, INPUT first."""
    path = given.origin.path if given is not None and given.origin is not None else request.source
    source = [] if path is None else [NamedFile(INPUT, Path(path))]
    return (*source, *files_read(options), *files_read(request.model))


def _file_stem(architecture: str) -> str:
    """A file name for an architecture: ``make_net`` for ``net.py:make_net``."""
    name = architecture.rpartition(":")[2]
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)


def _stamped(
    outcome: Outcome, options: Any, request: Request, source: Checkpoint, before: Size | None
) -> Checkpoint:
    # A resumed training replaces its unfinished line of history, and keeps that line's parent and size.
    earlier = outcome.continues
    step = Step(
        verb=request.verb,
        options=recorded(options) | {"runtime": recorded(request.runtime)},
        seed=request.runtime.seed,
        parent=source.origin if earlier is None else earlier.parent,
        others=dict(outcome.others),
        versions={
            "cctool": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        before=before if earlier is None else earlier.before,
        after=measure(outcome.checkpoint),
        metrics_before=outcome.metrics_before,
        metrics_after=outcome.metrics_after,
        notes=outcome.notes,
        signal=outcome.signal,
    )
    return outcome.checkpoint.with_step(step)


def _refuse_nonfinite(checkpoint: Checkpoint, who: str) -> None:
    found = nonfinite(checkpoint.model)
    if found is not None:
        raise CheckpointError(
            f"{who} {found[1]:,} NaN or infinite values in {found[0]}; "
            "`cctool analyze` lists them all, --allow-nonfinite goes on"
        )
