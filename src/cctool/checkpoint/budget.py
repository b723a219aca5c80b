"""Bounds on what a spec may build before its tensors are known to fit: a kilobyte must not ask for terabytes.

Parameters are moved to the meta device as soon as a module registers them, so that initialising costs nothing
and no second copy exists.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from cctool.base.errors import SpecError
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.payload import place
from cctool.checkpoint.spec import ModelSpec

TOO_LARGE = "the spec asks for a much larger network than the tensors of the file can fill"

_EMPTY = (torch.empty,)
_FILLED = (torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye)
# Times the elements that the file holds. Parameters cost nothing on the meta device: a thinned network is
# built at its full width before it is cut, and a network may be built from a larger one.
_BUILT_ALLOWANCE = 64
_CUT_ALLOWANCE = 4096
_REAL_ALLOWANCE = 64
# Elements that any file may ask for (64 MiB of float32).
_SMALLEST_LIMIT = 2**24
# One stored byte may hold eight packed weights, and even more where a codebook has very few entries.
_PACKED_PER_BYTE = 16
_PATCHING = threading.RLock()

Register = Callable[..., None]
"""(module, name, tensor, ...) -> None, as `nn.Module.register_parameter` is."""


class Budget:
    """How much building may ask for, and whether it asked for more.

    Attributes:
        parameters: most elements of all parameters together.
        real: most elements of all buffers together, and of one tensor that is filled: memory must hold them.
        count: most parameters, because many small ones cost time.
    """

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor | EncodedTensor]) -> None:
        stored = _stored_elements(tensors)
        self.parameters = max(_SMALLEST_LIMIT, stored * (_CUT_ALLOWANCE if spec.edits else _BUILT_ALLOWANCE))
        self.real = max(_SMALLEST_LIMIT, stored * _REAL_ALLOWANCE)
        self.count = 1000 + 4 * len(tensors)
        self.exceeded = False
        self.restart()

    def restart(self) -> None:
        """Forget what was spent, before building once more."""
        self._parameters = self._real = self._count = 0

    def check(self, elements: int, limit: int) -> None:
        """Raise SpecError if ``elements`` exceed ``limit``."""
        if elements > limit:
            # The architecture's own error handling may replace this exception; the flag stays.
            self.exceeded = True
            raise SpecError(TOO_LARGE)

    def spend_parameter(self, elements: int) -> None:
        """Count one parameter."""
        self._parameters += elements
        self._count += 1
        self.check(self._parameters, self.parameters)
        self.check(self._count, self.count)

    def spend_buffer(self, elements: int) -> None:
        """Count one buffer."""
        self._real += elements
        self.check(self._real, self.real)


def _stored_elements(tensors: Mapping[str, Tensor | EncodedTensor]) -> int:
    """Elements that a file holds at most, tied tensors counted once."""
    dense = {place(value): value.numel() for value in tensors.values() if isinstance(value, Tensor)}
    encoded = {id(value): value.nbytes for value in tensors.values() if isinstance(value, EncodedTensor)}
    return sum(dense.values()) + sum(encoded.values()) * _PACKED_PER_BYTE


class BoundedFactories(TorchFunctionMode):
    """Refuses to allocate one tensor larger than the budget."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _EMPTY or func in _FILLED:
            first = kwargs.get("size", args[0] if args else ())
            sizes = first if isinstance(first, (tuple, list)) else args
            # numpy's integers are sizes, too.
            elements = math.prod(int(size) for size in sizes if isinstance(size, Integral))
            if func is torch.eye and len(sizes) == 1:
                elements *= elements
            self.budget.check(elements, self.budget.parameters if func in _EMPTY else self.budget.real)
        return func(*args, **kwargs)


def registering(budget: Budget, *, meta: bool) -> AbstractContextManager[None]:
    """Count what modules register, and put their parameters on the meta device if ``meta``."""
    return registering_by(partial(_counted, budget, meta))


@contextmanager
def registering_by(make: Callable[[Register, Register], tuple[Register, Register]]) -> Iterator[None]:
    """Replace `nn.Module.register_parameter` and `register_buffer` while the block runs.

    Args:
        make: the two methods -> their replacements. These act in every thread, and must pass on what other
            threads than the caller's register.
    """
    with _PATCHING:
        register_parameter, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer
        parameter, buffer = make(register_parameter, register_buffer)
        nn.Module.register_parameter = parameter  # type: ignore[method-assign]
        nn.Module.register_buffer = buffer  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
            nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]


def _counted(
    budget: Budget, meta: bool, register_parameter: Register, register_buffer: Register
) -> tuple[Register, Register]:
    builder = threading.get_ident()
    moved: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        other = threading.get_ident() != builder
        if other or not isinstance(param, nn.Parameter) or param.is_meta or is_lazy(param):
            register_parameter(self, name, param)
            return
        source, kept = moved.get(id(param), (None, param))
        if source is None or source() is not param:
            budget.spend_parameter(param.numel())
            kept = param
            if meta:
                kept = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
            moved[id(param)] = (weakref.ref(param), kept)
        # A parameter registered twice is a tie: both modules get the same object.
        register_parameter(self, name, kept)

    def buffer(self: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if threading.get_ident() == builder and isinstance(tensor, Tensor) and not is_lazy(tensor):
            budget.spend_buffer(tensor.numel())
        register_buffer(self, name, tensor, persistent)

    return parameter, buffer
