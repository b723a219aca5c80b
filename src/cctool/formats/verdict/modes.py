"""Operations of a network done otherwise while a block runs: in float64, loosely, rounded another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cctool.quantization.export.onnx_operator import ON_GRID

_aten, _ON_GRID = torch.ops.aten, ON_GRID.overloadpacket
_ROUNDING = {_aten.round, _aten.floor, _aten.ceil, _aten.trunc, _ON_GRID}
_ROUNDING |= {_aten.round_, _aten.floor_, _aten.ceil_, _aten.trunc_}
_SIGNS = {_aten.sign, _aten.sign_}
_SILU = {_aten.silu, _aten.silu_}
_SIGMOIDS = {_aten.sigmoid, _aten.sigmoid_} | _SILU


Way = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]
"""Does an operation, which is given with its arguments."""


class Otherwise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, operations are done in a way; those that the way does go to the modes around it.

    Args:
        way: to do them in.
    """

    def __init__(self, way: Way) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._way = way

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._way(func, args, kwargs or {})


def doubled(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operation in float64, where code asks for float32, as in ``x.float()``, or keeps it, too."""
    written = func._schema.is_mutable  # a copy would be changed instead of the tensor
    args = [_double(value, tensors=not written) for value in args]
    return func(*args, **{key: _double(value, tensors=False) for key, value in kwargs.items()})


def _double(value: Any, *, tensors: bool) -> Any:
    if tensors and isinstance(value, Tensor) and value.dtype is torch.float32:
        return value.double()
    return torch.float64 if value is torch.float32 else value


class Jumps:
    """Keeps what operations put out that jump, then lets them put it out again, in the same order.

    These are the ones that round, and all that make integers or truth values of floating-point numbers.

    Args:
        share: a number that was rounded is rounded anew where it is another one than before, by more than
            this fraction of a step.

    Attributes:
        repeating: whether results are those that were kept.
    """

    def __init__(self, share: float) -> None:
        self._share, self.repeating = share, False
        self._kept: list[tuple[Tensor | None, Tensor]] = []
        self._at = 0

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The operation's result, which is kept or replaced by what was kept."""
        floats = any(value.is_floating_point() for value in args if isinstance(value, Tensor))
        rounds = func.overloadpacket in _ROUNDING
        before = args[0].detach().clone() if rounds else None
        found = func(*args, **kwargs)
        for value in found if isinstance(found, tuple | list) else (found,):
            if not isinstance(value, Tensor) or not floats:
                continue
            if value.is_floating_point() and not rounds and func.overloadpacket not in _SIGNS:
                continue
            if not self.repeating:
                self._kept.append((before, value.detach().clone()))
                continue
            known, kept = self._kept[self._at]
            self._at += 1
            if before is None or known is None:
                value.copy_(kept)
            else:
                near = (before - known).abs() <= self._share * _step(func, args)
                value.copy_(torch.where(near, kept.to(value.dtype), value))
        return found


class LooseSigmoids:
    """Adds noise of half a unit in the last place of 1 to sigmoids, the same at every use."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The operation's result, with noise if it has a sigmoid."""
        factor = args[0].clone() if func.overloadpacket in _SILU else 1.0
        found = func(*args, **kwargs)
        if func.overloadpacket in _SIGMOIDS:
            found.add_(_noise(found, self._generator) * 2.0**-24 * factor)
        return found


class ShakenRoundings:
    """Adds noise to numbers before they are rounded.

    Args:
        share: largest noise, as a fraction of a step.
        generator: of the noise.
    """

    def __init__(self, share: float, generator: torch.Generator) -> None:
        self._share, self._generator = share, generator

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The operation on noisy numbers if it rounds."""
        if func.overloadpacket in _ROUNDING:
            x = args[0]
            noise = _noise(x, self._generator) * self._share * _step(func, args)
            # An operation in place changes the tensor that it is given.
            args = (x.add_(noise) if func._schema.is_mutable else x + noise, *args[1:])
        return func(*args, **kwargs)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [-1, 1)."""
    return torch.rand(like.shape, generator=generator, dtype=like.dtype) * 2 - 1


def _step(func: Any, args: Sequence[Any]) -> float:
    """Distance of two levels of an operation that rounds."""
    return float(args[1]) if func.overloadpacket is _ON_GRID else 1.0
