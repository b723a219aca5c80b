"""The masked network, computed without a copy of it: tensors are masked as calls take them.

The model itself runs. For parameters that removed units touch, each call gets copies with zeros in the
elements of those units, which are freed after the call. A call that depends on the number of channels (layer
norm, attention, a mean over channels) is computed over the kept channels, as in the cut network. In float64,
tensors are converted as calls take them, without a second copy of the weights.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.outputs import named_tensors as output_tensors
from cctool.graph.execution import execute, tensors_in, with_tensors
from cctool.graph.ledger import Kind
from cctool.graph.records import ChannelGraph, Statistic
from cctool.pruning.cut.surgery import named_tensors, places_removed, removed_labels, zeroed
from cctool.pruning.select.order import Selection

Function = Callable[..., Any]
Places = Mapping[str, Sequence[tuple[int, Tensor]]]

_LARGE = 1 << 22  # elements; larger weights of linear layers are converted to float64 in parts
_READS_ONLY = frozenset(
    {"shape", "size", "dim", "ndim", "numel", "device", "is_floating_point", "requires_grad"}
)


def active_statistics(graph: ChannelGraph, selection: Selection) -> list[Statistic]:
    """Calls that depend on a number of channels that this selection changes."""
    removed = removed_labels(graph, selection)
    return [s for s in graph.statistics if any(bool(removed[labels].any()) for labels, _ in s.widths)]


class MaskedCalls:
    """Computes the calls of one forward pass of the masked network; each pass needs a new one.

    Args:
        model: the dense model.
        graph: its coupled channels.
        selection: the units that are kept; None keeps all.
        values: tensors to use instead of the model's own, by name, before masking.
        wide: compute in float64.

    Attributes:
        without_effect: sums over the kept channels that equal the sums over all, as removed channels are 0.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph | None = None,
        selection: Selection | None = None,
        values: Mapping[str, Tensor] | None = None,
        wide: bool = False,
    ) -> None:
        self.wide = wide
        self.values = values or {}
        self.places: Places = {}
        self.statistics: dict[tuple[str, int], list[Statistic]] = defaultdict(list)
        if graph is not None and selection is not None:
            self.places = places_removed(graph, selection)
            self.kept = ~removed_labels(graph, selection)
            for statistic in active_statistics(graph, selection):
                self.statistics[statistic.op, statistic.ordinal].append(statistic)
        changed = set(self.values) | set(self.places)
        # Reversed, so that a shared tensor has its first name, which places are listed under.
        self.names = {id(tensor): name for name, tensor in reversed(named_tensors(model)) if name in changed}
        self.ordinals: Counter[str] = Counter()
        self.without_effect: list[Statistic] = []

    def __call__(
        self, name: str, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Compute one call."""
        # Calls are counted as the traced pass counted them, by which statistics are found.
        ordinal = self.ordinals[name]
        self.ordinals[name] += 1
        if name in _READS_ONLY:
            return function(*args, **kwargs)
        if self.wide and name == "linear" and len(args) > 1 and args[1].numel() > _LARGE:
            return self._by_rows(function, *args, **kwargs)
        args = tuple(self._replaced(value) for value in args)
        kwargs = {key: self._replaced(value) for key, value in kwargs.items()}
        if self.wide and name == "dtype":
            return self._replaced(function(*args, **kwargs))
        for statistic in self.statistics.get((name, ordinal), ()):
            if statistic.kind in (Kind.KEPT, Kind.SUM):
                kept = self.kept[statistic.widths[0][0]]
                result = over_kept(statistic, kept, function, args, kwargs)
                if statistic.kind is Kind.SUM and _same(result, function(*args, **kwargs)):
                    self.without_effect.append(statistic)
                return result
            args, kwargs = self._scaled(statistic, args, kwargs)
        result = function(*args, **kwargs)
        # New constants become float64 here: otherwise a later in-place write would go into a converted copy.
        new = self.wide and isinstance(result, Tensor) and result.dtype == torch.float32
        return result.double() if new and next(tensors_in((args, kwargs)), None) is None else result

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            name = self.names.get(id(value))
            if name is not None:
                value = self._masked(name, value)
            return value.double() if self.wide and value.dtype == torch.float32 else value
        if self.wide and value is torch.float32:
            return torch.float64
        if type(value) in (tuple, list):
            return type(value)(self._replaced(item) for item in value)
        return value

    def _by_rows(self, function: Function, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear layer, some rows at a time: a large weight in float64 takes too much memory."""
        name = self.names.get(id(weight), "")
        values = self.values.get(name, weight).detach()
        pieces = []
        height = max(1, _LARGE // values.shape[1] // 4)
        for start in range(0, len(values), height):
            rows = values[start : start + height].double()
            for dim, indices in self.places.get(name, ()):
                if dim == 0:
                    indices = indices[(indices >= start) & (indices < start + height)] - start
                rows.index_fill_(dim, indices.to(rows.device), 0)
            pieces.append(function(self._replaced(x), rows))
        result = torch.cat(pieces, dim=-1)
        return result if bias is None else result + self._replaced(bias)

    def _masked(self, name: str, tensor: Tensor) -> Tensor:
        value = self.values.get(name, tensor).detach()
        return zeroed(value, self.places[name]) if name in self.places else value

    def _scaled(
        self, statistic: Statistic, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments, with its scale or width-dependent factor computed for the kept widths."""
        kept = [(int(self.kept[labels].sum()), labels.numel(), power) for labels, power in statistic.widths]
        if statistic.kind is Kind.SCALE:
            return args, {**kwargs, "scale": kept[0][0] ** -0.5}
        ratio = 1.0
        for count, size, power in kept:
            ratio *= (count / size) ** power
        if isinstance(statistic.place, str):
            return args, {**kwargs, statistic.place: kwargs[statistic.place] * ratio}
        changed = list(args)
        changed[statistic.place] *= ratio
        return tuple(changed), kwargs


def over_kept(
    statistic: Statistic, kept: Tensor, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Compute a call over the kept channels (bool, shape [channels]); its results for the others are 0."""
    source = next(tensors_in((args, dict(kwargs))))
    dim, index = int(statistic.place), kept.nonzero().flatten().to(source.device)

    def chosen(value: Any) -> Any:
        if isinstance(value, Tensor):
            # The kernel of a convolution that slides along the channels has none of them.
            if value is not source and statistic.op.startswith("conv"):
                return value
            own = dim - (source.ndim - value.ndim) if value is source or statistic.op != "group_norm" else 0
            return value.index_select(own, index)
        if isinstance(value, (tuple, list)) and statistic.op in ("layer_norm", "rms_norm"):
            first = source.ndim - len(value)
            return [len(index) if first + d == dim else size for d, size in enumerate(value)]
        return value

    result = function(
        *(chosen(value) for value in args), **{key: chosen(value) for key, value in kwargs.items()}
    )

    def spread(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return type(value)(spread(item) for item in value) if isinstance(value, (tuple, list)) else value
        if value.ndim != source.ndim or value.shape[dim] != len(index):
            return value
        shape = [len(kept) if d == dim else size for d, size in enumerate(value.shape)]
        return value.new_zeros(shape).index_copy_(dim, index, value)

    return spread(result)


def _same(kept: Any, plain: Any) -> bool:
    """Whether sums over the kept channels equal those over all, because removed channels are 0."""
    pairs = zip(tensors_in(kept), tensors_in(plain), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max())) for a, b in pairs)


def run(model: nn.Module, inputs: Sequence[Tensor], calls: MaskedCalls | None = None) -> dict[str, Tensor]:
    """All output tensors of the model in evaluation mode by name, with calls computed by `calls`."""
    if calls is not None and calls.wide:
        inputs = with_tensors(tuple(inputs), lambda v: v.double() if v.dtype == torch.float32 else v)
    output = execute(model, tuple(inputs), [], substitute=calls)
    return {name: value.detach() for name, value in output_tensors(output).items()}
