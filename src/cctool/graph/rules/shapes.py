"""Rules of operations that move elements: most run the same torch function on the ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cctool.graph.execution import Event, tensors_in
from cctool.graph.ledger import FIXED, INPUT, Ledger, canonical_ids, compact, constant_ids, varying
from cctool.graph.rules.layers import equal_pieces, ids_along, opaque, vector
from cctool.graph.trace import argument
from cctool.graph.widths import Width


def _replayed(ledger: Ledger, event: Event) -> Iterator[tuple[Tensor, Tensor]]:
    """Results of a call, each with the result of the same call on the ids of its first argument."""
    kwargs = dict(event.kwargs)
    source, rest = (event.args[0], event.args[1:]) if event.args else (kwargs.pop("input"), ())
    ids = ledger.of(source)
    # A view, because in-place forms (`unsqueeze_`) would change ids that other activations share.
    moved = event.function(ids.view_as(ids), *rest, **kwargs)
    return zip(tensors_in(event.result), tensors_in(moved), strict=True)


def replay(ledger: Ledger, event: Event) -> None:
    """Run the same function on the ids."""
    for result, result_ids in _replayed(ledger, event):
        ledger.set(result, result_ids)


def copying(ledger: Ledger, event: Event) -> None:
    """Run the same function on the ids; copies have strides in neutral dims, which are reset to 0."""
    for result, result_ids in _replayed(ledger, event):
        ledger.set(result, canonical_ids(result_ids))


def transposed(ledger: Ledger, event: Event) -> None:
    """Transposes are replayed, except for those of matrix parameters: `x @ W.t()` must find W again."""
    source = event.args[0] if event.args else event.kwargs["input"]
    name = ledger.name(source)
    if name is not None and source.ndim == 2:
        ledger.turn(event.result, name)
    else:
        replay(ledger, event)


@dataclass(frozen=True)
class _Factor:
    """A factor that dim `left` before a view and dim `right` after it share."""

    size: int
    left: int
    right: int


def _factors(before: Sequence[int], after: Sequence[int]) -> list[_Factor] | None:
    """The coarsest dims from which merging neighbours makes both shapes; None if there are none.

    >>> [(f.size, f.left, f.right) for f in _factors((2, 6, 5), (4, 3, 5)) or ()]
    [(2, 0, 0), (2, 1, 0), (3, 1, 1), (5, 2, 2)]
    """
    left = [(d, size) for d, size in enumerate(before) if size > 1]
    right = [(d, size) for d, size in enumerate(after) if size > 1]
    factors = []
    while left and right:
        (i, a), (j, b) = left.pop(0), right.pop(0)
        size = min(a, b)
        if a % size or b % size:
            return None
        factors.append(_Factor(size, i, j))
        if a > size:
            left.insert(0, (i, a // size))
        if b > size:
            right.insert(0, (j, b // size))
    return factors


def view(ledger: Ledger, event: Event) -> None:
    """`view`, `reshape`, `flatten`, `unflatten`: merged dims repeat ids, split dims tie the pieces.

    If a channel dim is split as [a, b], one of the two shrinks in a cut: a, then each run of b channels is
    tied; or b, then the channels at position j of all a pieces are.
    """
    source = event.args[0] if event.args else event.kwargs["input"]
    if not isinstance(event.result, Tensor):
        return
    ids, shape = ledger.of(source), event.result.shape
    small = compact(ids)
    if max(small.shape, default=1) == 1 or 0 in shape:
        ledger.set(event.result, small.reshape(-1)[:1].squeeze(0).expand(shape) if ids.numel() else ids)
        return
    factors = _factors(ids.shape, shape)
    # Without common factors, channels and other dims are interleaved in no regular way.
    if factors is None:
        ledger.freeze(ids, f"{event.name} mixes dims {tuple(ids.shape)} -> {tuple(shape)}")
        ledger.set(event.result, constant_ids(FIXED, shape))
        return
    sizes = _sizes(event, len(shape))
    # Features of a linear layer as (B, C, H, W).
    image = ids.ndim == 2 and len(shape) > 3 and ids.shape[0] == shape[0]
    moved = _split(ledger, small, factors, sizes, image)
    wide = {f.right for n, f in enumerate(factors) if moved.shape[n] > 1}
    moved = moved.expand([f.size if f.right in wide else 1 for f in factors])
    moved = moved.reshape([size if d in wide else 1 for d, size in enumerate(shape)])
    if len(wide) == 1:
        (dim,) = wide
        if isinstance(sizes[dim], Width):
            ledger.sized(moved, sizes[dim])
        if event.name == "unflatten":
            start = event.args[1] if len(event.args) > 1 else event.kwargs["dim"]
            ledger.count_in(event.module, "unflattened_size", moved.reshape(-1), dim - int(start) % ids.ndim)
    ledger.set(event.result, moved.expand(shape))


def _split(
    ledger: Ledger, small: Tensor, factors: Sequence[_Factor], sizes: Sequence[Any], image: bool
) -> Tensor:
    """Ids with a dim for each factor; of the factors of a channel dim, one shrinks in a cut.

    Where the features of a linear layer become an image (B, C, H, W), it is C unless the sizes say otherwise.
    """
    moved = small.reshape([f.size if small.shape[f.left] > 1 else 1 for f in factors])
    for dim in range(small.ndim):
        pieces = [n for n, f in enumerate(factors) if f.left == dim]
        if small.shape[dim] == 1 or len(pieces) == 1:
            continue
        scaling = max(pieces, key=lambda n: _claim(sizes[factors[n].right], -n if image else n))
        if ledger.heads:
            scaling = _heads(pieces, [sizes[factors[n].right] for n in pieces], scaling)
        for piece in pieces:
            if piece != scaling:
                moved = equal_pieces(ledger, moved, piece)
    return moved


def _heads(pieces: Sequence[int], sizes: Sequence[Any], scaling: int) -> int:
    """The factor that counts heads: the first that is an attribute, if it precedes the one that shrinks."""
    named = [
        n
        for n, size in zip(pieces, sizes, strict=True)
        if isinstance(size, Width) and any(s.ids is None and e == 1 for s, e in size.powers.items())
    ]
    return named[0] if named and scaling > named[0] else scaling


def _claim(size: Any, position: int) -> tuple[int, int]:
    """Sort key of the factor that shrinks with the channels: -1, else a width, else the last."""
    if isinstance(size, Width):
        positive = [symbol for symbol, exponent in size.powers.items() if exponent > 0]
        claim = 2 if any(symbol.ids is not None for symbol in positive) else int(bool(positive))
        return claim, position
    return (3, position) if isinstance(size, int) and size == -1 else (0, position)


def _sizes(event: Event, dims: int) -> list[Any]:
    """The size of each dim of the result as the call gave it, None where it gave none."""
    sizes = list(event.args[1:]) + [event.kwargs[name] for name in ("shape", "size") if name in event.kwargs]
    if event.name == "unflatten":
        start = int(event.args[1] if len(event.args) > 1 else event.kwargs["dim"])
        sizes = list(event.args[2] if len(event.args) > 2 else event.kwargs["sizes"])
        start %= dims - len(sizes) + 1
        return [None] * start + sizes + [None] * (dims - start - len(sizes))
    if event.name not in ("view", "reshape"):
        return [None] * dims
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    return sizes if len(sizes) == dims else [None] * dims


def line(ids: Tensor, dim: int) -> Tensor:
    """Ids along one dim, at the first position of the others."""
    for other in range(ids.ndim):
        if other != dim:
            ids = ids.narrow(other, 0, 1)
    return ids.reshape(-1)


def concatenate(ledger: Ledger, event: Event) -> None:
    """`cat`: ids are concatenated along its dim and tied along the others."""
    tensors = [t for t in argument(event, "tensors") if t.numel() or t.ndim > 1]
    result = event.result
    dim = argument(event, "dim", event.kwargs.get("axis", 0)) % result.ndim
    smalls = [compact(ledger.of(tensor)) for tensor in tensors]
    across = [any(n > 1 for d, n in enumerate(small.shape) if d != dim) for small in smalls]
    if any(across):
        if any(small.shape[dim] > 1 for small in smalls):
            opaque(ledger, event, "concatenated along one dim, while channels lie in another one too")
            return
        first = smalls[across.index(True)]
        for small in smalls:
            ledger.tie(first, small)
        ledger.set(result, first.expand(result.shape))
        return
    ids = torch.cat([s.reshape(-1).expand(t.shape[dim]) for s, t in zip(smalls, tensors, strict=True)])
    if all(small.numel() == 1 for small in smalls) and bool((ids == ids[0]).all()):
        ledger.set(result, constant_ids(int(ids[0]), result.shape))
    else:
        ledger.set(result, ids_along(ids, dim, result.shape))


def stack(ledger: Ledger, event: Event) -> None:
    """`stack`: the tensors are tied position by position."""
    tensors = argument(event, "tensors", event.args[0] if event.args else None)
    dim = event.kwargs.get("dim", event.args[1] if len(event.args) > 1 else 0) % event.result.ndim
    smalls = [compact(ledger.of(tensor)) for tensor in tensors]
    first = max(smalls, key=Tensor.numel)
    for small in smalls:
        ledger.tie(first, small)
    ledger.set(event.result, first.unsqueeze(dim).expand(event.result.shape))


def pad(ledger: Ledger, event: Event) -> None:
    """`pad`: channels added by it are fixed; along neutral dims nothing changes."""
    widths = event.args[1] if len(event.args) > 1 else event.kwargs["pad"]
    mode = event.args[2] if len(event.args) > 2 else event.kwargs.get("mode", "constant")
    ids = ledger.of(event.args[0] if event.args else event.kwargs["input"])
    moving, widths = varying(ids), [int(width) for width in widths]
    small = compact(ids)
    for position in range(0, len(widths), 2):
        dim = ids.ndim - 1 - position // 2
        before, after = widths[position : position + 2]
        if dim not in moving or not (before or after):
            continue
        # Reflected, replicated or cropped channels would change with a cut.
        if mode != "constant" or before < 0 or after < 0:
            ledger.freeze(ids, f"padding of channels with mode {mode} or by a negative number")
            small = constant_ids(FIXED, tuple(1 for _ in ids.shape))
            break
        added = [0, 0] * (ids.ndim - 1 - dim) + [before, after]
        small = F.pad(small, added, value=FIXED)
    ledger.set(event.result, small.expand(event.result.shape))


def expand(ledger: Ledger, event: Event) -> None:
    """`expand`, `expand_as`: a single channel that is broadcast over several is frozen."""
    ids = ledger.of(event.args[0])
    if not varying(ids) and event.result.shape != ids.shape:
        ledger.freeze(ids, "a single channel is spread over several")
    ledger.set(event.result, ids.expand(event.result.shape))


def same_order(ledger: Ledger, event: Event) -> None:
    """`roll`: along neutral dims it changes nothing, along channels it freezes them."""
    ids = ledger.of(event.args[0])
    dims = event.kwargs.get("dims", event.args[2] if len(event.args) > 2 else ())
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims or any(dim % ids.ndim in varying(ids) for dim in dims):
        ledger.freeze(ids, "channels are shifted by a fixed number")
    ledger.set(event.result, ids)


def pixel_shuffle(ledger: Ledger, event: Event) -> None:
    """C * r^2 channels become C: each run of r^2 is tied."""
    factor = int(argument(event, "upscale_factor", event.args[1] if len(event.args) > 1 else 1))
    arriving = vector(ledger, ledger.of(event.args[0]), -3)
    first = equal_pieces(ledger, arriving.reshape(-1, factor * factor), 1).reshape(-1)
    ledger.set(event.result, ids_along(first, -3, event.result.shape))


def pixel_unshuffle(ledger: Ledger, event: Event) -> None:
    """C channels become C * r^2: each is repeated r^2 times."""
    arriving = vector(ledger, ledger.of(event.args[0]), -3)
    factor = event.result.shape[-3] // arriving.numel()
    ledger.set(event.result, ids_along(_repeat(arriving, factor), -3, event.result.shape))


def unfold(ledger: Ledger, event: Event) -> None:
    """`F.unfold` repeats each channel for every position of the kernel; `x.unfold` adds a dim."""
    source = event.args[0]
    if event.function is torch.Tensor.unfold:
        ids, dim = ledger.of(source), (*event.args[1:], *event.kwargs.values())[0]
        if dim % ids.ndim in varying(ids):
            opaque(ledger, event, "windows slide over the channels")
        else:
            ledger.set(event.result, compact(ids).unsqueeze(-1).expand(event.result.shape))
        return
    if source.ndim != 4:
        opaque(ledger, event, "no rule for `unfold` of other than four dims")
        return
    arriving = vector(ledger, ledger.of(source), 1)
    factor = event.result.shape[-2] // arriving.numel()
    ledger.set(event.result, ids_along(_repeat(arriving, factor), -2, event.result.shape))


def channel_shuffle(ledger: Ledger, event: Event) -> None:
    """Groups are interleaved: position j of all groups is tied."""
    groups = int(argument(event, "groups", event.args[1] if len(event.args) > 1 else 1))
    arriving = vector(ledger, ledger.of(event.args[0]), 1)
    first = equal_pieces(ledger, arriving.reshape(groups, -1), 0).reshape(-1)
    ledger.set(event.result, ids_along(_repeat(first, groups), 1, event.result.shape))


def _repeat(ids: Tensor, times: int) -> Tensor:
    constant_ids = bool((ids <= INPUT).all()) and ids.stride() == (0,)
    return ids[:1].expand(ids.numel() * times) if constant_ids else ids.repeat_interleave(times)
