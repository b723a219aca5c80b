"""`cctool models` and `cctool datasets`: what ``--arch`` and ``--data`` can name."""

from __future__ import annotations

from typing import Annotated

import typer

from cctool.cli.console import Console

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_Family = Annotated[
    str | None, typer.Argument(metavar="[FAMILY]", help="torchvision or timm: list all names of it.")
]


def models(family: _Family = None, as_json: _Json = False, debug: _Debug = False) -> None:
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


def datasets(as_json: _Json = False, debug: _Debug = False) -> None:
    """List the data sets that --data can name."""
    from cctool.data.registry import listing

    console = Console(as_json=as_json, debug=debug)
    with console.products_only():
        records = listing()
        console.table("", ("--data", "what it is"), [(record.form, record.summary) for record in records])
        console.document(records)
