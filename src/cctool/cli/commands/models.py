"""`cctool models`: list the architectures."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from cctool.cli import common
from cctool.cli.console import Console


def models(
    family: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[FAMILY]", help="torchvision or timm: list all names of that library."),
    ] = None,
    as_json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """List the architectures that --arch can name."""
    from cctool.models.registry import listing

    console = Console(as_json=as_json, debug=debug)
    with console.products_only():
        records = listing(family)
        console.table(
            "",
            ("architecture", "parameters", "input", "arguments", "summary"),
            [
                (
                    record.name,
                    record.parameters,
                    "x".join(map(str, record.input_shape)) if record.input_shape else None,
                    ", ".join(record.arguments) or None,
                    record.summary,
                )
                for record in records
            ],
        )
        console.document(records)
