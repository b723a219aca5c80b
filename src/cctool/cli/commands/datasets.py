"""`cctool datasets`: list the data sets."""

from __future__ import annotations

from cctool.cli import common
from cctool.cli.console import Console


def datasets(as_json: common.Json = False, debug: common.Debug = False) -> None:
    """List the data sets that --data can name."""
    from cctool.data.registry import listing

    console = Console(as_json=as_json, debug=debug)
    with console.products_only():
        records = listing()
        console.table("", ("--data", "what it is"), [(record.form, record.summary) for record in records])
        console.document(records)
