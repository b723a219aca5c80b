"""Rules of operations that take parts of tensors: chunks, slices, single channels, index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cctool.graph.execution import Event
from cctool.graph.ledger import FIXED, Ledger, canonical_ids, compact, constant_ids, varying
from cctool.graph.rules.arithmetic import combine
from cctool.graph.rules.layers import equal_pieces, opaque
from cctool.graph.rules.shapes import line, replay
from cctool.graph.trace import argument
from cctool.graph.widths import Width

EQUAL_PIECES = "the pieces have different widths: after a cut they would be split elsewhere"
_BY_NUMBER = "single channels are picked by their number"


def _first_piece(ledger: Ledger, ids: Tensor, dim: int, width: int) -> Tensor:
    small = compact(ids)
    split = small.reshape(*small.shape[:dim], -1, width, *small.shape[dim + 1 :])
    return equal_pieces(ledger, split, dim).squeeze(dim)


def _sizes(event: Event) -> Any:
    """Sizes of the pieces as given to `split`: one for all, or a list; None for other functions."""
    if event.name not in ("split", "split_with_sizes"):
        return None
    names = ("split_size_or_sections", "split_size", "split_sizes")
    given = [event.kwargs[name] for name in names if name in event.kwargs]
    return event.args[1] if len(event.args) > 1 else given[0]


def _sizes_move(ledger: Ledger, event: Event, ids: Tensor, dim: int) -> bool:
    """Whether every size in a list is a width, so that each piece can be cut independently."""
    sizes = _sizes(event)
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(size, Width) for size in sizes):
        return False
    runs = torch.split(line(ids, dim), [int(size) for size in sizes])
    moved = [ledger.sized(run, size) for size, run in zip(sizes, runs, strict=True)]
    return all(moved)


def pieces(ledger: Ledger, event: Event) -> None:
    """`chunk`, `split`, `tensor_split` along channels: position j of equal pieces is tied."""
    source = event.args[0] if event.args else event.kwargs["tensor"]
    ids, results = ledger.of(source), list(event.result)
    dim = event.kwargs.get("dim", event.args[2] if len(event.args) > 2 else 0) % ids.ndim
    if dim in varying(ids) and not _sizes_move(ledger, event, ids, dim):
        widths = {result.shape[dim] for result in results}
        if len(widths) == 1:
            first = _first_piece(ledger, ids, dim, widths.pop())
            size = _sizes(event)
            if isinstance(size, Width):
                ledger.sized(first, size)
            for result in results:
                ledger.set(result, first.expand(result.shape))
            return
        ledger.freeze(ids, EQUAL_PIECES)
    start = 0
    for result in results:
        ledger.set(result, ids.narrow(dim, start, result.shape[dim]))
        start += result.shape[dim]


def glu(ledger: Ledger, event: Event) -> None:
    """`glu`: one half times the sigmoid of the other, position by position."""
    ids = ledger.of(argument(event, "input"))
    dim = argument(event, "dim", -1) % ids.ndim
    if dim in varying(ids):
        ids = _first_piece(ledger, ids, dim, ids.shape[dim] // 2)
    ledger.set(event.result, compact(ids).expand(event.result.shape))


def unbind(ledger: Ledger, event: Event) -> None:
    """`unbind`, `select`: along channels they pick fixed positions, which freezes them."""
    dim = event.kwargs.get("dim", event.args[1] if len(event.args) > 1 else 0)
    ids = ledger.of(event.args[0])
    if dim % ids.ndim in varying(ids):
        ledger.freeze(ids, _BY_NUMBER)
    replay(ledger, event)


def narrow(ledger: Ledger, event: Event) -> None:
    """`narrow(x, dim, start, length)`."""
    _, dim, start, length = (*event.args, *event.kwargs.values())[:4]
    ids = ledger.of(event.args[0])
    whole = [slice(None)] * (dim % ids.ndim)
    stop = length if int(start) == 0 else int(start) + int(length)
    span = slice(start if isinstance(start, Width) else int(start), stop)
    ledger.set(event.result, _picked(ledger, ids, (*whole, span), event.result.shape))


def getitem(ledger: Ledger, event: Event) -> None:
    """Indexing: a slice that is one of equal pieces ties them, other positions along channels freeze them."""
    index = event.args[1] if isinstance(event.args[1], tuple) else (event.args[1],)
    ids = ledger.of(event.args[0])
    if _is_plain(index) or not varying(ids):
        ledger.set(event.result, _picked(ledger, ids, index, event.result.shape))
    else:
        _fancy(ledger, event, ids, index)


def _is_plain(index: tuple[Any, ...]) -> bool:
    return all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in index)


def setitem(ledger: Ledger, event: Event) -> None:
    """`x[index] = value`: the value is tied to the part that it overwrites."""
    target, index, value = event.args
    index = index if isinstance(index, tuple) else (index,)
    ids = ledger.of(target)
    if ledger.name(target) is not None:
        opaque(ledger, event, "a parameter or buffer is written to")
    elif _is_plain(index):
        shape = torch.empty(target.shape, device="meta")[index].shape
        _write(ledger, _picked(ledger, ids, index, shape), value)
    elif len(index) == 1 and isinstance(index[0], Tensor) and index[0].shape == target.shape:
        # A mask of the same shape is elementwise; the values of a tensor are assigned in order, by number.
        combine(ledger, [ids, ledger.of(index[0])], target.shape)
        _write(ledger, constant_ids(FIXED, ()), value)
    else:
        opaque(ledger, event, "an index tensor says where to write")


def copy(ledger: Ledger, event: Event) -> None:
    """`x.copy_(y)`: x gets the channels of y; if x is a view of another tensor, both are tied."""
    target, value = event.args[:2]
    if ledger.name(target) is not None:
        opaque(ledger, event, "a parameter or buffer is written to")
    elif target._is_view() or target.shape != value.shape:
        _write(ledger, ledger.of(target), value)
    else:
        ledger.set(target, ledger.of(value))


def _write(ledger: Ledger, ids: Tensor, value: Any) -> None:
    if isinstance(value, Tensor) and (value.numel() > 1 or ledger.known(value)):
        given = ledger.of(value)
        while given.ndim > ids.ndim:
            given = given.squeeze(0)
        combine(ledger, [ids, given.reshape([1] * (ids.ndim - given.ndim) + list(given.shape))], ids.shape)


def _picked(ledger: Ledger, ids: Tensor, index: tuple[Any, ...], shape: torch.Size) -> Tensor:
    """Ids of `x[index]`, of the given shape, for numbers and slices."""
    moving, dim = varying(ids), 0
    if not moving:
        return compact(ids).reshape(-1)[:1].squeeze(0).expand(shape)
    consumed = sum(item is not None and item is not Ellipsis for item in index)
    picks: list[Any] = []
    for item in index:
        if item is Ellipsis:
            dim += ids.ndim - consumed
        elif item is not None:
            if dim in moving:
                ids = _cut_by_index(ledger, ids, dim, item)
            item = slice(None) if isinstance(item, slice) else (item if dim in moving else 0)
            dim += 1
        picks.append(item)
    return compact(ids)[tuple(picks)].expand(shape)


def _cut_by_index(ledger: Ledger, ids: Tensor, dim: int, item: int | slice) -> Tensor:
    size = ids.shape[dim]
    if isinstance(item, int):
        _freeze_up_to(ledger, ids, dim, [item + 1 if item >= 0 else item], _BY_NUMBER)
        return ids
    start, stop, step = item.indices(size)
    width = len(range(start, stop, step))
    if width == size and step == 1:
        return ids
    if step == 1 and _bounds_move(ledger, ids, dim, item):
        return ids.narrow(dim, start, width)
    # `x[:, :n // 2]` is one of equal pieces, like a chunk.
    if step == 1 and width > 1 and size % width == 0 and start % width == 0:
        first = _first_piece(ledger, ids, dim, width)
        return first.expand([width if d == dim else n for d, n in enumerate(ids.shape)])
    reason = f"channels {start}:{stop}:{step} are sliced out by number"
    if step == 1 and width and not isinstance(item.start, Width) and not isinstance(item.stop, Width):
        _freeze_up_to(ledger, ids, dim, [item.start, item.stop], reason)
    else:
        ledger.freeze(ids, reason)
    return ids[tuple([slice(None)] * dim + [item])]


def _freeze_up_to(ledger: Ledger, ids: Tensor, dim: int, bounds: Sequence[int | None], reason: str) -> None:
    """Freeze the channels before a bound, or after one that counts from the end, so that it stays right."""
    size = ids.shape[dim]
    for bound in bounds:
        if isinstance(bound, Width):
            ledger.freeze(ids, reason)
        elif bound is not None and bound != 0 and bound < size:
            length = min(abs(bound), size)
            ledger.freeze(ids.narrow(dim, 0 if bound > 0 else size - length, length), reason)


def _bounds_move(ledger: Ledger, ids: Tensor, dim: int, item: slice) -> bool:
    """Whether each bound of a slice is an end of the dim or a width, and so stays right in a cut."""
    channels = line(ids, dim)
    inner: list[tuple[Width, Tensor]] = []
    for bound in (item.start, item.stop):
        if isinstance(bound, Width) and 0 < abs(bound) < len(channels):
            inner.append((bound, channels[:bound] if bound > 0 else channels[bound:]))
        elif bound is not None and 0 != bound < len(channels):
            return False
    moved = [ledger.sized(part, bound) for bound, part in inner]
    return bool(moved) and all(moved)


def _fancy(ledger: Ledger, event: Event, ids: Tensor, index: tuple[Any, ...]) -> None:
    lists = [i.cpu() if isinstance(i, Tensor) else i for i in index]
    spans = [i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else int(i is not None) for i in lists]
    position = 0
    for item, span in zip(lists, spans, strict=True):
        if item is Ellipsis:
            span = ids.ndim - sum(spans) + 1
        whole = item is None or item is Ellipsis or (isinstance(item, slice) and item == slice(None))
        if not whole and any(position <= d < position + span for d in varying(ids)):
            ledger.freeze(ids, "channels are picked by an index tensor")
        position += span
    ledger.set(event.result, canonical_ids(ids[tuple(lists)]))
