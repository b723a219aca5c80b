"""From ties to units and families: connected components, without a loop over single channels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cctool.graph.channels import ChannelGraph, Family, Frozen, Labelled, Place
from cctool.graph.ledger import FIXED, INPUT, Ledger, Role

_ROOTS = {
    FIXED: "coupled to channels of fixed number",
    INPUT: "coupled to the model's input channels",
}
_UNUSED = "takes no part in the forward pass"

Ids = NDArray[np.int64]
Bound = tuple[str, int, Ids, Role]
Reason = tuple[tuple[str, str], str]  # (function, module), why


def solve(ledger: Ledger, unused: Sequence[str], note: str) -> ChannelGraph:
    """Solve the book of a pass.

    Args:
        ledger: the filled book.
        unused: parameters that the pass never met.
        note: why a pass in training mode failed, if it did.
    """
    labels, causes, reasons = _components(ledger)
    bindings = _bind(ledger, labels, causes, reasons)
    frozen = [*_report(bindings, causes, reasons), *_report_unused(ledger, unused, note)]
    free = causes < 0
    return ChannelGraph(
        families=_families(bindings, free),
        frozen=tuple(frozen),
        tensors=tuple(Labelled(name, dim, torch.from_numpy(ids)) for name, dim, ids, _ in bindings),
        attributes=tuple(
            Labelled(entry.module, entry.attribute, torch.from_numpy(labels[entry.ids.numpy()]), entry.index)
            for entry in ledger.attributes.values()
        ),
        label_count=int(labels.max()) + 1,
    )


def _numpy(tensors: list[Tensor]) -> Ids:
    return torch.cat(tensors).numpy() if tensors else np.zeros(0, dtype=np.int64)


def _components(ledger: Ledger) -> tuple[Ids, Ids, list[Reason]]:
    """Label of each id; for each label the number of the first reason that freezes it, or -1; the reasons."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    a, b = _numpy([t[0] for t in ledger.ties]), _numpy([t[1] for t in ledger.ties])
    calls = np.repeat([t[2] for t in ledger.ties], [t[0].numel() for t in ledger.ties]).astype(np.int64)
    rooted = (a <= INPUT) | (b <= INPUT)
    free_a, free_b = a[~rooted], b[~rooted]
    links = coo_matrix((np.ones(len(free_a), dtype=np.int8), (free_a, free_b)), shape=(ledger.count,) * 2)
    _, labels = connected_components(links, directed=False)
    labels = labels.astype(np.int64)

    reasons = [(ledger.calls[f.call] if f.call >= 0 else ("", ""), f.reason) for f in ledger.freezes]
    ids = [_numpy([f.ids for f in ledger.freezes])]
    numbers = [np.repeat(np.arange(len(reasons)), [f.ids.numel() for f in ledger.freezes])]
    order = [np.repeat([f.call for f in ledger.freezes], [f.ids.numel() for f in ledger.freezes])]
    for root, reason in _ROOTS.items():
        here = rooted & (np.minimum(a, b) == root)
        for call in np.unique(calls[here]):
            chosen = np.maximum(a, b)[here & (calls == call)]
            ids.append(chosen)
            numbers.append(np.full(len(chosen), len(reasons)))
            order.append(np.full(len(chosen), call))
            reasons.append((ledger.calls[call], reason))
    roots = len(reasons)
    reasons += [
        (("constant", ""), "no layer produces these channels"),
        (("input", ""), "the model's input"),
    ]

    causes = np.full(int(labels.max()) + 1, -1, dtype=np.int64)
    ids_all, numbers_all = np.concatenate(ids), np.concatenate(numbers).astype(np.int64)
    latest_first = np.argsort(np.concatenate(order), kind="stable")[::-1]
    causes[labels[ids_all[latest_first]]] = numbers_all[latest_first]
    causes[labels[FIXED]], causes[labels[INPUT]] = roots, roots + 1
    return labels, causes, reasons


def _bind(ledger: Ledger, labels: Ids, causes: Ids, reasons: list[Reason]) -> list[Bound]:
    """Labels of every bound dim; parameters used elementwise get the one dim that their labels vary in."""
    bound = [(b.tensor, b.dim, labels[b.ids.numpy()], b.role) for b in ledger.bindings.values()]
    for entry in ledger.elements.values():
        table = labels[entry.ids.numpy()].reshape(entry.shape)
        dims = [d for d, n in enumerate(entry.shape) if n > 1 and (table != table.take([0], axis=d)).any()]
        if len(dims) > 1:
            reasons.append((("elementwise", ""), "its elements belong to channels in more than one dim"))
            loose = np.unique(table)
            causes[loose[causes[loose] < 0]] = len(reasons) - 1
        # labels that vary in one dim: it is cut; else every dim is named, so that the report has it
        for dim in dims if len(dims) == 1 else range(table.ndim):
            ids = np.moveaxis(table, dim, 0).reshape(entry.shape[dim], -1)[:, 0]
            bound.append((entry.tensor, dim, np.ascontiguousarray(ids), Role.ELEMENT))
    return bound


def _report(bindings: list[Bound], causes: Ids, reasons: list[Reason]) -> list[Frozen]:
    frozen = []
    for name, dim, ids, _ in bindings:
        cause = causes[ids]
        stuck = cause >= 0
        if stuck.any():
            (op, module), reason = reasons[cause[stuck.argmax()]]
            frozen.append(Frozen(name, dim, int(stuck.sum()), len(ids), op, module, reason))
    return frozen


def _report_unused(ledger: Ledger, unused: Sequence[str], note: str) -> list[Frozen]:
    reason = f"{_UNUSED}, and {note}" if note else _UNUSED
    parameters = dict(ledger.model.named_parameters())
    return [
        Frozen(name, dim, size, size, "unused", name.rpartition(".")[0], reason)
        for name in unused
        for dim, size in enumerate(parameters[name].shape)
    ]


def _families(bindings: list[Bound], free: NDArray[np.bool_]) -> tuple[Family, ...]:
    """Group units by what they touch: a unit's signature is the sum of random words of its places."""
    if not bindings:
        return ()
    labels = np.concatenate([ids for _, _, ids, _ in bindings])
    places = np.repeat(np.arange(len(bindings)), [len(ids) for _, _, ids, _ in bindings])
    indices = np.concatenate([np.arange(len(ids)) for _, _, ids, _ in bindings])
    chosen = free[labels]
    labels, places, indices = labels[chosen], places[chosen], indices[chosen]
    if not len(labels):
        return ()
    words = np.random.default_rng(0).integers(1, 2**62, size=len(bindings), dtype=np.int64)
    signature = np.zeros(len(free), dtype=np.int64)
    np.add.at(signature, labels, words[places])
    # families in order of their first producer; units in order of their first index there
    producer = np.array([role is not Role.FILTER for *_, role in bindings])[places]
    first = np.lexsort((indices, places, producer))
    unit_labels, rank = np.unique(labels[first], return_index=True)
    order = unit_labels[np.argsort(rank)]
    position = np.zeros(len(free), dtype=np.int64)
    position[order] = np.arange(len(order))
    _, family_first, family_of = np.unique(signature[order], return_index=True, return_inverse=True)
    family = np.zeros(len(free), dtype=np.int64)
    family[order] = np.argsort(np.argsort(family_first))[family_of]

    sort = np.lexsort((indices, position[labels], places, producer, family[labels]))
    labels, places, indices = labels[sort], places[sort], indices[sort]
    sizes = np.bincount(family[order])
    owner = family[labels]
    edges = np.flatnonzero(np.diff(owner) | np.diff(places)) + 1
    starts = np.concatenate([[0], edges])
    stops = np.concatenate([edges, [len(labels)]])
    all_labels, all_indices = torch.from_numpy(labels), torch.from_numpy(indices)
    members: dict[int, list[Place]] = {}
    units: dict[int, Tensor] = {}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        name, dim, _, role = bindings[places[start]]
        number = int(owner[start])
        count = int(sizes[number])
        table = all_indices[start:stop].view(count, -1)
        members.setdefault(number, []).append(Place(name, dim, table, role))
        units.setdefault(number, all_labels[start : stop : (stop - start) // count])
    numbers = sorted(members)
    names = _names([members[number] for number in numbers])
    return tuple(
        Family(name, units[number], tuple(members[number]))
        for number, name in zip(numbers, names, strict=True)
    )


def _names(families: list[list[Place]]) -> list[str]:
    """Name of the first producer's module; later families of the same producer get a number."""
    names: list[str] = []
    seen: dict[str, int] = {}
    for places in families:
        tensor = places[0].tensor
        base = tensor.rpartition(".")[0] if places[0].role is not Role.ELEMENT else tensor
        seen[base] = seen.get(base, 0) + 1
        names.append(base if seen[base] == 1 else f"{base}#{seen[base]}")
    return names
