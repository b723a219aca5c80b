"""What follows each layer directly: its bias, and the batch norm that reads its output."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

from cctool.graph.execution import Event, execute
from cctool.graph.trace import argument, tensor_names

_LAYERS = frozenset(
    ["linear", *(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3))]
)


class _Watcher:
    def __init__(self, model: nn.Module) -> None:
        self.names = tensor_names(model)
        self.calls: Counter[str] = Counter()
        self.biases: dict[str, str] = {}
        self.norms: dict[str, tuple[str, ...]] = {}
        # by `id`, the output of a layer while it lives, and the name of the layer's weight
        self._results: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def observe(self, event: Event) -> None:
        if event.name in _LAYERS:
            self._layer(event)
        elif event.name == "batch_norm":
            self._norm(event)

    def _layer(self, event: Event) -> None:
        weight, bias = (self._name(argument(event, key)) for key in ("weight", "bias"))
        if weight is None:
            return
        self.calls[weight] += 1
        self._results[id(event.result)] = (weakref.ref(event.result), weight)
        if bias is not None:
            self.biases[weight] = bias

    def _norm(self, event: Event) -> None:
        source = argument(event, "input")
        named = tuple(
            name for key in ("weight", "bias") if (name := self._name(argument(event, key))) is not None
        )
        self.calls.update(named)
        # Python reuses the `id` of a freed tensor, hence the check of identity.
        found = self._results.get(id(source))
        if found is not None and found[0]() is source:
            self.norms[found[1]] = named

    def _name(self, tensor: Tensor | None) -> str | None:
        return None if tensor is None else self.names.get(id(tensor))


def followers(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, tuple[str, ...]]:
    """Parameters with one element for each output channel of a layer, by the name of the layer's weight.

    These are the bias of a convolution or linear layer, and scale and shift of a batch norm whose input is
    the layer's output tensor itself. Layers and norms that are called more than once in a pass are left out.

    Args:
        model: any module.
        inputs: positional arguments of its forward.
    """
    watcher = _Watcher(model)
    execute(model, inputs, [watcher.observe])
    once = {name for name, count in watcher.calls.items() if count == 1}
    found: dict[str, tuple[str, ...]] = {}
    for weight in watcher.calls:
        norms = [name for name in watcher.norms.get(weight, ()) if name in once]
        biases = [watcher.biases[weight]] if weight in watcher.biases else []
        if weight in once and (biases or norms):
            found[weight] = (*biases, *norms)
    return found
