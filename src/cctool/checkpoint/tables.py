"""What `checkpoint` needs from the layers above to load a file, passed in as explicit tables.

One composition root (`operations/registries.py`) fills them, for the library, the commands and the worker
processes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from cctool.checkpoint.encoding import Encoding
from cctool.checkpoint.spec import Edit


@dataclass(frozen=True)
class EditKind:
    """One kind of edit.

    Attributes:
        record: pydantic model of the edit.
        apply: changes the freshly built module in place; its parameters may be on the meta device.
        order: edits are applied from the lowest to the highest, whatever order they were recorded in: edits
            that change tensors' sizes come before those that add tensors to fit them.
        check: raises CorruptCheckpointError if the assigned tensors contradict the edit; None checks nothing.
    """

    record: type[Edit]
    apply: Callable[[nn.Module, Any], None]
    order: int = 0
    check: Callable[[nn.Module, Any], None] | None = None


@dataclass(frozen=True)
class Tables:
    """Everything open-ended that a checkpoint may name.

    Attributes:
        build: (architecture, arguments) -> module. Raises ArchitectureError for unknown names and for user
            code that the command line does not name.
        edits: kinds of edit by name.
        encodings: ways to store a tensor by name.
    """

    build: Callable[[str, Mapping[str, Any]], nn.Module]
    edits: Mapping[str, EditKind]
    encodings: Mapping[str, Encoding]
