"""The program: a table of contents of its commands."""

from __future__ import annotations

import os

import typer

from cctool import __version__
from cctool.cli.frame import guarded
from cctool.cli.signature import command
from cctool.options.verbs import VERBS

app = typer.Typer(
    name="cctool",
    help="Compress trained CNNs: each command reads a checkpoint, does one thing and writes a checkpoint.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"cctool {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Compress trained CNNs: each command reads a checkpoint, does one thing and writes a checkpoint."""


def _register() -> None:
    """Add the commands in the order of help: the verbs, then the lists."""
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

    verbs = (train, distill, evaluate, prune, quantize, transform, decode, analyze, export, compare)
    for carry_out in verbs:
        app.command()(command(VERBS[carry_out.__name__], carry_out))
    for plain in (models, datasets):
        app.command()(guarded(plain))


_register()


def main() -> None:
    """Run the program."""
    # Read when torch is loaded. Threads that spin while they wait for each other made training five times
    # slower on a machine that others use too; sleeping ones cost little where nobody does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
