"""A computed weight that is kept while what it was computed from stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cctool.graph.execution import hidden

__all__ = ["WeightCache"]


class WeightCache:
    """Holds one weight for evaluations; copies and files of its layer begin with an empty one.

    A weight is only kept where no gradients are recorded for it. It counts as current as long as its sources
    are the same memory and were not changed in place; what is written through ``.data`` is seen by nobody, so
    that `clear` is called where layers change between training and evaluation.

    Args:
        keeps: whether a weight is kept at all; whoever follows where tensors come from must see it made.
    """

    def __init__(self, *, keeps: bool = True) -> None:
        self._keeps = keeps
        self.clear()

    def clear(self) -> None:
        """Forget the weight."""
        # In one object, for replicas of a layer on several devices share their cache across threads.
        self._held: tuple[tuple[Any, ...], Tensor, list[Tensor]] | None = None

    def get(self, compute: Callable[[], Tensor], sources: Sequence[Tensor]) -> Tensor:
        """The weight, computed where it is not at hand.

        Args:
            compute: makes it.
            sources: what it is made of.
        """
        # How a weight is made is no business of whoever counts or quantizes the layer's own calls.
        with hidden() if self._keeps else nullcontext():
            return self._get(compute, sources)

    def _get(self, compute: Callable[[], Tensor], sources: Sequence[Tensor]) -> Tensor:
        recorded = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if recorded or not self._keeps or torch.compiler.is_compiling() or any(map(_untracked, sources)):
            return compute()
        key = (torch.is_inference_mode_enabled(), *map(_state, sources))
        held = self._held
        if held is None or held[0] != key:
            # The sources are held so that their memory cannot become another tensor's.
            held = self._held = (key, compute(), [source.detach() for source in sources])
        return held[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        return WeightCache()

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()


def _untracked(source: Tensor) -> bool:
    # Fake tensors of a tracing, and those of inference mode, have no version to go by.
    return type(source) not in (Tensor, torch.nn.Parameter) or source.is_meta or source.is_inference()


def _state(source: Tensor) -> tuple[Any, ...]:
    return source.data_ptr(), source._version, source.dtype, source.device, tuple(source.shape)
