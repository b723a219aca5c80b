"""Entering and leaving the pretence."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pretended_cuda import tensors
from pretended_cuda.driver import Driver
from pretended_cuda.marks import cannot
from pretended_cuda.operators import Operators

_ABSENT = object()


class _Pretence:
    def __init__(self) -> None:
        self._driver = Driver()
        exports = [
            (torch.onnx, "export"),
            (torch.export, "export"),
            (torch.export, "load"),
            (torch.export, "save"),
        ]
        self._replacements = [
            *self._driver.replacements(),
            *tensors.replacements(self._driver),
            *((owner, name, self._traced(getattr(owner, name))) for owner, name in exports),
        ]
        self._before: list[tuple[Any, str, Any]] = []
        self._mode: Operators | None = None

    def enter(self) -> None:
        for owner, name, value in self._replacements:
            self._before.append((owner, name, vars(owner).get(name, _ABSENT)))
            setattr(owner, name, value)
        self._mode = Operators(self._driver)
        self._mode.__enter__()

    def leave(self) -> None:
        assert self._mode is not None
        self._mode.__exit__(None, None, None)
        self._mode = None
        while self._before:
            owner, name, value = self._before.pop()
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

    def _traced(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Tracing replaces tensors by its own, which the pretence would disturb: it is left meanwhile."""

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            for leaf in tree_leaves((args, kwargs)):
                held = leaf.state_dict().values() if isinstance(leaf, nn.Module) else [leaf]
                if any(isinstance(x, Tensor) and x.is_cuda for x in held):
                    cannot("torch.export")
            self.leave()
            try:
                return original(*args, **kwargs)
            finally:
                self.enter()

        return call


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Pretend a CUDA device in this thread; tensors of the device must not be used afterwards."""
    pretence = _Pretence()
    pretence.enter()
    try:
        yield
    finally:
        pretence.leave()


tensors.register_with_torch_save()
