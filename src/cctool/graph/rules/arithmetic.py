"""Rules of elementwise operations, pooling and reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cctool.graph.execution import Event, tensors_in
from cctool.graph.ledger import FIXED, INPUT, Kind, Ledger, compact, constant_ids, varying
from cctool.graph.rules.layers import ids_along, opaque, runs_over
from cctool.graph.widths import Width


def _source(event: Event) -> Tensor:
    return next(tensors_in((event.args, dict(event.kwargs))))


def unary(ledger: Ledger, event: Event) -> None:
    """Activations, casts, dropout, clones, `zeros_like`: the result has the channels of the input."""
    if isinstance(event.result, Tensor):
        source = _source(event)
        # In-place forms return their input, which has its ids.
        if event.result is not source:
            ledger.set(event.result, ledger.of(source).expand(event.result.shape))


def fixed(ledger: Ledger, event: Event) -> None:
    """New tensors of a constant size."""
    for result in tensors_in(event.result):
        ledger.set(result, constant_ids(FIXED, result.shape))


def uniform(ledger: Ledger, event: Event) -> None:
    """`zeros`, `ones`, `full`, `empty`: the same at every channel; a dim sized by a width is cut with it."""
    result, size = event.result, event.args[isinstance(event.args[0], Tensor) if event.args else 0 :]
    given: Any = event.kwargs.get("size", size[0] if size and isinstance(size[0], (tuple, list)) else size)
    sizes = list(given)[: result.ndim] if isinstance(given, (tuple, list)) else []
    widths = [(dim, size) for dim, size in enumerate(sizes) if isinstance(size, Width)]
    counted = [(dim, size) for dim, size in widths if any(symbol.ids is not None for symbol in size.powers)]
    if len(counted or widths) != 1:
        fixed(ledger, event)
        return
    ((dim, width),) = counted or widths
    # An attribute may count anything, such as heights: only in the channel dim it is taken for a width.
    if counted or dim == min(_CHANNELS, result.ndim - 1):
        ids = ledger.new(int(width))
        if ledger.sized(ids, width):
            ledger.set(result, ids_along(ids, dim, result.shape))
            return
    fixed(ledger, event)


_CHANNELS = 1  # the dim of the channels in a batch of them


def elementwise(ledger: Ledger, event: Event) -> None:
    """Operands are tied position by position; one that is broadcast over another's channels is fixed."""
    tensors = list(tensors_in((event.args, dict(event.kwargs))))
    if len(tensors) == 1:
        unary(ledger, event)
        return
    result = event.result
    if not isinstance(result, Tensor):
        opaque(ledger, event, f"no rule for `{event.name}` with several results")
        return
    operands = []
    for tensor in tensors:
        if tensor.numel() == 1 and result.numel() > 1 and not ledger.known(tensor):
            if ledger.name(tensor) is not None:
                ledger.pin(tensor)
        else:
            ids = ledger.of(tensor)
            operands.append(ids.reshape([1] * (result.ndim - ids.ndim) + list(ids.shape)))
    ledger.set(result, combine(ledger, operands, result.shape))


def combine(ledger: Ledger, operands: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Tie operands of as many dims as the result; returns the result's ids."""
    smalls = [compact(ids) for ids in operands]
    moving = sorted({d for small in smalls for d, n in enumerate(small.shape) if n > 1})
    if not moving:
        return _combine_constants(ledger, operands, shape)
    parts = []
    for ids, small in zip(operands, smalls, strict=True):
        spread = [d for d in moving if ids.shape[d] == 1 and shape[d] > 1]
        if not spread:
            parts.append(small)
        elif small.numel() == 1:
            ledger.freeze(small, "a single channel is spread over several")
        else:
            for other in operands:
                ledger.freeze(other, "operands have their channels in different dims")
            return constant_ids(FIXED, shape)
    # Ties to the smallest need the fewest pairs.
    varied = [part for part in parts if part.numel() > 1]
    first = min(varied, key=Tensor.numel)
    for part in parts:
        if part is not first:
            ledger.tie(first, part)
    if any(part.numel() == 1 and int(part.reshape(-1)[0]) <= INPUT for part in parts):
        return constant_ids(FIXED, shape)
    return first.expand(shape)


def _combine_constants(ledger: Ledger, operands: Sequence[Tensor], shape: torch.Size) -> Tensor:
    values = [int(compact(ids).reshape(-1)[0]) if ids.numel() else FIXED for ids in operands]
    channels = [value for value in values if value > INPUT]
    if channels:
        same = all(ids.shape == shape for ids in operands)
        for ids, value in zip(operands, values, strict=True):
            if same and value > INPUT:
                ledger.tie(constant_ids(channels[0], (1,)), constant_ids(value, (1,)))
            elif not same:
                ledger.freeze(ids, "a single channel is spread over several")
        return constant_ids(channels[0] if same else FIXED, shape)
    return constant_ids(INPUT if INPUT in values else FIXED, shape)


def spatial(ledger: Ledger, event: Event) -> None:
    """Pooling and resampling: channels stay, and all dims after theirs must be neutral."""
    source = _source(event)
    ids = ledger.of(source)
    # The digit in `max_pool2d` counts the spatial dims; others (`interpolate`) take a batch of channels.
    digit = [int(c) for c in event.name if c.isdigit()]
    behind = ids.ndim - (digit[0] if digit else ids.ndim - 2)
    if any(dim >= behind for dim in varying(ids)):
        opaque(ledger, event, f"`{event.name}` runs over the channels")
        return
    for other in tensors_in((event.args[1:], dict(event.kwargs))):
        if other is not source:
            # For example the grid of `grid_sample`, which is no map of channels.
            ledger.freeze(ledger.of(other), f"`{event.name}` is steered by this tensor")
    for result in tensors_in(event.result):
        ledger.set(result, compact(ids).expand(result.shape))


def unpooling(ledger: Ledger, event: Event) -> None:
    """`max_unpool2d(x, indices, ...)`: each channel by its own indices."""
    x, indices = (*event.args, *event.kwargs.values())[:2]
    ids, others = compact(ledger.of(x)), compact(ledger.of(indices))
    ledger.tie(ids, others)
    ledger.set(event.result, ids.expand(event.result.shape))


def _dims(event: Event, ndim: int, position: int = 1) -> list[int]:
    given: Any = event.kwargs.get("dim", event.kwargs.get("axis"))
    if given is None and len(event.args) > position and not isinstance(event.args[position], torch.dtype):
        given = event.args[position]
    if given is None:
        return list(range(ndim))
    return [d % ndim for d in ([given] if isinstance(given, int) else given)]


def reduction(ledger: Ledger, event: Event) -> None:
    """Means, variances, extrema, sums: over a channel dim they run over the kept channels after a cut."""
    tensors = list(tensors_in((event.args, dict(event.kwargs))))
    if len(tensors) > 1:
        elementwise(ledger, event)
        return
    ids = ledger.of(tensors[0])
    dims = _dims(event, ids.ndim, position=2 if event.name in ("norm", "vector_norm") else 1)
    if not _runs_over_kept(ledger, event, ids, dims):
        return
    small = compact(ids)
    if any(dim in varying(ids) for dim in dims):
        small = constant_ids(FIXED, (1,) * ids.ndim)
    for result in tensors_in(event.result):
        kept = small if result.ndim == ids.ndim else small.reshape(
            [n for d, n in enumerate(small.shape) if d not in dims]
        )  # fmt: skip
        ledger.set(result, compact(kept).expand(result.shape))


def _runs_over_kept(ledger: Ledger, event: Event, ids: Tensor, dims: Sequence[int]) -> bool:
    """Note a statistic over channels; if that is not possible, freeze everything and return False."""
    moving = [dim for dim in varying(ids) if dim in dims]
    if not moving:
        return True
    if len(varying(ids)) > 1 or event.kwargs.get("out") is not None:
        opaque(ledger, event, f"`{event.name}` runs over channels that lie in several dims")
        return False
    if ledger.known(_source(event)):
        if event.name not in _KEEPING_ZEROS:
            runs_over(ledger, moving[0], compact(ids).reshape(-1))
        elif not ledger.exact:
            runs_over(ledger, moving[0], compact(ids).reshape(-1), Kind.SUM)
        return True
    opaque(ledger, event, f"`{event.name}` runs over the channels")
    return False


_KEEPING_ZEROS = frozenset({"sum", "norm", "vector_norm", "normalize"})
"""A masked channel that is 0 adds nothing to these; whether it is 0, the verification finds out."""


def along_dim(ledger: Ledger, event: Event) -> None:
    """Softmax, `normalize`, cumulative sums: ids stay; along a channel dim see `reduction`."""
    ids = ledger.of(_source(event))
    position = 2 if event.name == "normalize" else 1
    dims = [_NORMALIZED % ids.ndim] if event.name == "normalize" else _dims(event, ids.ndim)
    if event.name == "normalize" and ("dim" in event.kwargs or len(event.args) > position):
        dims = _dims(event, ids.ndim, position)
    if event.name.startswith("cum") and any(dim in varying(ids) for dim in dims):
        opaque(ledger, event, f"`{event.name}` runs over the channels")
    elif _runs_over_kept(ledger, event, ids, dims):
        ledger.set(event.result, ids)


_NORMALIZED = 1  # default dim of `F.normalize`


def leaves_torch(ledger: Ledger, event: Event) -> None:
    """`tolist`, `numpy`: the trace cannot see what is done with the values."""
    for tensor in tensors_in(event.args):
        ledger.freeze(ledger.of(tensor), f"`{event.name}` hands the values to code outside torch")
