"""`cctool decode`: the signature of the command, and its table."""

from __future__ import annotations

from typing import Annotated

import typer

from cctool.cli import common
from cctool.cli.console import Console
from cctool.options.common import RuntimeOptions
from cctool.options.inspect.decode import DecodeOptions


def decode(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR|FILE...", help="Folder that `evaluate --bitstream` wrote, or stream files of it."
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="OUTDIR", help="Folder to write the maps to, as .npy.")
    ],
    device: common.Device = "cpu",
    force: common.Force = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Decode feature maps that `cctool evaluate --bitstream` wrote, and verify them; no checkpoint is needed.

    Example: cctool decode maps -o decoded
    """
    options = DecodeOptions(tuple(sources), output, force)
    console = Console(quiet=quiet, as_json=as_json, debug=debug)

    from cctool.operations.inspect.decode import run

    with console.products_only():
        report = run(options, RuntimeOptions(device=device), console)
    console.talk_table(
        "",
        ("tap", "map", "elements", "bits an element", "file", "maps"),
        [
            (
                tap.name,
                "x".join(map(str, tap.shape)),
                tap.elements,
                tap.bits_per_element,
                tap.file,
                tap.verdict,
            )
            for tap in report.maps
        ],
    )
    for tap in report.maps:
        console.path(tap.file)
    console.document(report)
