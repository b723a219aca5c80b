"""All verbs: which options each has, which operation carries it out, and the options that all share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from cctool.options.common import ModelOptions, OutputOptions, RuntimeOptions, TalkOptions
from cctool.options.fields import Choice, Leaf, Options, assemble, idle_problems, leaves, nested


@dataclass(frozen=True, eq=False, repr=False)
class Frame(Options):
    """The options that every command has."""

    model: ModelOptions = nested(ModelOptions)
    runtime: RuntimeOptions = nested(RuntimeOptions)
    output: OutputOptions = nested(OutputOptions)
    talk: TalkOptions = nested(TalkOptions)


_NO_PRODUCT = ("output", "allow_nonfinite")


@dataclass(frozen=True, eq=False, repr=False)
class _EvaluateFrame(Frame):
    runtime: RuntimeOptions = nested(RuntimeOptions, without=("seed",))
    output: OutputOptions = nested(OutputOptions, without=_NO_PRODUCT)


@dataclass(frozen=True, eq=False, repr=False)
class _ExportFrame(Frame):
    runtime: RuntimeOptions = nested(RuntimeOptions, without=("precision", "deterministic"))
    output: OutputOptions = nested(OutputOptions, without=_NO_PRODUCT)


@dataclass(frozen=True, eq=False, repr=False)
class _AnalyzeFrame(_ExportFrame):
    model: ModelOptions = nested(ModelOptions, changed={"spec": {"flags": ("--with-spec",)}})


@dataclass(frozen=True, eq=False, repr=False)
class _CompareFrame(Frame):
    # Its own --arch names several architectures.
    model: ModelOptions = nested(ModelOptions, without=("*",))
    runtime: RuntimeOptions = nested(RuntimeOptions, without=("seed", "deterministic"))
    output: OutputOptions = nested(OutputOptions, without=_NO_PRODUCT)


@dataclass(frozen=True, eq=False, repr=False)
class _DecodeFrame(Frame):
    model: ModelOptions = nested(ModelOptions, without=("*",))
    runtime: RuntimeOptions = nested(
        RuntimeOptions, RuntimeOptions(device="cpu"), without=("precision", "seed", "deterministic")
    )
    output: OutputOptions = nested(OutputOptions, without=("*",))


class Input(Choice):
    """Arguments on the command line, before the options."""

    CHECKPOINT = "INPUT"
    OPTIONAL = "[INPUT]"
    FILES = "FILE..."
    STREAMS = "DIR|FILE..."


@dataclass(frozen=True)
class Verb:
    """A verb of the command line and of the library.

    Attributes:
        name: of the command.
        asked: ``module:class`` of its own options, below `cctool.options`: loaded for the command that runs.
        carried_out: ``module:function`` of the operation, below `cctool.operations`.
        frame: the options that it shares with other verbs.
        reads: its arguments.
        writes: whether its product is a checkpoint.
    """

    name: str
    asked: str
    carried_out: str
    frame: type[Frame] = Frame
    reads: Input = Input.CHECKPOINT
    writes: bool = True

    @cached_property
    def options(self) -> type[Options]:
        """Its own options."""
        module, _, name = self.asked.partition(":")
        kind: type[Options] = getattr(import_module(f"cctool.options.{module}"), name)
        return kind

    @cached_property
    def own(self) -> tuple[Leaf, ...]:
        """One leaf for each of its own options."""
        return leaves(self.options)

    @cached_property
    def shared(self) -> tuple[Leaf, ...]:
        """The options of its frame."""
        return leaves(self.frame)

    @cached_property
    def offered(self) -> tuple[Leaf, ...]:
        """One option for each keyword; if two have the same, the one outside of optional groups."""
        found: dict[str, Leaf] = {}
        for leaf in (*self.own, *self.shared):
            first = found.setdefault(leaf.keyword, leaf)
            if first.keys and not leaf.keys:
                found[leaf.keyword] = leaf
        return tuple(found.values())

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Turn texts or values, by keyword, into the options' values. Raises UsageError for invalid ones."""
        known = {leaf.keyword: leaf for leaf in self.offered}
        return {name: known[name].read(value) for name, value in values.items()}

    def options_of(self, given: Mapping[str, Any], **more: Any) -> Any:
        """Make its options of values by keyword, as `read` gives them; refuse those without effect.

        ``more`` are further arguments of the options' ``from_given``.

        Raises:
            UsageError: if a value is not allowed, options exclude each other, or one has no effect.
        """
        from cctool.base.errors import UsageError

        own = {leaf.keyword for leaf in self.own}
        mine = {name: value for name, value in given.items() if name in own}
        make = getattr(self.options, "from_given", None)
        options = make(mine, **more) if make is not None else assemble(self.options, mine, more.get("begun"))
        problems = idle_problems(options, (*self.own, *self.shared), given)
        if problems:
            raise UsageError("; ".join(problems))
        return options

    def frame_of(self, given: Mapping[str, Any], base: Mapping[tuple[str, ...], Any] | None = None) -> Frame:
        """The options of its frame from values by keyword; ``base`` has values by path, not defaults."""
        return assemble(self.frame, given, base)

    def references(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        """The given values that may name the user's code, which is thereby allowed to run."""
        may = {leaf.keyword for leaf in (*self.own, *self.shared) if leaf.spec.runs_code}
        values = (given[name] for name in sorted(may & given.keys()) if given[name])
        return tuple(
            str(item) for value in values for item in (value if isinstance(value, tuple) else (value,))
        )


# fmt: off
VERBS: Mapping[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb("train", "train.run:TrainOptions", "train.run:run", reads=Input.OPTIONAL),
        Verb("distill", "train.distill:DistillOptions", "train.run:distill", reads=Input.OPTIONAL),
        Verb("evaluate", "inspect.evaluate:EvaluateOptions", "inspect.evaluate:run", _EvaluateFrame,
             writes=False),
        Verb("prune", "prune.options:PruneOptions", "prune.run:run"),
        Verb("quantize", "quantize.options:QuantizeOptions", "quantize.run:run"),
        Verb("transform", "transform.options:TransformOptions", "transform.run:run"),
        Verb("decode", "inspect.decode:DecodeOptions", "inspect.decode:run", _DecodeFrame, Input.STREAMS,
             writes=False),
        Verb("analyze", "inspect.analyze:AnalyzeOptions", "inspect.analyze:run", _AnalyzeFrame, writes=False),
        Verb("export", "inspect.export:ExportOptions", "inspect.export:run", _ExportFrame, writes=False),
        Verb("compare", "inspect.compare:CompareOptions", "inspect.compare:run", _CompareFrame, Input.FILES,
             writes=False),
    )
}
"""All verbs, in the order of help."""
# fmt: on
