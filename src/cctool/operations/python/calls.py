"""Verbs as Python functions: keywords become options, checkpoints and data may be in memory."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from cctool.base.errors import DataError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Preprocessing
from cctool.data.records import DataSource
from cctool.operations import pipeline
from cctool.operations.python.data_in_memory import in_memory, is_reference
from cctool.operations.registries import save
from cctool.options.fields import Leaf
from cctool.options.verbs import VERBS, Input, Verb

T = TypeVar("T")

# Options that only make sense for files or a terminal.
_FILES_ONLY = frozenset({"json", "quiet", "debug", "resume", "stop_after", "with_spec"})
# Options that write files next to the product.
_BESIDE = ("plot", "sweep", "save_every", "tensorboard", "mlflow", "macs", "sparsity", "onnx")
# Options that describe a fresh or foreign network.
_FRESH = ("arg", "input", "mean", "std")
_DATA = ("data", "val_data", "test_data")
_SPLITS = {"data": "train", "val_data": "validation", "test_data": "test"}
# Options that take a checkpoint in memory as well as a path.
_NETWORKS = ("teacher", "rewind")
_DATA_ARGUMENTS = ("data_arg", "val_data_arg", "test_data_arg")


class CctoolWarning(UserWarning):
    """Something may be wrong with a verb's input or result."""


class Warner:
    """A reporter to Python's warnings; notes and progress are not shown."""

    def note(self, text: str) -> None:
        """Print nothing; the report has it."""

    def warn(self, text: str) -> None:
        """Warn."""
        warnings.warn(text, CctoolWarning, stacklevel=2)

    def progress(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Pass on ``items``."""
        yield from items


def keywords(verb: Verb) -> tuple[Leaf, ...]:
    """The options that a verb's function takes as keywords."""
    hidden = _FILES_ONLY | ({"spec"} if verb.name != "analyze" else set())
    if verb.reads is Input.FILES:
        # Networks in memory are built already.
        hidden |= {"arch"}
    return tuple(leaf for leaf in verb.offered if leaf.keyword not in hidden)


def function(name: str) -> Callable[..., Any]:
    """The function of a verb."""
    verb = VERBS[name]

    def call(given: Any = None, **values: Any) -> Any:
        return _Call(verb, given, values).result()

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"`cctool {name}` in memory; docs/python.md and docs/{name}.md say what its options do."
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("given", inspect.Parameter.POSITIONAL_ONLY, default=None),
            *map(_keyword, keywords(verb)),
        ]
    )
    return call


def _keyword(leaf: Leaf) -> inspect.Parameter:
    return inspect.Parameter(leaf.keyword, inspect.Parameter.KEYWORD_ONLY, default=None)


@dataclass(frozen=True)
class _Call:
    """One call of a verb's function.

    Attributes:
        verb: the verb.
        given: the checkpoint; several, and paths of ONNX files, for ``compare``; files for ``decode``; None
            for a fresh network.
        values: keyword -> value.
    """

    verb: Verb
    given: Any
    values: Mapping[str, Any]

    def result(self) -> Any:
        """Carry the verb out."""
        self._refuse_unknown()
        with ExitStack() as stack:
            # For the run folder, and for networks in memory that options take as files.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if self.verb.reads is Input.STREAMS:
                return self._decoded()
            if self.verb.reads is Input.FILES:
                return self._compared(folder)
            return (
                self._written(folder)
                if self.verb.writes
                else self._read(self._checkpoint(self.given), folder)
            )

    def _refuse_unknown(self) -> None:
        known = [leaf.keyword for leaf in keywords(self.verb)]
        for name in self.values:
            if name not in known:
                near = get_close_matches(name, known, n=3, cutoff=0.5)
                hint = f"; near: {', '.join(near)}" if near else ""
                raise TypeError(f"{self.verb.name}() has no option {name!r}{hint}")

    def _checkpoint(self, given: Any) -> Checkpoint:
        if not isinstance(given, Checkpoint):
            raise TypeError(
                f"{self.verb.name}() takes a Checkpoint, not {type(given).__name__}: cctool.load opens a file"
            )
        return given

    def _written(self, folder: Path) -> Any:
        given = None if self.given is None else self._checkpoint(self.given)
        if given is None and self.verb.reads is Input.CHECKPOINT:
            raise TypeError(f"{self.verb.name}() takes a Checkpoint: cctool.load opens a file")
        options, request, source = self._prepared(given, folder)
        if getattr(options, "dry_run", False):
            return pipeline.read_in_memory(
                self._operation("plan"), options, request, self._checkpoint(given), source
            )
        products = pipeline.write_in_memory(
            self._operation(), options, request, _ready(given, source), source
        )
        found = [
            (_forgetting(made, given, source, folder), _without_folder(report, folder))
            for made, report in products
        ]
        steps = getattr(options, "steps", 1)
        return found if steps > 1 else found[0]

    def _read(self, found: Any, folder: Path) -> Any:
        given = self._checkpoint(found)
        options, request, source = self._prepared(given, folder)
        report = pipeline.read_in_memory(self._operation(), options, request, _ready(given, source), source)
        return (report.files[0].path, report) if self.verb.name == "export" else report

    def _compared(self, folder: Path) -> list[Any]:
        from cctool.operations.inspect import comparison

        if not isinstance(self.given, (list, tuple)):
            raise TypeError(f"{self.verb.name}() takes a list of checkpoints")
        first = next((item for item in self.given if isinstance(item, Checkpoint)), None)
        rows: list[Any] = []
        options: Any = None
        for number, item in enumerate(self.given, start=1):
            onnx = str(item) if isinstance(item, (str, Path)) and comparison.is_onnx(str(item)) else None
            given = self._checkpoint(item if onnx is None else first)
            options, request, source = self._prepared(given, folder)
            comparison.refuse_written(options, (), force=request.force)
            operation = comparison.operation_for(onnx or "")
            report = pipeline.read_in_memory(operation, options, request, _ready(given, source), source)
            name = onnx or (given.origin.path if given.origin is not None else f"network {number}")
            rows.append(comparison.Compared(name, report.size.file_bytes, report))
        told, _ = comparison.compared(rows, options, force=bool(self.values.get("force")))
        return [row.report for row in told]

    def _decoded(self) -> Any:
        sources = (self.given,) if isinstance(self.given, (str, Path)) else tuple(self.given or ())
        given = self._given(self.values)
        options = self.verb.options_of(given, sources=tuple(map(str, sources)))
        return self._operation()(options, self.verb.frame_of(given).runtime, Warner())

    def _prepared(
        self, given: Checkpoint | None, folder: Path
    ) -> tuple[Any, pipeline.Request, DataSource | None]:
        values = {name: value for name, value in self.values.items() if value is not None}
        output = values.get("output")
        self._refuse_idle(given, values)
        for name in _NETWORKS:
            if isinstance(values.get(name), Checkpoint):
                path = folder / f"{name}.pt"
                save(values[name], path)
                values[name] = str(path)
        source = self._source(given, values)
        if source is not None:
            values = {name: value for name, value in values.items() if name not in _DATA}
            values["data"] = source.reference
        read = self._given(values)
        options = self.verb.options_of(read)
        frame = self.verb.frame_of(read)
        if source is not None and getattr(getattr(options, "run", None), "processes", 1) > 1:
            raise UsageError("several processes cannot share data in memory: name a data set instead")
        arch = frame.model.arch if given is None else given.spec.architecture
        product = folder / pipeline.default_output(self.verb.name, None, arch)
        request = pipeline.Request(
            verb=self.verb.name,
            source=None,
            output=str(output if output and self.verb.writes else product),
            force=frame.output.force,
            allow_nonfinite=frame.output.allow_nonfinite,
            model=frame.model,
            runtime=frame.runtime,
            user_code=self.verb.references(read),
            reporter=Warner(),
            given=frozenset(values),
        )
        return options, request, source

    def _given(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Options as the verb reads them."""
        for leaf in keywords(self.verb):
            if leaf.required and values.get(leaf.keyword) is None:
                raise TypeError(f"{self.verb.name}() needs {leaf.keyword}=")
        return self.verb.read({name: _text(value) for name, value in values.items()})

    def _refuse_idle(self, given: Checkpoint | None, values: Mapping[str, Any]) -> None:
        """Refuse files that would be lost with the temporary folder, and options for fresh networks."""
        lost = [name for name in _BESIDE if values.get(name)]
        if lost and self.verb.writes and "output" not in values:
            raise UsageError(f"{', '.join(lost)}: output= says beside which name the files go")
        if lost and not self.verb.writes:
            raise UsageError(
                f"{', '.join(lost)}: {', '.join(f'{name}_file=' for name in lost)} names the file"
            )
        if self.verb.name == "export" and "output" not in values:
            raise UsageError("export needs output=, the file to write; its suffix implies the format")
        told = [name for name in _FRESH if name in values]
        if given is not None and told:
            raise UsageError(f"{', '.join(told)}: the checkpoint says this itself; it is for fresh networks")

    def _source(self, given: Checkpoint | None, values: Mapping[str, Any]) -> DataSource | None:
        """The data in memory; None if data sets are named, or there is no data."""
        held = {name: values[name] for name in _DATA if not is_reference(values.get(name))}
        if not held:
            return None
        named = [name for name in _DATA if isinstance(values.get(name), str)]
        if named:
            raise UsageError(f"{', '.join(named)} name data, {', '.join(held)} hold them: give one kind")
        parts: dict[str, Any] = {}
        for name, part in held.items():
            # For verbs that only measure, the data are what is measured.
            split = "test" if name == "data" and not self.verb.writes else _SPLITS[name]
            parts |= part if isinstance(part, Mapping) else {split: part}
        # A fresh last layer is for the classes of the data, not for those that the network knows.
        known = given is not None and not values.get("new_head")
        classes = tuple(given.spec.classes or ()) if known and given is not None else ()
        self._refuse_idle_on_data_in_memory(values, parts)
        source = in_memory(parts, classes, values.get("limit"))
        if given is not None and source.shape != given.spec.input_shape:
            shapes = ["x".join(map(str, shape)) for shape in (source.shape, given.spec.input_shape)]
            raise DataError(f"the images in memory are {shapes[0]}, and the network takes {shapes[1]}")
        return source

    def _refuse_idle_on_data_in_memory(self, values: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        """Refuse keywords that change nothing about loaders and tensors, which are served as they are."""
        idle = [name for name in ("workers", "augment", *_DATA_ARGUMENTS) if name in values]
        loaders = [part for part in parts.values() if not isinstance(part, (tuple, list, Tensor))]
        if len(loaders) == len(parts):
            idle += [name for name in ("batch_size",) if name in values]
        if idle:
            raise UsageError(f"{', '.join(idle)}: data in memory are served as they are given: leave it out")

    def _operation(self, name: str = "") -> Callable[..., Any]:
        module, _, own = self.verb.carried_out.partition(":")
        operation: Callable[..., Any] = getattr(import_module(f"cctool.operations.{module}"), name or own)
        return operation


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _ready(given: Checkpoint | None, source: DataSource | None) -> Any:
    """A checkpoint with a preprocessing; if unknown the identity, for data in memory are preprocessed."""
    if given is None or source is None or given.spec.preprocessing is not None:
        return given
    channels = given.spec.input_shape[0]
    identity = Preprocessing(mean=(0.0,) * channels, std=(1.0,) * channels)
    return replace(given, spec=given.spec.model_copy(update={"preprocessing": identity}))


def _without_folder(report: Any, folder: Path) -> Any:
    """A report that does not name the run folder that is removed with the temporary one."""
    run_folder = getattr(report, "run_folder", None)
    if run_folder is None or not Path(run_folder).is_relative_to(folder):
        return report
    return replace(report, run_folder=None)


def _forgetting(
    made: Checkpoint, given: Checkpoint | None, source: DataSource | None, folder: Path
) -> Checkpoint:
    """A product that names neither networks of the temporary folder nor, in its spec, data in memory."""
    held = {str(folder / f"{name}.pt") for name in _NETWORKS}
    if made.history:
        last = made.history[-1]
        options = {key: "in memory" if str(value) in held else value for key, value in last.options.items()}
        made = replace(made, history=(*made.history[:-1], last.model_copy(update={"options": options})))
    if source is None:
        return made
    data, preprocessing = (given.spec.data, given.spec.preprocessing) if given is not None else (None, None)
    spec = made.spec.model_copy(update={"data": data, "preprocessing": preprocessing})
    return replace(made, spec=spec)
