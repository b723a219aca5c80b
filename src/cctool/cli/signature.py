"""From a verb's options to a function whose signature Typer reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING
from typing import Annotated, Any

import typer

from cctool.cli.frame import Invocation, guarded
from cctool.options.fields import Leaf
from cctool.options.verbs import Input, Verb

_CHECKPOINT = "Checkpoint to read; - takes its path from stdin."
_INPUTS: dict[Input, tuple[Any, Any, str]] = {
    Input.CHECKPOINT: (str, inspect.Parameter.empty, _CHECKPOINT),
    Input.OPTIONAL: (str | None, None, "Checkpoint to continue from; - takes its path from stdin."),
    Input.FILES: (
        list[str],
        inspect.Parameter.empty,
        "Checkpoints and .onnx files to put side by side; - takes paths from stdin, one a line.",
    ),
    Input.STREAMS: (
        list[str],
        inspect.Parameter.empty,
        "Folder that `evaluate --bitstream` wrote, or stream files of it.",
    ),
}


def command(verb: Verb, carry_out: Callable[[Invocation], None]) -> Callable[..., None]:
    """Make the command of a verb.

    Args:
        verb: whose options become the command's.
        carry_out: runs the verb and shows what it found; its docstring is the command's help.

    Returns:
        A function with the signature, name and help that Typer shows.
    """

    def run(**values: Any) -> None:
        carry_out(Invocation.parsed(verb, values.pop("context"), values.pop("inputs"), values))

    run.__name__ = verb.name
    run.__doc__ = carry_out.__doc__
    kind, default, text = _INPUTS[verb.reads]
    inputs: Any = Annotated[kind, typer.Argument(metavar=verb.reads.value, help=text)]
    parameters = [
        _parameter("context", typer.Context, inspect.Parameter.empty),
        _parameter("inputs", inputs, default),
        *map(parameter, verb.offered),
    ]
    # Typer reads a command's options from its signature and annotations.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {item.name: item.annotation for item in parameters}
    return guarded(run)


def parameter(leaf: Leaf) -> inspect.Parameter:
    """The parameter of one option: its type on the command line, flags, help and default."""
    kind, default = _kind(leaf), _default(leaf)
    if default is None:
        kind = kind | None
    metavar = leaf.spec.metavar
    if leaf.enum is not None and metavar is None:
        metavar = f"<{'|'.join(str(item.value) for item in leaf.enum)}>"
    told = typer.Option(*leaf.flags, help=leaf.help, metavar=metavar, rich_help_panel=leaf.spec.panel or None)
    return _parameter(leaf.keyword, Annotated[kind, told], default)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kind(leaf: Leaf) -> Any:
    if leaf.spec.repeated:
        return list[str]
    # Words of an enum are checked where they are read, in the words of the other errors.
    return str if leaf.spec.parse is not None or leaf.enum is not None else leaf.kinds[0]


def _default(leaf: Leaf) -> Any:
    """What help shows where the option is not given; options that are parsed show text, or nothing."""
    if leaf.required:
        return inspect.Parameter.empty
    if leaf.spec.repeated or leaf.default is MISSING:
        return None
    if leaf.spec.parse is not None:
        return leaf.spec.shown
    return str(leaf.default) if leaf.enum is not None and leaf.default is not None else leaf.default
