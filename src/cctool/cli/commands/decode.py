"""`cctool decode`, and its table."""

from __future__ import annotations

from cctool.cli.frame import Invocation


def decode(call: Invocation) -> None:
    """Decode feature maps that `cctool evaluate --bitstream` wrote, and verify them; no checkpoint is needed.

    Example: cctool decode maps -o decoded
    """
    from cctool.operations.inspect.decode import run

    console = call.console
    with console.products_only():
        options = call.verb.options_of(call.given, sources=call.inputs)
        report = run(options, call.frame.runtime, console)
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
