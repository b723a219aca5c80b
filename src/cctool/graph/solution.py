"""From ties to units and families: connected components, without a loop over single channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cctool.graph.ledger import FIXED, INPUT, Freeze, Ledger, Role, StatisticEntry
from cctool.graph.records import ChannelGraph, Family, Frozen, Labelled, Place, Statistic

_ROOTS = {FIXED: "coupled to channels of fixed number", INPUT: "coupled to the model's input channels"}
_UNUSED = "takes no part in the forward pass"

Ids = NDArray[np.int64]
Bound = tuple[str, int, Ids, Role]
Reason = tuple[tuple[str, str], str]  # (function, module), why


def solve(ledger: Ledger, unused: Sequence[str], note: str) -> ChannelGraph:
    """Solve a filled ledger for units and families.

    Args:
        ledger: of a finished pass.
        unused: parameters that the pass never met.
        note: why the pass in training mode failed, "" if it did not.
    """
    if ledger.exact:
        _freeze_statistics(ledger)
    _tie_equal_widths(ledger)
    labels, causes, reasons = _components(ledger)
    bindings = _bind(ledger, labels, causes, reasons)
    frozen = [*_report(bindings, causes, reasons), *_report_unused(ledger, unused, note)]
    free = causes < 0
    families = _families(bindings, free)
    return ChannelGraph(
        families=families,
        frozen=tuple(frozen),
        tensors=tuple(Labelled(name, dim, torch.from_numpy(ids)) for name, dim, ids, _ in bindings),
        attributes=tuple(
            Labelled(entry.module, entry.attribute, torch.from_numpy(labels[entry.ids.numpy()]), entry.index)
            for entry in ledger.attributes.values()
        ),
        label_count=int(labels.max()) + 1,
        statistics=() if ledger.exact else tuple(_statistics(ledger, labels, free, families)),
    )


def _widths(ledger: Ledger, statistic: StatisticEntry) -> list[tuple[Ids, float]]:
    """Ids and exponent of each width that a call depends on, without attributes that count no channels."""
    found = []
    for symbol, exponent in statistic.powers.items():
        entry = ledger.attributes.get((symbol.module, symbol.attribute, None))
        ids = symbol.ids if symbol.ids is not None else entry.ids if entry is not None else None
        if ids is not None:
            found.append((ids.numpy(), exponent))
    return found


def _freeze_statistics(ledger: Ledger) -> None:
    for statistic in ledger.statistics:
        for ids, _ in _widths(ledger, statistic):
            reason = f"{statistic.reason}, and exact results were asked for"
            ledger.freezes.append(Freeze(torch.from_numpy(ids), statistic.call, reason))


def _statistics(
    ledger: Ledger, labels: Ids, free: NDArray[np.bool_], families: Sequence[Family]
) -> Iterator[Statistic]:
    names = {label: family.name for family in families for label in family.labels.tolist()}
    for noted in ledger.statistics:
        widths = [(labels[ids], exponent) for ids, exponent in _widths(ledger, noted)]
        touched = np.unique(np.concatenate([own for own, _ in widths])) if widths else np.zeros(0, np.int64)
        touched = touched[free[touched]]
        if len(touched):
            yield Statistic(
                *(ledger.calls[noted.call][0], noted.ordinal, ledger.calls[noted.call][1]),
                kind=noted.kind,
                place=noted.place,
                widths=tuple((torch.from_numpy(own), exponent) for own, exponent in widths),
                families=tuple(dict.fromkeys(names[label] for label in touched.tolist() if label in names)),
                reason=noted.reason,
            )


def _tie_equal_widths(ledger: Ledger) -> None:
    """Tie the channels of widths that must stay equal, unless existing ties ensure it."""
    pending = ledger.equal_widths
    # Tying merges units, after which a tied pair may be unequal again: repeat until none is.
    while pending:
        labels = _labels(ledger)
        pending = [e for e in pending if not _same_counts(labels[e.ids.numpy()], labels[e.others.numpy()])]
        tied = []
        for equal in pending:
            wide, narrow = sorted((equal.ids, equal.others), key=Tensor.numel, reverse=True)
            if wide.numel() % narrow.numel():
                reason = "the code fixes its ratio to another width"
                ledger.freezes += [Freeze(ids, equal.call, reason) for ids in (wide, narrow)]
            else:
                pieces = wide.reshape(-1, narrow.numel())
                ledger.ties.append((pieces.reshape(-1), narrow.repeat(len(pieces)), equal.call))
                tied.append(equal)
        pending = tied


def _same_counts(a: Ids, b: Ids) -> bool:
    """Whether each unit has the same share in both widths, so that no cut changes their ratio."""
    (units, count), (others, other_count) = np.unique(a, return_counts=True), np.unique(b, return_counts=True)
    return np.array_equal(units, others) and np.array_equal(count * len(b), other_count * len(a))


def _labels(ledger: Ledger) -> Ids:
    """Label of each id: tied ids share one, those tied to fixed ones included."""
    return _connected(*_tied(ledger), ledger.count)


def _tied(ledger: Ledger) -> tuple[Ids, Ids]:
    return _numpy([t[0] for t in ledger.ties]), _numpy([t[1] for t in ledger.ties])


def _connected(a: Ids, b: Ids, count: int) -> Ids:
    """Number of the connected component of each of `count` nodes whose edges are the pairs (a, b)."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(count, count))
    return connected_components(links, directed=False)[1].astype(np.int64)  # type: ignore[no-any-return]


def _numpy(tensors: list[Tensor]) -> Ids:
    return torch.cat(tensors).numpy() if tensors else np.zeros(0, dtype=np.int64)


def _components(ledger: Ledger) -> tuple[Ids, Ids, list[Reason]]:
    """Label of each id; for each label the index of the first reason that freezes it, or -1; the reasons."""
    a, b = _tied(ledger)
    calls = np.repeat([t[2] for t in ledger.ties], [t[0].numel() for t in ledger.ties]).astype(np.int64)
    # Ties to constants or inputs freeze; as edges they would join all frozen channels into one component.
    rooted = (a <= INPUT) | (b <= INPUT)
    labels = _connected(a[~rooted], b[~rooted], ledger.count)

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
    reasons += [(("constant", ""), "no layer produces these channels"), (("input", ""), "the model's input")]

    causes = np.full(int(labels.max()) + 1, -1, dtype=np.int64)
    ids_all, numbers_all = np.concatenate(ids), np.concatenate(numbers).astype(np.int64)
    # Later assignments win, so that the earliest call's reason stays.
    latest_first = np.argsort(np.concatenate(order), kind="stable")[::-1]
    causes[labels[ids_all[latest_first]]] = numbers_all[latest_first]
    causes[labels[FIXED]], causes[labels[INPUT]] = roots, roots + 1
    return labels, causes, reasons


def _bind(ledger: Ledger, labels: Ids, causes: Ids, reasons: list[Reason]) -> list[Bound]:
    """Labels of every bound dim; parameters used elementwise: of the dim that they vary in."""
    bound = [(b.tensor, b.dim, labels[b.ids.numpy()], b.role) for b in ledger.bindings.values()]
    for entry in ledger.elements.values():
        table = labels[entry.ids.numpy()].reshape(entry.shape)
        dims = [d for d, n in enumerate(entry.shape) if n > 1 and (table != table.take([0], axis=d)).any()]
        if len(dims) > 1:
            reasons.append((("elementwise", ""), "its elements belong to channels in more than one dim"))
            loose = np.unique(table)
            causes[loose[causes[loose] < 0]] = len(reasons) - 1
        # Labels that vary in one dim: that dim is cut. Otherwise every dim is listed, for the report.
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
    """Group units that touch the same places, told by a hash: the sum of a random number for each place."""
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
    # Families in the order of their first producer, units in the order of their first index in it.
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
    """Name of the first producer's module; further families of the same producer get a number."""
    names: list[str] = []
    seen: dict[str, int] = {}
    for places in families:
        tensor = places[0].tensor
        base = tensor.rpartition(".")[0] if places[0].role is not Role.ELEMENT else tensor
        seen[base] = seen.get(base, 0) + 1
        names.append(base if seen[base] == 1 else f"{base}#{seen[base]}")
    return names
