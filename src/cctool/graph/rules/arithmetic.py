"""Rules of elementwise operations, pooling, reductions and products of activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cctool.graph.execution import Event, tensors_in
from cctool.graph.ledger import FIXED, INPUT, Ledger, compact, constant, varying
from cctool.graph.rules.layers import matmul_parameter, opaque


def _source(event: Event) -> Tensor:
    return next(tensors_in((event.args, dict(event.kwargs))))


def unary(ledger: Ledger, event: Event) -> None:
    """Channels pass: activations, casts, dropout, clones, `zeros_like`."""
    if isinstance(event.result, Tensor):
        source = _source(event)
        if event.result is not source:
            ledger.set(event.result, ledger.of(source).expand(event.result.shape))


def fixed(ledger: Ledger, event: Event) -> None:
    """New tensors of a given size."""
    for result in tensors_in(event.result):
        ledger.set(result, constant(FIXED, result.shape))


def elementwise(ledger: Ledger, event: Event) -> None:
    """Operands tie position by position; an operand spread over the channels of another one stays."""
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
            name = ledger.name(tensor)
            if name is not None:
                ledger.pin(name, tensor)
        else:
            ids = ledger.of(tensor)
            operands.append(ids.reshape([1] * (result.ndim - ids.ndim) + list(ids.shape)))
    ledger.set(result, _combine(ledger, operands, result.shape))


def _combine(ledger: Ledger, operands: list[Tensor], shape: torch.Size) -> Tensor:
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
            return constant(FIXED, shape)
    varied = [part for part in parts if part.numel() > 1]
    first = min(varied, key=Tensor.numel)
    for part in parts:
        if part is not first:
            ledger.tie(first, part)
    return first.expand(shape)


def _combine_constants(ledger: Ledger, operands: list[Tensor], shape: torch.Size) -> Tensor:
    values = [int(compact(ids).reshape(-1)[0]) if ids.numel() else FIXED for ids in operands]
    channels = [value for value in values if value > INPUT]
    if channels:
        same = all(ids.shape == shape for ids in operands)
        for ids, value in zip(operands, values, strict=True):
            if same and value > INPUT:
                ledger.tie(constant(channels[0], (1,)), constant(value, (1,)))
            elif not same:
                ledger.freeze(ids, "a single channel is spread over several")
        return constant(channels[0] if same else FIXED, shape)
    return constant(INPUT if INPUT in values else FIXED, shape)


def spatial(ledger: Ledger, event: Event) -> None:
    """Pooling and resampling: channels pass, all dims behind them must be neutral."""
    source = _source(event)
    ids = ledger.of(source)
    digit = [int(c) for c in event.name if c.isdigit()]
    behind = ids.ndim - (digit[0] if digit else ids.ndim - 2)
    if any(dim >= behind for dim in varying(ids)):
        opaque(ledger, event, f"`{event.name}` runs over the channels")
        return
    for other in tensors_in((event.args[1:], dict(event.kwargs))):
        if other is not source:
            ledger.freeze(ledger.of(other), f"`{event.name}` is steered by this tensor")
    for result in tensors_in(event.result):
        ledger.set(result, compact(ids).expand(result.shape))


def _dims(event: Event, ndim: int, position: int = 1) -> list[int]:
    given: Any = event.kwargs.get("dim", event.kwargs.get("axis"))
    if given is None and len(event.args) > position and not isinstance(event.args[position], torch.dtype):
        given = event.args[position]
    if given is None:
        return list(range(ndim))
    return [d % ndim for d in ([given] if isinstance(given, int) else given)]


def reduction(ledger: Ledger, event: Event) -> None:
    """Sums, means, extrema: over channels they freeze them, over other dims channels pass."""
    tensors = list(tensors_in((event.args, dict(event.kwargs))))
    if len(tensors) > 1:
        elementwise(ledger, event)
        return
    ids = ledger.of(tensors[0])
    dims = _dims(event, ids.ndim, position=2 if event.name == "norm" else 1)
    if any(dim in varying(ids) for dim in dims):
        opaque(ledger, event, f"`{event.name}` runs over the channels")
        return
    small = compact(ids)
    for result in tensors_in(event.result):
        kept = small if result.ndim == ids.ndim else small.reshape(
            [n for d, n in enumerate(small.shape) if d not in dims]
        )  # fmt: skip
        ledger.set(result, kept.expand(result.shape))


def along_dim(ledger: Ledger, event: Event) -> None:
    """Softmax, cumulative sums: over channels they freeze them, along other dims channels pass."""
    ids = ledger.of(_source(event))
    if any(dim in varying(ids) for dim in _dims(event, ids.ndim)):
        opaque(ledger, event, f"`{event.name}` runs over the channels")
    else:
        ledger.set(event.result, ids)


def matrix_product(ledger: Ledger, event: Event) -> None:
    """`matmul`, `mm`, `bmm`: with a matrix parameter it is a linear layer, else see `_product`."""
    a, b = (*event.args, *event.kwargs.values())[:2]
    weight = b if ledger.name(b) is not None or ledger.turned(b) is not None else None
    if weight is not None and weight.ndim == 2 and ledger.name(a) is None and a.ndim > 1:
        matmul_parameter(ledger, event, a, weight, None)
    elif a.ndim < 2 or b.ndim < 2 or ledger.name(a) is not None or weight is not None:
        opaque(ledger, event, f"no rule for `{event.name}` of these operands")
    else:
        _product(ledger, event, ledger.of(a), ledger.of(b))


def add_matrix_product(ledger: Ledger, event: Event) -> None:
    """`addmm(bias, x, W)` with parameters is a linear layer."""
    bias, x, weight = event.args[:3] if len(event.args) >= 3 else (None, None, None)
    known = isinstance(weight, Tensor) and (ledger.name(weight) or ledger.turned(weight))
    if known and ledger.name(bias) is not None and bias.ndim == 1 and not event.kwargs:
        matmul_parameter(ledger, event, x, weight, bias)
    else:
        opaque(ledger, event, "no rule for `addmm` of these operands")


def _product(ledger: Ledger, event: Event, a: Tensor, b: Tensor) -> None:
    shape = event.result.shape
    in_a, in_b = varying(a), varying(b)
    contracted = a.ndim - 1 in in_a or b.ndim - 2 in in_b
    free_a, free_b = [d for d in in_a if d != a.ndim - 1], [d for d in in_b if d != b.ndim - 2]
    if (contracted and (free_a or free_b)) or (free_a and free_b):
        opaque(ledger, event, f"`{event.name}` mixes channels that lie in several dims")
    elif contracted:
        ledger.tie(compact(a).reshape(-1), compact(b).reshape(-1))
        ledger.set(event.result, constant(FIXED, shape))
    elif free_a or (int(compact(a).reshape(-1)[0]) > INPUT and not free_b):
        ledger.set(event.result, a.narrow(-1, 0, 1).expand(shape))
    else:
        ledger.set(event.result, b.narrow(-2, 0, 1).expand(shape))


def leaves_torch(ledger: Ledger, event: Event) -> None:
    """`tolist`, `numpy`: what becomes of the values cannot be seen."""
    for tensor in tensors_in(event.args):
        ledger.freeze(ledger.of(tensor), f"`{event.name}` hands the values to code outside torch")
