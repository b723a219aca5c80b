"""The inputs of the layers that read a family's channels: the tensors that activation criteria look at.

A unit's channels pass its norm, nonlinearity and pooling before a layer with weights reads them. What that
layer reads is what the rest of the network gets from the unit. Calls are recognised by the parameter that
they use, as in the channel graph, never by the class of a module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cctool.graph.execution import Event, canonical_name
from cctool.graph.trace import argument, tensor_names

Key = tuple[str, int]
"""Name of a weight that reads channels, and the dim that they index: as in the Place of a consumer."""

_TURNS = frozenset({"t", "T", "mT", "transpose", "swapaxes", "swapdims"})
_CONVOLUTIONS = frozenset(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))
_PRODUCTS = {"matmul": (0, 1), "mm": (0, 1), "addmm": (1, 2)}


@dataclass(frozen=True)
class Read:
    """One call of a layer that reads channels.

    Attributes:
        key: the weight and its dim.
        tensor: the layer's input.
        dim: its channel dim.
        groups: of a grouped convolution, whose weight indexes the channels of one group only.
    """

    key: Key
    tensor: Tensor
    dim: int
    groups: int = 1

    def per_channel(self, values: Tensor, by_image: bool) -> Tensor:
        """Sum values over all dims but the channels, and dim 0 if that counts images.

        Args:
            values: shape of the tensor.
            by_image: whether dim 0 counts images, which are not summed.

        Returns:
            Shape [images or 1, indices of the weight's dim], float64; groups are summed.
        """
        dim = self.dim % values.ndim
        others = [d for d in range(values.ndim) if d != dim and not (by_image and d == 0)]
        sums = values.sum(others, dtype=torch.float64) if others else values.double()
        size = values.shape[dim] // self.groups
        return sums.reshape(values.shape[0] if by_image else 1, self.groups, size).sum(1)


class ArrivalObserver:
    """Finds the calls that read channels: an observer for `graph.execution.execute`.

    Args:
        model: whose parameters are known by name.
        show: called with every read by a named parameter, in order. Tensors that it does not keep are freed.
    """

    def __init__(self, model: nn.Module, show: Callable[[Read], None]) -> None:
        self.show = show
        self._names = tensor_names(model)
        self._turned: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def __call__(self, event: Event) -> None:
        """Look at one call that has run."""
        read = self.find(event)
        if read is not None:
            self.show(read)
        self.remember(event)

    def find(self, event: Event) -> Read | None:
        """What a call reads, if it reads channels by a named parameter; its result is not needed."""
        if event.name == "linear":
            return self._linear(argument(event, "input"), argument(event, "weight"), weight_dim=1)
        if event.name in _CONVOLUTIONS:
            return self._convolution(event, transposed=event.name.startswith("conv_transpose"))
        if event.name in _PRODUCTS:
            operands = [event.args[n] for n in _PRODUCTS[event.name] if n < len(event.args)]
            if len(operands) == 2 and all(isinstance(operand, Tensor) for operand in operands):
                return self._linear(operands[0], operands[1], weight_dim=0)
        return None

    def remember(self, event: Event) -> None:
        """Remember transposes of matrix parameters, by which `x @ W.t()` reads."""
        if event.name in _TURNS and event.args and isinstance(event.result, Tensor):
            name = self._names.get(id(event.args[0]))
            if name is not None and event.result.ndim == 2:
                self._turned[id(event.result)] = (weakref.ref(event.result), name)

    def _linear(self, x: Tensor, weight: Tensor, weight_dim: int) -> Read | None:
        turned = self._turned.get(id(weight))
        if turned is not None and turned[0]() is weight:
            return Read((turned[1], 1 - weight_dim), x, -1)
        name = self._names.get(id(weight))
        return Read((name, weight_dim), x, -1) if name is not None and weight.ndim == 2 else None

    def _convolution(self, event: Event, transposed: bool) -> Read | None:
        x, weight = argument(event, "input"), argument(event, "weight")
        name = self._names.get(id(weight))
        if name is None:
            return None
        dim = x.ndim - (weight.ndim - 1)
        if transposed:  # its dim 0 has the input channels of all groups
            return Read((name, 0), x, dim)
        return Read((name, 1), x, dim, int(argument(event, "groups", 1)))


class ReadApart(TorchFunctionMode):
    """Gives every reading call an alias of its input, so that each read has a gradient.

    An activation that two layers read has one gradient, the sum over both. To be entered outside `execute`.
    """

    def __init__(self, reader: ArrivalObserver) -> None:
        super().__init__()
        self._reader = reader

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one call, on the alias where it reads channels."""
        kwargs = dict(kwargs or {})
        name = canonical_name(func)
        read = self._reader.find(Event(name, func, args, kwargs, None, ""))
        if read is not None:
            apart = read.tensor.view_as(read.tensor)
            args = tuple(apart if value is read.tensor else value for value in args)
            kwargs = {key: apart if value is read.tensor else value for key, value in kwargs.items()}
            self._reader.show(replace(read, tensor=apart))
        result = func(*args, **kwargs)
        self._reader.remember(Event(name, func, args, kwargs, result, ""))
        return result
