"""Rules of the operations that move elements: most are replayed on the ids by the same torch function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from cctool.graph.execution import Event, tensors_in
from cctool.graph.ledger import FIXED, INPUT, Ledger, canonical, compact, constant, varying
from cctool.graph.rules.layers import along, equal_pieces, opaque, vector
from cctool.graph.trace import argument


def _replayed(ledger: Ledger, event: Event) -> Iterator[tuple[Tensor, Tensor]]:
    """Results of a call beside those of the same call on the ids of its first argument."""
    kwargs = dict(event.kwargs)
    source, rest = (event.args[0], event.args[1:]) if event.args else (kwargs.pop("input"), ())
    ids = ledger.of(source)
    # A view: in-place forms (`unsqueeze_`) would turn the ids that other activations share.
    moved = event.function(ids.view_as(ids), *rest, **kwargs)
    return zip(tensors_in(event.result), tensors_in(moved), strict=True)


def replay(ledger: Ledger, event: Event) -> None:
    """Run the same function on the ids."""
    for result, result_ids in _replayed(ledger, event):
        ledger.set(result, result_ids)


def copying(ledger: Ledger, event: Event) -> None:
    """Run the same function on the ids, where it copies: neutral dims must be found again."""
    for result, result_ids in _replayed(ledger, event):
        ledger.set(result, canonical(result_ids))


def transposed(ledger: Ledger, event: Event) -> None:
    """Transposes: replayed, but for a matrix parameter's, which is remembered, as `x @ W.t()` needs."""
    source = event.args[0] if event.args else event.kwargs["input"]
    name = ledger.name(source)
    if name is not None and source.ndim == 2:
        ledger.turn(event.result, name)
    else:
        replay(ledger, event)


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Dims of two shapes of one size, matched up where the products of their sizes agree.

    >>> _groups((2, 6, 5), (2, 3, 2, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(left), j + len(right)
        while prod(before[d] for d in left) != prod(after[d] for d in right):
            if prod(before[d] for d in left) < prod(after[d] for d in right):
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        groups.append((left, right))
    return groups


def view(ledger: Ledger, event: Event) -> None:
    """`view`, `reshape`, `flatten`, `unflatten`: merged dims repeat ids, split dims tie the pieces.

    A channel dim that is split as [a, b] keeps equal counts: with -1 at a, each run of b channels goes
    together; else position j of each of the a pieces does.
    """
    source = event.args[0] if event.args else event.kwargs["input"]
    if not isinstance(event.result, Tensor):
        return
    ids, shape = ledger.of(source), event.result.shape
    small = compact(ids)
    if max(small.shape, default=1) == 1 or 0 in shape:
        ledger.set(event.result, small.reshape(-1)[:1].squeeze(0).expand(shape) if ids.numel() else ids)
        return
    groups = _groups(ids.shape, shape)
    wildcard = _wildcard(event, len(shape))
    expanded, target = list(small.shape), [1] * len(shape)
    splits: list[int] = []
    for left, right in groups:
        moving = [d for d in left if small.shape[d] > 1]
        wide_in, wide_out = [d for d in left if ids.shape[d] > 1], [d for d in right if shape[d] > 1]
        if not moving:
            continue
        if len(wide_in) > 1 and len(wide_out) > 1:
            ledger.freeze(ids, f"{event.name} mixes dims {tuple(ids.shape)} -> {tuple(shape)}")
            ledger.set(event.result, constant(FIXED, shape))
            return
        for d in left:
            expanded[d] = ids.shape[d]
        for d in right:
            target[d] = shape[d]
        scaling = wildcard if wildcard in wide_out else (wide_out[-1] if wide_out else None)
        splits += [d for d in wide_out if d != scaling]
    moved = small.expand(expanded).reshape(target)
    for dim in splits:
        moved = equal_pieces(ledger, moved, dim)
    ledger.set(event.result, moved.expand(shape))


def _wildcard(event: Event, dims: int) -> int | None:
    """Dim of the result whose size was given as -1."""
    sizes = list(event.args[1:]) + [event.kwargs[name] for name in ("shape", "size") if name in event.kwargs]
    if event.name == "unflatten":
        start = int(event.args[1] if len(event.args) > 1 else event.kwargs["dim"])
        sizes = list(event.args[2] if len(event.args) > 2 else event.kwargs["sizes"])
        start %= dims - len(sizes) + 1
        return start + sizes.index(-1) if -1 in sizes else None
    if event.name not in ("view", "reshape"):
        return None
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    return sizes.index(-1) if -1 in sizes else None


def concatenate(ledger: Ledger, event: Event) -> None:
    """`cat`: ids one after the other along its dim; along the other dims they are tied."""
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
        ledger.set(result, constant(int(ids[0]), result.shape))
    else:
        ledger.set(result, along(ids, dim, result.shape))


def stack(ledger: Ledger, event: Event) -> None:
    """`stack`: position by position the tensors go together."""
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
        if mode != "constant" or before < 0 or after < 0:
            ledger.freeze(ids, f"padding of channels with mode {mode} or by a negative number")
            small = constant(FIXED, tuple(1 for _ in ids.shape))
            break
        added = [0, 0] * (ids.ndim - 1 - dim) + [before, after]
        small = F.pad(small, added, value=FIXED)
    ledger.set(event.result, small.expand(event.result.shape))


def expand(ledger: Ledger, event: Event) -> None:
    """`expand`, `expand_as`: a single channel that is spread over several stays."""
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
    """C * r^2 channels become C: each run of r^2 goes together."""
    factor = int(argument(event, "upscale_factor", event.args[1] if len(event.args) > 1 else 1))
    arriving = vector(ledger, ledger.of(event.args[0]), -3)
    first = equal_pieces(ledger, arriving.reshape(-1, factor * factor), 1).reshape(-1)
    ledger.set(event.result, along(first, -3, event.result.shape))


def pixel_unshuffle(ledger: Ledger, event: Event) -> None:
    """C channels become C * r^2, each with r^2 neighbours."""
    arriving = vector(ledger, ledger.of(event.args[0]), -3)
    factor = event.result.shape[-3] // arriving.numel()
    ledger.set(event.result, along(_repeat(arriving, factor), -3, event.result.shape))


def unfold(ledger: Ledger, event: Event) -> None:
    """`F.unfold`: each channel becomes a run of as many as the kernel has positions."""
    source = event.args[0]
    if source.ndim != 4:
        opaque(ledger, event, "no rule for `unfold` of other than four dims")
        return
    arriving = vector(ledger, ledger.of(source), 1)
    factor = event.result.shape[-2] // arriving.numel()
    ledger.set(event.result, along(_repeat(arriving, factor), -2, event.result.shape))


def channel_shuffle(ledger: Ledger, event: Event) -> None:
    """Groups are interleaved: position j of each goes together."""
    groups = int(argument(event, "groups", event.args[1] if len(event.args) > 1 else 1))
    arriving = vector(ledger, ledger.of(event.args[0]), 1)
    first = equal_pieces(ledger, arriving.reshape(groups, -1), 0).reshape(-1)
    ledger.set(event.result, along(_repeat(first, groups), 1, event.result.shape))


def _repeat(ids: Tensor, times: int) -> Tensor:
    constant_ids = bool((ids <= INPUT).all()) and ids.stride() == (0,)
    return ids[:1].expand(ids.numel() * times) if constant_ids else ids.repeat_interleave(times)
