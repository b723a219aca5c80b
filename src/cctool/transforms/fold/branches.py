"""Parallel branches whose results are added: one convolution with the sum of their kernels.

Branches of one input are linear: convolutions (Ding et al. 2019, "ACNet", section 3.3), batch norms alone,
which are 1x1 convolutions with a diagonal kernel (Ding et al. 2021, "RepVGG", section 3.3), and several of
each (Vasu et al. 2023, "MobileOne", section 3.1). One branch keeps its place in the network's code and gets
the sum; the others give nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from cctool.base.networks import qualified
from cctool.checkpoint.edits.fold import Fold
from cctool.graph.execution import tensors_in
from cctool.graph.trace import argument
from cctool.transforms.fold.layers import (
    Candidate,
    Stays,
    TakingLayer,
    carry_out,
    layer_at,
    near,
    weight_and_bias,
    whole_module,
)
from cctool.transforms.fold.norms import RunningNorm, norms_of
from cctool.transforms.fold.passes import CONVOLUTIONS, UNKNOWN, TracedPass

_Axes = tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """One addend of a sum that is linear in its input, as a convolution.

    Attributes:
        name: of its module.
        norm: the batch norm that it is; None for a convolution or linear layer.
        channels: inputs and outputs.
        groups, kernel, stride, dilation: of the convolution; linear layers have kernels without axes.
        before: how far the kernel reaches to lower positions, which is the padding there.
    """

    name: str
    norm: RunningNorm | None
    channels: tuple[int, int]
    groups: int
    kernel: _Axes
    stride: _Axes
    dilation: _Axes
    before: _Axes

    @property
    def products(self) -> int:
        """Multiply-accumulates for one position of the outputs; batch norm counts none."""
        inputs, outputs = self.channels
        return 0 if self.norm is not None else prod(self.kernel) * inputs * outputs // self.groups


@dataclass(frozen=True)
class Merged:
    """The kernel that holds all branches: of the branch that stays, as far as that does."""

    kernel: _Axes
    before: _Axes
    dilation: _Axes


def branch_candidates(model: nn.Module, recorded: TracedPass) -> tuple[list[Candidate], list[Stays]]:
    """Sums of parallel branches that can be merged, and branches that cannot, with the reason."""
    norms = {norm.calls[0]: norm for norm in norms_of(model, recorded)[0].values() if len(norm.calls) == 1}
    found: list[Candidate] = []
    stays: list[Stays] = []
    for root in _roots(recorded):
        parallel: defaultdict[int, list[Branch]] = defaultdict(list)
        refused: defaultdict[int, list[Stays]] = defaultdict(list)
        for number in _addends(recorded, root):
            if number < 0 or recorded.users(number) == [] or len(recorded.users(number)) != 1:
                continue
            source = _source(recorded, number)
            branch = _branch(model, recorded, number, norms)
            if isinstance(branch, Branch) and source != UNKNOWN:
                parallel[source].append(branch)
            elif isinstance(branch, Stays):
                refused[source].append(branch)
        for source, branches in parallel.items():
            stays += refused[source]
            candidate, left = _merging(model, branches)
            stays += left
            if candidate is not None:
                found.append(candidate)
    return found, stays


def _source(recorded: TracedPass, number: int) -> int:
    """The call that made what a branch is given; for a layer that pads by itself, what it pads."""
    call = recorded.calls[number]
    entries = recorded.entries.get(call.module, ())
    if call.function in CONVOLUTIONS and len(entries) == 1:
        return entries[0].given
    return call.sources[0] if call.sources else UNKNOWN


def _roots(recorded: TracedPass) -> Iterator[int]:
    """Sums that are no addends of another sum."""
    for number in range(len(recorded.calls)):
        if _is_sum(recorded, number):
            users = recorded.users(number)
            if not (len(users) == 1 and users[0] >= 0 and _is_sum(recorded, users[0])):
                yield number


def _is_sum(recorded: TracedPass, number: int) -> bool:
    """Whether a call adds two tensors of one shape."""
    call = recorded.calls[number]
    tensors = list(tensors_in(call.event.args))
    return (
        call.function == "add"
        and len(call.sources) == len(tensors) == len(call.event.args) == 2
        and not call.event.kwargs
        and tensors[0].shape == tensors[1].shape
    )


def _addends(recorded: TracedPass, root: int) -> Iterator[int]:
    """Calls whose results a tree of sums adds up."""
    for source in recorded.calls[root].sources:
        number = recorded.through(source)
        if number >= 0 and _is_sum(recorded, number) and len(recorded.users(number)) == 1:
            yield from _addends(recorded, number)
        else:
            yield number


def _branch(
    model: nn.Module, recorded: TracedPass, number: int, norms: dict[int, RunningNorm]
) -> Branch | Stays | None:
    """An addend as a branch; why it is none; None if it is nothing that could be one."""
    call = recorded.calls[number]
    if number in norms and not norms[number].children:
        result = call.event.result
        axes = result.dim() - 2
        ones, width = (1,) * axes, result.shape[1]
        name = norms[number].name
        return Branch(name, norms[number], (width, width), width, ones, ones, ones, (0,) * axes)
    if call.function not in CONVOLUTIONS | {"linear"}:
        return None
    layer = layer_at(model, recorded, number)
    if isinstance(layer, str):
        return Stays(call.module, layer)
    reason = _unfit(recorded, layer, number)
    if reason:
        return Stays(layer.name, reason)
    weight = layer.module.get_parameter("weight")
    if call.function == "linear":
        return Branch(layer.name, None, (weight.shape[1], weight.shape[0]), 1, (), (), (), ())
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_axes(argument(call.event, key, 1), len(kernel)) for key in ("stride", "dilation"))
    groups = int(argument(call.event, "groups", 1))
    padding = argument(call.event, "padding", 0)
    if padding == "same":
        before = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    else:
        before = _axes(0 if padding == "valid" else padding, len(kernel))
    channels = (weight.shape[1] * groups, weight.shape[0])
    return Branch(layer.name, None, channels, groups, kernel, stride, dilation, before)


def _axes(value: int | Sequence[int], count: int) -> _Axes:
    several = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return tuple(map(int, several)) if len(several) == count else (int(several[0]),) * count


def _unfit(recorded: TracedPass, layer: TakingLayer, number: int) -> str:
    mode = getattr(layer.module, "padding_mode", "zeros")
    if mode != "zeros":
        return f"it pads its input by {mode}, not by zeros"
    if len(layer.calls) > 1:
        return f"it is called {len(layer.calls)} times, and only one result belongs to the sum"
    if not whole_module(recorded, layer.name, recorded.calls[number], number):
        return "its code does more than one convolution"
    if layer.masked:
        return "its parameters have masks, which other branches would fill; fold before masks are set"
    return ""


def _merging(model: nn.Module, branches: Sequence[Branch]) -> tuple[Candidate | None, list[Stays]]:
    """The merge of all branches that fit the one that stays, and those that do not."""
    layers = [branch for branch in branches if branch.norm is None]
    if not layers or len(branches) < 2:
        return None, []
    kept = min(layers, key=lambda branch: (branch.groups, -prod(branch.kernel)))
    stays, others = [], []
    for branch in branches:
        if branch is not kept:
            reason = _misfit(kept, branch)
            if reason:
                stays.append(Stays(branch.name, reason))
            else:
                others.append(branch)
    merged = _union(kept, others)
    if isinstance(merged, str):
        # Not all together: those that fit one after another.
        others, left = _fitting(kept, others)
        stays += left
        merged = _union(kept, others)
    if not others or isinstance(merged, str):
        return None, stays
    shape = merged

    def change(network: nn.Module) -> tuple[Sequence[Fold], dict[str, Tensor]]:
        return _merge(network, kept, others, shape)

    names = tuple(branch.name for branch in others)
    short = ", ".join(near(name, kept.name) for name in names)
    text = f"{'branches' if len(names) > 1 else 'branch'} {short}"
    return Candidate(kept.name, (text,), names, change), stays


def _fitting(kept: Branch, others: Sequence[Branch]) -> tuple[list[Branch], list[Stays]]:
    taken: list[Branch] = []
    left: list[Stays] = []
    for branch in others:
        merged = _union(kept, [*taken, branch])
        if isinstance(merged, str):
            left.append(Stays(branch.name, merged))
        else:
            taken.append(branch)
    return taken, left


def _misfit(kept: Branch, other: Branch) -> str:
    """Why a branch cannot become part of the kernel of another; "" if it can."""
    if len(kept.kernel) != len(other.kernel) or kept.channels != other.channels:
        return f"its channels or axes are not those of {kept.name}"
    if kept.stride != other.stride:
        return f"its stride is not that of {kept.name}"
    if other.groups % kept.groups:
        return f"its groups do not fit into those of {kept.name}"
    return ""


def _union(kept: Branch, others: Sequence[Branch]) -> Merged | str:
    """The smallest kernel that holds all branches, grown evenly to both sides; or why there is none."""
    kernel, before, steps = [], [], []
    for axis in range(len(kept.kernel)):
        wide = [b.dilation[axis] for b in (kept, *others) if b.kernel[axis] > 1]
        step = min(wide, default=1)
        low, high = -kept.before[axis], kept.dilation[axis] * (kept.kernel[axis] - 1) - kept.before[axis]
        grown = 0
        for other in others:
            first = -other.before[axis]
            last = first + other.dilation[axis] * (other.kernel[axis] - 1)
            off_grid = (first - low) % step or (other.kernel[axis] > 1 and other.dilation[axis] % step)
            if off_grid:
                return f"its kernel does not lie on the dilated kernel of {kept.name}"
            grown = max(grown, low - first, last - high)
        if kept.kernel[axis] > 1 and kept.dilation[axis] != step:
            return f"its dilation is not that of {kept.name}"
        if grown and kept.dilation[axis] != step:
            return f"its dilation is not that of {kept.name}"
        kernel.append(kept.kernel[axis] + 2 * grown // step)
        before.append(kept.before[axis] + grown)
        steps.append(step)
    apart = kept.products + sum(other.products for other in others)
    if prod(kernel) * kept.products // max(prod(kept.kernel), 1) > apart:
        return f"one kernel of {'x'.join(map(str, kernel))} takes more multiply-accumulates than the branches"
    return Merged(tuple(kernel), tuple(before), tuple(steps))


def _merge(
    network: nn.Module, kept: Branch, others: Sequence[Branch], merged: Merged
) -> tuple[Sequence[Fold], dict[str, Tensor]]:
    layer = network.get_submodule(kept.name)
    weight = layer.get_parameter("weight").detach().double()
    total = weight.new_zeros((*weight.shape[:2], *merged.kernel))
    shifts: list[Tensor] = []
    for branch in (kept, *others):
        if branch.norm is not None:
            scale, shift = branch.norm.factors(network)
            part: Tensor = scale.view(-1, 1, *(1,) * len(merged.kernel))
            shifts.append(shift)
        else:
            part, bias = weight_and_bias(network, branch.name)
            shifts += [] if bias is None else [bias]
        _add(total, part, branch, kept.groups, merged)
    grown = merged.kernel != kept.kernel
    same = getattr(layer, "padding", None) == "same"
    edit = Fold(
        module=kept.name,
        bias=bool(shifts) and layer._parameters.get("bias") is None,
        kernel_size=merged.kernel if grown else None,
        padding=merged.before if grown and not same else None,
    )
    edits = (edit, *(Fold(module=branch.name, becomes="nothing") for branch in others))
    values = {qualified(kept.name, "weight"): total}
    if shifts:
        values[qualified(kept.name, "bias")] = torch.stack(shifts).sum(0)
    carry_out(network, edits, values)
    return edits, values


def _add(total: Tensor, part: Tensor, branch: Branch, groups: int, merged: Merged) -> None:
    """Add the kernel of a branch to its place in a kernel of fewer groups and more positions."""
    inputs, outputs = branch.channels
    places = [slice(None), slice(None)]
    for axis, size in enumerate(branch.kernel):
        step = max(branch.dilation[axis] // merged.dilation[axis], 1)
        start = (merged.before[axis] - branch.before[axis]) // merged.dilation[axis]
        places.append(slice(start, start + step * (size - 1) + 1, step))
    output = torch.arange(outputs, device=total.device)
    # First input of the group that an output belongs to: of the branch, and of the merged convolution.
    own = output // (outputs // branch.groups) * (inputs // branch.groups)
    first = output // (outputs // groups) * (inputs // groups)
    index = (own - first)[:, None] + torch.arange(inputs // branch.groups, device=total.device)
    total[tuple(places)][output[:, None], index] += part
