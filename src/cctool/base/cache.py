"""A computed value that is kept while what it was computed from stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


class Cache(Generic[_T]):
    """Holds one computed value, such as a layer's weight. Copies and pickles of its module start empty.

    A value is kept only if autograd records nothing for it. It is current as long as its sources occupy the
    same memory and were not changed in place. Writes through ``.data`` go unnoticed, which is why modules
    call `clear` when they change between training and evaluation.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the value."""
        # One tuple that is replaced as a whole: replicas of a network on several devices share their caches
        # across threads, and must not see half of an update.
        self._held: tuple[tuple[Any, ...], _T, list[Tensor]] | None = None

    def get(self, compute: Callable[[], _T], sources: Sequence[Tensor]) -> _T:
        """The value that ``compute`` makes of ``sources``; computed only if the one held is outdated."""
        recorded = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if recorded or torch.compiler.is_compiling() or any(map(_untracked, sources)):
            return compute()
        # What inference mode makes cannot be saved for a backward pass.
        key = (torch.is_inference_mode_enabled(), *map(_state, sources))
        held = self._held
        if held is None or held[0] != key:
            # The sources are held so that their memory cannot become another tensor's.
            held = self._held = (key, compute(), [source.detach() for source in sources])
        return held[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache[_T]:
        return type(self)()

    def __reduce__(self) -> tuple[type[Cache[_T]], tuple[()]]:
        return type(self), ()


def _untracked(source: Tensor) -> bool:
    # Fake tensors (tracing) and tensors of inference mode have no version counter to compare.
    return type(source) not in (Tensor, torch.nn.Parameter) or source.is_meta or source.is_inference()


def _state(source: Tensor) -> tuple[Any, ...]:
    return source.data_ptr(), source._version, source.dtype, source.device, tuple(source.shape)
