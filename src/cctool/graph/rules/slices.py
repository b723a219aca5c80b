"""Rules of the operations that take tensors apart: chunks, slices, single channels, index tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cctool.graph.execution import Event
from cctool.graph.ledger import Ledger, canonical, compact, varying
from cctool.graph.rules.layers import equal_pieces
from cctool.graph.rules.shapes import replay

EQUAL_PIECES = "the pieces have different widths: after a cut they would be split elsewhere"


def _first_piece(ledger: Ledger, ids: Tensor, dim: int, width: int) -> Tensor:
    small = compact(ids)
    split = small.reshape(*small.shape[:dim], -1, width, *small.shape[dim + 1 :])
    return equal_pieces(ledger, split, dim).squeeze(dim)


def pieces(ledger: Ledger, event: Event) -> None:
    """`chunk`, `split`, `tensor_split` along channels: position j of equal pieces goes together."""
    source = event.args[0] if event.args else event.kwargs["tensor"]
    ids, results = ledger.of(source), list(event.result)
    dim = event.kwargs.get("dim", event.args[2] if len(event.args) > 2 else 0) % ids.ndim
    if dim in varying(ids):
        widths = {result.shape[dim] for result in results}
        if len(widths) == 1:
            width = widths.pop()
            first = _first_piece(ledger, ids, dim, width)
            for result in results:
                ledger.set(result, first.expand(result.shape))
            return
        ledger.freeze(ids, EQUAL_PIECES)
    start = 0
    for result in results:
        ledger.set(result, ids.narrow(dim, start, result.shape[dim]))
        start += result.shape[dim]


def unbind(ledger: Ledger, event: Event) -> None:
    """`unbind`, `select`: fixed positions along channels freeze them."""
    dim = event.kwargs.get("dim", event.args[1] if len(event.args) > 1 else 0)
    ids = ledger.of(event.args[0])
    if dim % ids.ndim in varying(ids):
        ledger.freeze(ids, "single channels are picked by their number")
    replay(ledger, event)


def narrow(ledger: Ledger, event: Event) -> None:
    """`narrow(x, dim, start, length)`."""
    _, dim, start, length = (*event.args, *event.kwargs.values())[:4]
    ids = ledger.of(event.args[0])
    whole = [slice(None)] * (dim % ids.ndim)
    _index(ledger, event, ids, (*whole, slice(int(start), int(start) + int(length))))


def getitem(ledger: Ledger, event: Event) -> None:
    """Indexing: a slice that is one of equal pieces ties them, other positions along channels freeze them."""
    index = event.args[1]
    _index(ledger, event, ledger.of(event.args[0]), index if isinstance(index, tuple) else (index,))


def _index(ledger: Ledger, event: Event, ids: Tensor, index: tuple[Any, ...]) -> None:
    moving, dim = varying(ids), 0
    if not moving:
        ledger.set(event.result, compact(ids).reshape(-1)[:1].squeeze(0).expand(event.result.shape))
        return
    plain = all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in index)
    if not plain:
        _fancy(ledger, event, ids, index)
        return
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
    ledger.set(event.result, compact(ids)[tuple(picks)].expand(event.result.shape))


def _cut_by_index(ledger: Ledger, ids: Tensor, dim: int, item: int | slice) -> Tensor:
    size = ids.shape[dim]
    if isinstance(item, int):
        ledger.freeze(ids, "single channels are picked by their number")
        return ids
    start, stop, step = item.indices(size)
    width = len(range(start, stop, step))
    if width == size and step == 1:
        return ids
    if step == 1 and width and size % width == 0 and start % width == 0:
        first = _first_piece(ledger, ids, dim, width)
        return first.expand([width if d == dim else n for d, n in enumerate(ids.shape)])
    ledger.freeze(ids, f"channels {start}:{stop}:{step} are sliced out by number")
    return ids[tuple([slice(None)] * dim + [item])]


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
    ledger.set(event.result, canonical(ids[tuple(lists)]))
