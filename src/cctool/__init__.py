"""Compress trained CNNs: prune, distil, quantize and transform checkpoints, in the shell or from Python.

Every verb of the command line is a function, and every checkpoint a model that trains. ::

    import cctool

    checkpoint = cctool.load("student.pt")
    pruned, report = cctool.prune(checkpoint, rate=0.5, method="slimming")
    cctool.save(pruned, "pruned.pt")

Importing this package imports nothing else: torch comes with the first use of a name. docs/python.md
teaches it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cctool.base.errors import CctoolError
    from cctool.checkpoint.checkpoint import Checkpoint
    from cctool.operations.python.calls import CctoolWarning
    from cctool.operations.python.verbs import (
        analyze,
        compare,
        decode,
        distill,
        evaluate,
        export,
        prune,
        quantize,
        train,
        transform,
    )
    from cctool.operations.registries import load, save

__all__ = [
    "CctoolError",
    "CctoolWarning",
    "Checkpoint",
    "__version__",
    "analyze",
    "compare",
    "decode",
    "distill",
    "evaluate",
    "export",
    "load",
    "prune",
    "quantize",
    "save",
    "train",
    "transform",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from cctool.operations.python import verbs

        return getattr(verbs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
