"""Compress trained CNNs: every command reads a checkpoint, does one thing and writes a checkpoint.

The library's face is small: `cctool.load` gives the model that trains, with its spec and history, and
`cctool.save` writes it back. ::

    import cctool

    checkpoint = cctool.load("student.pt")
    logits = checkpoint.model(images)

Importing this package imports nothing else: torch comes with the first use of a function.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cctool.operations.registries import load, save

__all__ = ["__version__", "load", "save"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("load", "save"):
        from cctool.operations import registries as composition

        return getattr(composition, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
