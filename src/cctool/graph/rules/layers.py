"""Rules of the layers with weights: weights are bound to the ids of inputs, and outputs get new ids."""

from __future__ import annotations

import torch
from torch import Tensor

from cctool.graph.execution import Event, tensors_in
from cctool.graph.ledger import FIXED, INPUT, Kind, Ledger, Role, compact, constant_ids, varying
from cctool.graph.trace import argument
from cctool.graph.widths import Symbol, Width


def vector(ledger: Ledger, ids: Tensor, dim: int) -> Tensor:
    """Ids along one dim; if they vary along another one, freeze them all and return fixed ids."""
    dim %= ids.ndim
    others = [d for d in varying(ids) if d != dim]
    if others:
        ledger.freeze(ids, f"channels lie in dim {others[0]}, while the layer's lie in dim {dim}")
        return torch.full((ids.shape[dim],), FIXED)
    return compact(ids).reshape(-1).expand(ids.shape[dim])


def ids_along(ids: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """A vector of ids along one dim, expanded to a shape."""
    dim %= len(shape)
    return ids.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def equal_pieces(ledger: Ledger, ids: Tensor, dim: int) -> Tensor:
    """Tie the slices along a dim to each other; returns the first."""
    first = ids.narrow(dim, 0, 1)
    if ids.shape[dim] > 1:
        ledger.tie(first, ids)
    return first


def linear(ledger: Ledger, event: Event) -> None:
    """`linear(x, W, b)`: dim 1 of W reads the last dim of x, dim 0 makes the output channels."""
    weight = argument(event, "weight")
    ids = ledger.of(argument(event, "input"))
    _affine(ledger, event, ids, weight, argument(event, "bias"), consumer_dim=weight.ndim - 1)


def matmul_parameter(ledger: Ledger, event: Event, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`x @ W`, `addmm(b, x, W)`: as linear, with the dims of W swapped."""
    _affine(ledger, event, ledger.of(x), weight, bias, consumer_dim=0)


def _affine(
    ledger: Ledger, event: Event, ids: Tensor, weight: Tensor, bias: Tensor | None, consumer_dim: int
) -> None:
    name = ledger.turned(weight)
    # A transposed parameter: bind the parameter itself, with its dims swapped.
    if name is not None:
        weight, consumer_dim = ledger.model.get_parameter(name), 1 - consumer_dim
    arriving = vector(ledger, ids, -1)
    if weight.ndim != 2:
        ledger.freeze(arriving, "a weight that is not a matrix")
        opaque(ledger, event, "a weight that is not a matrix")
        return
    producer_dim = 1 - consumer_dim
    sent = ledger.produce(weight, producer_dim, weight.shape[producer_dim])
    ledger.bind(weight, consumer_dim, arriving, Role.CONSUMER)
    ledger.bind(weight, producer_dim, sent, Role.FILTER)
    ledger.bind(bias, 0, sent, Role.BIAS)
    for attribute in ("in_features", "embed_dim", "kdim", "vdim"):
        ledger.count_in(event.module, attribute, arriving)
    ledger.count_in(event.module, "out_features", sent)
    ledger.set(event.result, ids_along(sent, -1, event.result.shape))


def _tie_positions(ledger: Ledger, ids: Tensor, groups: int) -> Tensor:
    """Tie position j of all groups, so that groups stay of equal size; returns the first group's ids."""
    pieces = ids.reshape(groups, -1)
    if groups > 1:
        ledger.tie(pieces[:1], pieces)
    return pieces[0]


def _count_groups(ledger: Ledger, event: Event, name: str, ids: Tensor) -> None:
    """The number of groups counts these channels, whatever attribute it comes from."""
    groups = argument(event, name)
    if not isinstance(groups, Width) or not ledger.sized(ids, groups):
        ledger.count_in(event.module, name, ids)


def convolution(ledger: Ledger, event: Event) -> None:
    """Convolution, ordinary, grouped and depthwise.

    Grouped: inputs at the same position of every group are tied, and so are outputs. Depthwise (one input
    channel per group): whole groups are cut, with their outputs.
    """
    weight = argument(event, "weight")
    groups = int(argument(event, "groups", 1))
    x = argument(event, "input")
    channel_dim = x.ndim - (weight.ndim - 1)
    if _slides_over_channels(ledger, event, x, channel_dim):
        return
    arriving = vector(ledger, ledger.of(x), channel_dim)
    outputs, per_group = weight.shape[0], weight.shape[1]
    # Depthwise; over the model's inputs it is an ordinary grouped convolution, as inputs cannot be cut.
    if groups > 1 and per_group == 1 and bool((arriving > INPUT).any()):
        sent = arriving.repeat_interleave(outputs // groups)
        _count_groups(ledger, event, "groups", arriving)
        if outputs == groups and _is_one_filter(ledger, weight):
            ledger.freeze(ledger.of(weight), "it is made the filter of every channel")
            ledger.set(event.result, ids_along(sent, channel_dim, event.result.shape))
            return
    else:
        ledger.bind(weight, 1, _tie_positions(ledger, arriving, groups), Role.CONSUMER)
        sent = ledger.produce(weight, 0, outputs)
        _tie_positions(ledger, sent, groups)
    ledger.bind(weight, 0, sent, Role.FILTER)
    _send(ledger, event, arriving, sent, channel_dim)


def _send(ledger: Ledger, event: Event, arriving: Tensor, sent: Tensor, channel_dim: int) -> None:
    """Bind a convolution's bias and attributes to its channels, and set the ids of its output."""
    ledger.bind(argument(event, "bias"), 0, sent, Role.BIAS)
    ledger.count_in(event.module, "in_channels", arriving)
    ledger.count_in(event.module, "out_channels", sent)
    ledger.set(event.result, ids_along(sent, channel_dim, event.result.shape))


def _is_one_filter(ledger: Ledger, weight: Tensor) -> bool:
    """Whether a computed weight is one filter, repeated for each channel (as blur layers do)."""
    return ledger.name(weight) is None and ledger.known(weight) and 0 not in varying(ledger.of(weight))


def _slides_over_channels(ledger: Ledger, event: Event, x: Tensor, channel_dim: int) -> bool:
    """A kernel that slides along the channels (ECA, arXiv 1910.03151) runs over the kept ones after a cut.

    Only if it does not change their number, and has one input and one output channel itself.
    """
    ids, weight, bias = ledger.of(x), argument(event, "weight"), argument(event, "bias")
    moving = varying(ids)
    if len(moving) != 1 or moving[0] <= channel_dim or weight.shape[:2] != (1, 1):
        return False
    if event.result.shape != x.shape or any(ledger.name(t) is None for t in (weight, bias) if t is not None):
        return False
    runs_over(ledger, moving[0], compact(ids).reshape(-1), reason="its kernel slides over the channels")
    for tensor in (weight, bias):
        if tensor is not None:
            ledger.pin(tensor)
    ledger.set(event.result, ids)
    return True


def transposed_convolution(ledger: Ledger, event: Event) -> None:
    """Transposed convolution: dim 0 of the weight reads, dim 1 makes the outputs of one group."""
    weight = argument(event, "weight")
    groups = int(argument(event, "groups", 1))
    x = argument(event, "input")
    channel_dim = x.ndim - (weight.ndim - 1)
    arriving = vector(ledger, ledger.of(x), channel_dim)
    per_group = weight.shape[1]
    if groups == weight.shape[0] and groups > 1 and bool((arriving > INPUT).any()):
        sent = arriving.repeat_interleave(per_group)
        ledger.bind(weight, 0, arriving, Role.FILTER)
        _count_groups(ledger, event, "groups", arriving)
    else:
        _tie_positions(ledger, arriving, groups)
        ledger.bind(weight, 0, arriving, Role.CONSUMER)
        one_group = ledger.produce(weight, 1, per_group)
        ledger.bind(weight, 1, one_group, Role.FILTER)
        sent = one_group.repeat(groups)
    _send(ledger, event, arriving, sent, channel_dim)


def channel_norm(ledger: Ledger, event: Event) -> None:
    """Batch and instance norm: each channel by itself, so their tensors are bound to the input's channels."""
    x = argument(event, "input")
    arriving = vector(ledger, ledger.of(x), 1)
    roles = {"running_mean": Role.STATISTIC, "running_var": Role.STATISTIC}
    for name, role in {**roles, "weight": Role.SCALE, "bias": Role.SHIFT}.items():
        ledger.bind(argument(event, name), 0, arriving, role)
    ledger.count_in(event.module, "num_features", arriving)
    ledger.set(event.result, ids_along(arriving, 1, event.result.shape))


def group_norm(ledger: Ledger, event: Event) -> None:
    """Group norm: whole groups are cut, as their size must stay; a single group is a layer norm."""
    x, groups = argument(event, "input"), int(argument(event, "num_groups"))
    arriving = vector(ledger, ledger.of(x), 1)
    pieces = arriving.reshape(groups, -1)
    if groups > 1:
        ledger.tie(pieces[:, :1], pieces)
    elif bool((arriving > INPUT).any()):
        runs_over(ledger, 1, arriving)
    for name in ("weight", "bias"):
        ledger.bind(argument(event, name), 0, arriving, Role.NORM)
    ledger.count_in(event.module, "num_channels", arriving)
    if groups > 1:
        _count_groups(ledger, event, "num_groups", pieces[:, 0])
    ledger.set(event.result, ids_along(arriving, 1, event.result.shape))


def layer_norm(ledger: Ledger, event: Event) -> None:
    """Layer and RMS norm: the statistics run over the channels, after a cut over the kept ones."""
    x = argument(event, "input", event.args[0] if event.args else None)
    ids = ledger.of(x)
    shape = argument(event, "normalized_shape", event.args[1] if len(event.args) > 1 else ())
    first = ids.ndim - len(shape)
    moving = varying(ids)
    inside = [dim for dim in moving if dim >= first]
    if inside and len(moving) > 1:
        ledger.freeze(ids, "its statistics run over channels that lie in several dims")
    elif inside:
        (dim,), channels = inside, compact(ids).reshape(-1)
        runs_over(ledger, dim, channels)
        width = shape[dim - first]
        if not isinstance(width, Width) or not ledger.sized(channels, width):
            ledger.count_in(event.module, "normalized_shape", channels, dim - first)
    for tensor in tensors_in((event.args[2:], dict(event.kwargs))):
        name = ledger.name(tensor)
        if name is not None and tensor is not x:
            for dim in range(tensor.ndim):
                others = [d for d in varying(ids) if d != first + dim]
                fixed = torch.full((tensor.shape[dim],), FIXED)
                ledger.bind(tensor, dim, fixed if others else vector(ledger, ids, first + dim), Role.NORM)
    ledger.set(event.result, ids)


def runs_over(
    ledger: Ledger,
    dim: int,
    channels: Tensor,
    kind: Kind = Kind.KEPT,
    reason: str = "its statistics run over the channels",
) -> None:
    """Note that the current call computes statistics over channels, which are all in one dim."""
    ledger.statistic(kind, dim, {Symbol(ledger, channels.numel(), channels): 1}, reason)


def prelu(ledger: Ledger, event: Event) -> None:
    """PReLU: a single slope is never cut, one per channel is cut with its channel."""
    ids, weight = ledger.of(argument(event, "input")), argument(event, "weight")
    if weight.numel() > 1:
        arriving = vector(ledger, ids, 1)
        ledger.bind(weight, 0, arriving, Role.NORM)
        ledger.count_in(event.module, "num_parameters", arriving)
    else:
        ledger.pin(weight)
    ledger.set(event.result, ids)


def embedding(ledger: Ledger, event: Event) -> None:
    """Embedding: columns of the table are output channels; rows are looked up by number and stay."""
    weight = argument(event, "weight")
    sent = ledger.produce(weight, 1, weight.shape[1])
    ledger.bind(weight, 0, torch.full((weight.shape[0],), FIXED), Role.CONSUMER)
    ledger.bind(weight, 1, sent, Role.FILTER)
    ledger.count_in(event.module, "embedding_dim", sent)
    ledger.set(event.result, ids_along(sent, -1, event.result.shape))


def opaque(ledger: Ledger, event: Event, reason: str) -> None:
    """No rule: freeze all inputs; the ids of the outputs are fixed."""
    for tensor in tensors_in((event.args, dict(event.kwargs))):
        if ledger.name(tensor) is not None:
            ledger.pin(tensor)
        elif tensor.ndim:
            ledger.freeze(ledger.of(tensor), reason)
    for result in tensors_in(event.result):
        if ledger.name(result) is None:
            ledger.set(result, constant_ids(FIXED, result.shape))
