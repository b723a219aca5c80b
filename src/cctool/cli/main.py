"""The program: a table of contents of its commands."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import typer

from cctool import __version__
from cctool.cli.commands.analyze import analyze
from cctool.cli.commands.compare import compare
from cctool.cli.commands.decode import decode
from cctool.cli.commands.distill import distill
from cctool.cli.commands.evaluate import evaluate
from cctool.cli.commands.export import export
from cctool.cli.commands.lists import datasets, models
from cctool.cli.commands.prune import prune
from cctool.cli.commands.quantize import quantize
from cctool.cli.commands.train import train
from cctool.cli.commands.transform import transform
from cctool.cli.frame import Invocation, Terminated, guarded
from cctool.cli.once import OnceCommand
from cctool.cli.signature import command
from cctool.options.verbs import VERBS

_HELP = "Compress trained CNNs: each command reads a checkpoint, does one thing and writes a checkpoint."
_VERBS = (train, distill, evaluate, prune, quantize, transform, decode, analyze, export, compare)
_LISTS = (models, datasets)


def program(only: str | None = None) -> typer.Typer:
    """Make the program.

    Args:
        only: the one command whose options are needed, so that no time goes into those of the others; None
            makes all of them.
    """
    made = typer.Typer(
        name="cctool",
        help=_HELP,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        # Without a value Typer loads pydantic to check that there is none: a third of the time of help.
        context_settings={"default_map": {"help": False}},
    )
    made.callback(help=_HELP)(_program)
    for carry_out in _VERBS:
        needed = only in (None, carry_out.__name__)
        made.command(cls=OnceCommand)(
            command(VERBS[carry_out.__name__], carry_out) if needed else _named_only(carry_out)
        )
    for plain in _LISTS:
        made.command(cls=OnceCommand)(guarded(plain))
    return made


def _version(value: bool) -> None:
    if value:
        typer.echo(f"cctool {__version__}")
        raise typer.Exit


def _program(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Hold the options that come before a command."""


def _named_only(carry_out: Callable[[Invocation], None]) -> Callable[[], None]:
    """A command as the list of commands shows it: its name and what it does."""

    def run() -> None: ...

    run.__name__, run.__doc__ = carry_out.__name__, carry_out.__doc__
    return run


@cache
def _whole() -> typer.Typer:
    return program()


def __getattr__(name: str) -> Any:
    if name == "app":
        return _whole()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _terminated(number: int, frame: object) -> None:
    """End as Ctrl-C does, which says what is left of a training; a second signal ends at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


def main() -> None:
    """Run the program."""
    signal.signal(signal.SIGTERM, _terminated)
    # Read when torch is loaded. Threads that spin while they wait for each other made training five times
    # slower on a machine that others use too; sleeping ones cost little where nobody does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    program(next((word for word in sys.argv[1:] if not word.startswith("-")), ""))()
