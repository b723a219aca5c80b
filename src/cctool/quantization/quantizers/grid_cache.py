"""A grid that is kept while the range it was computed from stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cctool.quantization.quantizers.grid import Grid

__all__ = ["GridCache"]


class GridCache:
    """Holds one grid; copies and files of its quantizer begin with an empty one.

    A grid counts as current as long as its source is the same memory and was not changed in place. What is
    written through ``.data`` is seen by nobody, so that `clear` is called where training and evaluation
    change over.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the grid."""
        # In one object, for replicas of a network on several devices share their caches across threads.
        self._held: tuple[tuple[Any, ...], Grid, Tensor] | None = None

    def get(self, compute: Callable[[], Grid], source: Tensor) -> Grid:
        """The grid, computed where it is not at hand.

        Args:
            compute: makes it.
            source: what it is made of, without a gradient.
        """
        if torch.compiler.is_compiling() or _untracked(source):
            return compute()
        # What inference mode makes cannot be saved for a backward pass.
        key = (
            torch.is_inference_mode_enabled(),
            source.data_ptr(),
            source._version,
            source.dtype,
            source.device,
            source.shape,
        )
        held = self._held
        if held is None or held[0] != key:
            # The source is held so that its memory cannot become another tensor's.
            held = self._held = (key, compute(), source.detach())
        return held[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> GridCache:
        return GridCache()

    def __reduce__(self) -> tuple[type[GridCache], tuple[()]]:
        return GridCache, ()


def _untracked(source: Tensor) -> bool:
    # Fake tensors of a tracing, and those of inference mode, have no version to go by.
    return type(source) is not Tensor or source.is_meta or source.is_inference()
