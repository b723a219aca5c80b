"""What `checkpoint` must know of the layers above to load a file, passed in as explicit tables.

One composition root (`operations/registries.py`) fills them; the library, the commands and the worker
processes all use that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from cctool.checkpoint.encoding import Encoding
from cctool.checkpoint.spec import Edit

__all__ = ["EditKind", "Tables"]


@dataclass(frozen=True)
class EditKind:
    """One kind of edit.

    Attributes:
        record: pydantic model of the edit.
        apply: changes the freshly built module in place; its parameters may be on the meta device.
        order: edits are applied from the lowest to the highest, in whatever order they were recorded: what
            says how large tensors are comes before what lies beside them.
        check: raises CorruptCheckpointError where the assigned tensors contradict the edit; None checks
            nothing.
    """

    record: type[Edit]
    apply: Callable[[nn.Module, Any], None]
    order: int = 0
    check: Callable[[nn.Module, Any], None] | None = None


@dataclass(frozen=True)
class Tables:
    """Everything open-ended that a checkpoint may name.

    Attributes:
        build: (architecture, arguments) -> module. Raises ArchitectureError for what is not registered
            and for user code that was not named on this command line.
        edits: kinds of edit by name.
        encodings: ways to store a tensor by name.
    """

    build: Callable[[str, Mapping[str, Any]], nn.Module]
    edits: Mapping[str, EditKind]
    encodings: Mapping[str, Encoding]
