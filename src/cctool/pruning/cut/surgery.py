"""Cutting and masking: a plan as data, and the functions that carry it out.

A plan has, for each tensor, the indices to keep in each dim, and for each module the integer attributes that
change. The same plan cuts whatever has a parameter's shape: masks, momentum, Adam moments, stored integers,
per-channel scales (`cut_tensor`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cctool.base.errors import PruningError
from cctool.base.networks import copied
from cctool.checkpoint.edits.mask import mask_name, masked_places
from cctool.checkpoint.edits.thin import Cut
from cctool.graph.ledger import Role
from cctool.graph.records import ChannelGraph
from cctool.pruning.select.order import Selection

Attribute = int | tuple[int, ...]


@dataclass(frozen=True)
class CutPlan:
    """The indices kept of each tensor, and the new integer attributes of each module.

    Attributes:
        tensors: cuts by qualified name of parameters and buffers, including all aliases of shared ones and
            the masks of masked ones.
        attributes: new values by qualified module name, then attribute name.
    """

    tensors: Mapping[str, tuple[Cut, ...]]
    attributes: Mapping[str, Mapping[str, Attribute]]


def removed_labels(graph: ChannelGraph, selection: Selection) -> Tensor:
    """Which labels are removed; bool, shape [label_count]."""
    removed = torch.zeros(graph.label_count, dtype=torch.bool)
    for family, kept in zip(graph.families, selection.kept, strict=True):
        removed[family.labels[~kept]] = True
    return removed


def plan_cut(model: nn.Module, graph: ChannelGraph, selection: Selection) -> CutPlan:
    """Plan the removal of the units that a selection does not keep."""
    removed = removed_labels(graph, selection)
    cuts: dict[str, list[Cut]] = defaultdict(list)
    for entry in graph.tensors:
        gone = removed[entry.labels]
        if bool(gone.any()):
            cuts[entry.name].append(Cut(int(entry.key), (~gone).nonzero().flatten(), len(gone)))
    attributes: dict[str, dict[str, Attribute]] = defaultdict(dict)
    for entry in graph.attributes:
        kept_count = int((~removed[entry.labels]).sum())
        if kept_count != entry.labels.numel():
            planned = attributes[entry.name]
            present = planned.get(str(entry.key), getattr(model.get_submodule(entry.name), str(entry.key)))
            planned[str(entry.key)] = kept_count if entry.index is None else _with_entry(
                present, entry.index, kept_count
            )  # fmt: skip
    return CutPlan(_with_aliases(model, cuts), dict(attributes))


def _with_entry(sizes: Attribute, index: int, value: int) -> tuple[int, ...]:
    """A tuple of sizes (`normalized_shape`) with one of them replaced."""
    several = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return (*several[:index], value, *several[index + 1 :])


def _with_aliases(model: nn.Module, cuts: Mapping[str, Sequence[Cut]]) -> dict[str, tuple[Cut, ...]]:
    first: dict[int, str] = {}
    planned: dict[str, tuple[Cut, ...]] = {}
    for name, tensor in named_tensors(model):
        original = first.setdefault(id(tensor), name)
        if original in cuts:
            planned[name] = tuple(cuts[original])
    for place in masked_places(model, remove_duplicate=False):
        if place.name in planned:
            planned[mask_name(place.name)] = planned[place.name]
    return planned


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by qualified name, shared ones under each of their names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def cut_tensor(tensor: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """The kept part of a tensor of the parameter's shape (a gradient, momentum, mask, stored integers).

    Example: `cut_tensor(torch.arange(4.), [Cut(0, torch.tensor([0, 2]), 4)])` is `tensor([0., 2.])`.

    Raises:
        PruningError: the tensor does not have the size that the plan was made for.
    """
    for cut in cuts:
        if tensor.ndim <= cut.dim or tensor.shape[cut.dim] != cut.size:
            raise PruningError(
                f"a tensor of shape {tuple(tensor.shape)} has no dim {cut.dim} of size {cut.size}: "
                "the plan was made for another model, plan again"
            )
        tensor = tensor.index_select(cut.dim, cut.keep.to(tensor.device))
    return tensor


def apply_cut(model: nn.Module, plan: CutPlan) -> None:
    """Shrink parameters, their gradients, buffers and integer attributes in place.

    Shrunk parameters are new `nn.Parameter` objects: build a new optimizer over them. Tied ones stay tied.
    """
    shrunk: dict[int, Tensor] = {}
    originals = dict(named_tensors(model))
    for name, cuts in plan.tensors.items():
        original = originals[name]
        if id(original) not in shrunk:
            shrunk[id(original)] = _shrink(original, cuts)
        _replace(model, name, shrunk[id(original)])
    _set_attributes(model, plan)


def _shrink(tensor: Tensor, cuts: Sequence[Cut]) -> Tensor:
    small = cut_tensor(tensor.detach(), cuts)
    if not isinstance(tensor, nn.Parameter):
        return small
    parameter = nn.Parameter(small, requires_grad=tensor.requires_grad)
    if tensor.grad is not None:
        parameter.grad = cut_tensor(tensor.grad, cuts)
    return parameter


def _replace(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(tensor, nn.Parameter):
        setattr(module, attribute, tensor)  # recurrent layers update a list as well
    else:
        module._buffers[attribute] = tensor


def _set_attributes(model: nn.Module, plan: CutPlan) -> None:
    for name, values in plan.attributes.items():
        module = model.get_submodule(name)
        for attribute, value in values.items():
            present = getattr(module, attribute)
            setattr(module, attribute, list(value) if isinstance(present, list) else value)  # type: ignore[arg-type]


def copy_with(model: nn.Module, tensors: Mapping[str, Tensor], plan: CutPlan | None = None) -> nn.Module:
    """A copy of a model that shares its tensors, except for those given; attributes follow the plan.

    A shared tensor is given by its first name.
    """
    memo: dict[int, object] = {}
    for name, tensor in named_tensors(model):
        if id(tensor) in memo:
            continue
        given = tensors.get(name)
        if given is not None and isinstance(tensor, nn.Parameter):
            given = nn.Parameter(given, requires_grad=False)
        memo[id(tensor)] = tensor if given is None else given
    copy = copied(model, memo)
    if plan is not None:
        _set_attributes(copy, plan)
    return copy


def places_removed(graph: ChannelGraph, selection: Selection) -> dict[str, list[tuple[int, Tensor]]]:
    """For each tensor that removed units touch, (dim, indices) of the elements that they own.

    Filters, biases, batch-norm gammas *and betas*, and weights that read the units: a batch norm with beta
    would still emit a constant. Running statistics stay, as gamma = 0 cancels them.
    """
    places: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for family, kept in zip(graph.families, selection.kept, strict=True):
        if not bool(kept.all()):
            for place in family.places:
                if place.role is not Role.STATISTIC:
                    places[place.tensor].append((place.dim, place.indices[~kept].flatten()))
    return places


def zeroed(tensor: Tensor, places: Sequence[tuple[int, Tensor]]) -> Tensor:
    """A copy of a tensor with zeros at the given (dim, indices)."""
    masked = tensor.detach().clone()
    for dim, indices in places:
        masked.index_fill_(dim, indices.to(masked.device), 0)
    return masked


def sketch(model: nn.Module, plan: CutPlan) -> nn.Module:
    """A network of the widths after a cut, for counting: its tensors are views of the dense ones.

    It takes no memory; its outputs mean nothing.
    """
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    narrow = {}
    for name, cuts in plan.tensors.items():
        if name in tensors:
            view = tensors[name].detach()
            for cut in cuts:
                view = view.narrow(cut.dim, 0, cut.keep.numel())
            narrow[name] = view
    return copy_with(model, narrow, plan)
