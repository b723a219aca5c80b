"""Empty units: those that can be cut without changing what the network computes, because masks emptied them.

A unit is empty if all weights that read it are zero, or if it emits zero and its readers get this zero. The
first follows from the weights. For the second, filters, biases, scales and shifts must be zero; whether the
zero reaches the readers (through a sigmoid it does not) is found out by comparison: the cut network must
compute what the present one does, in float64 if the network's code allows it. Families that fail are not cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cctool.base.detectors import before_boxes
from cctool.base.errors import PruningError
from cctool.base.networks import in_mode
from cctool.base.outputs import named_tensors as named_outputs
from cctool.graph.channels import couple
from cctool.graph.ledger import Role
from cctool.graph.records import ChannelGraph, Family, Place
from cctool.pruning.cut.surgery import CutPlan, copy_with, cut_tensor, named_tensors, plan_cut
from cctool.pruning.cut.verify import BATCH_SIZES, blame, compare_outputs, does_not_run, only, probe_inputs
from cctool.pruning.select.order import Selection, matching

EXACT = 1e-9
"""Largest difference allowed in float64, relative to the largest output: shorter sums round differently."""
_EXACT_NARROW = 1e-5  # the same in other precisions
_LEVELS = 3  # of caution in `_Empty.kept`, before a family keeps all its units


@dataclass(frozen=True)
class Emptied:
    """Units that can be cut without changing what the network computes.

    Attributes:
        graph: the coupled channels.
        selection: the units to keep.
        plan: the cut.
        error: largest difference of the cut from the present network, relative to the largest output.
        precision: the dtype of that comparison; "" if nothing is empty.
        notes: units that look empty but are kept, and why.
    """

    graph: ChannelGraph
    selection: Selection
    plan: CutPlan
    error: float
    precision: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Empty:
    """Units of one family by why they may be empty; bool [units] each.

    Attributes:
        unread: every weight that reads them is zero.
        silent: their filters, biases, scales and shifts are all zero.
        behind_norm: biases, scales and shifts are zero, filters need not be: a batch norm may silence them.
        constant: their first filter is zero, but a bias or shift after it is not.
    """

    unread: Tensor
    silent: Tensor
    behind_norm: Tensor
    constant: Tensor

    def kept(self, level: int) -> Tensor:
        """Units to keep at a level of caution, from 0; at least the first unit."""
        unread_or_silent = self.unread | self.silent
        levels = (unread_or_silent | self.behind_norm, unread_or_silent, self.unread)
        kept = ~levels[level] if level < len(levels) else torch.ones_like(self.unread)
        if not bool(kept.any()):
            kept[0] = True
        return kept


def find_emptied(
    model: nn.Module, inputs: Sequence[Tensor], *, exclude: Sequence[str] = (), only: Sequence[str] = ()
) -> Emptied:
    """Find the units that can be cut without changing what the network computes; the model is not changed.

    Args:
        model: any module, with masks or zeros of any origin.
        inputs: positional arguments of its forward, on its device.
        exclude: glob patterns of parameters, modules or families that keep their width.
        only: glob patterns; if given, families that match none keep their width.

    Raises:
        UsageError: a pattern matches nothing.
        PruningError: the network does not run at the batch sizes of the comparison.
    """
    # Statistics over channels change with the number of channels, even if a channel is zero.
    graph = couple(model, inputs, exact=True)
    spared = matching(model, graph, exclude)
    if only:
        spared |= set(range(len(graph.families))) - matching(model, graph, only)
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model)}
    found = [_look_at(family, tensors) for family in graph.families]
    trial = _CutCheck(model, inputs)
    level = [_LEVELS if number in spared else 0 for number in range(len(found))]
    # Start by cutting all that looks empty, and become more cautious in families that change the outputs.
    while True:
        kept = (empty.kept(n) for empty, n in zip(found, level, strict=True))
        selection = Selection(tuple(kept), {})
        plan = plan_cut(model, graph, selection)
        error, precision = trial.compare(plan) if plan.tensors else (0.0, "")
        if not plan.tensors or trial.exact(error, precision):
            break
        guilty = _guilty(trial, graph, selection)
        if not guilty:
            raise PruningError(
                "cutting what masks left empty changes the outputs, and no family is to blame: does the "
                "network give other outputs at each call?"
            )
        for number in guilty:
            level[number] += 1  # at `_LEVELS` all units are kept, so that the loop ends
    notes = [
        note
        for number, (family, empty) in enumerate(zip(graph.families, found, strict=True))
        if number not in spared
        for note in _notes(family, empty, selection.kept[number])
    ]
    return Emptied(graph, selection, plan, error, precision, tuple(notes))


def _guilty(trial: _CutCheck, graph: ChannelGraph, selection: Selection) -> list[int]:
    """Families whose cut changes outputs."""
    cut = [n for n, kept in enumerate(selection.kept) if not bool(kept.all())]
    return blame(cut, lambda numbers: trial.passes(graph, only(selection, numbers)))


def _look_at(family: Family, tensors: dict[str, Tensor]) -> _Empty:
    zero: dict[Role, list[Tensor]] = {}
    for place in family.places:
        zero.setdefault(place.role, []).append(_zero(place, tensors[place.tensor]))

    def every(*roles: Role) -> Tensor:
        rows = [row for role in roles for row in zero.get(role, ())]
        return torch.stack(rows).all(0) if rows else torch.ones(family.units, dtype=torch.bool)

    none = torch.zeros(family.units, dtype=torch.bool)
    quiet = every(Role.BIAS, Role.SCALE, Role.SHIFT, Role.NORM, Role.ELEMENT)
    silent = every(Role.FILTER) & quiet if Role.FILTER in zero else none
    return _Empty(
        unread=every(Role.CONSUMER) if Role.CONSUMER in zero else none,
        silent=silent,
        behind_norm=quiet if Role.SCALE in zero else none,
        constant=zero[Role.FILTER][0] & ~silent if Role.FILTER in zero else none,
    )


def _zero(place: Place, tensor: Tensor) -> Tensor:
    """Which units own nothing but zeros of one tensor; shape [units]."""
    others = [dim for dim in range(tensor.ndim) if dim != place.dim]
    used = (tensor != 0).any(others) if others else tensor != 0
    return ~used.cpu()[place.indices].any(1)


def _notes(family: Family, empty: _Empty, kept: Tensor) -> list[str]:
    least = empty.kept(0)
    constant, changing = int((least & empty.constant).sum()), int((kept & ~least).sum())
    notes = []
    if constant:
        notes.append(
            f"{family.name}: {constant} empty filters stay: a bias, a batch norm's shift or another filter "
            "of the same channels is not zero"
        )
    if changing:
        notes.append(f"{family.name}: {changing} units that look empty stay: cutting them changes outputs")
    if bool((empty.unread | empty.silent | empty.behind_norm).all()):
        notes.append(f"{family.name}: all its units are empty, and one must stay")
    return notes


class _CutCheck:
    """Compares cut networks with the present one."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self._model = model
        own = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
        batches = [probe_inputs(inputs, size) for size in BATCH_SIZES]
        self._tensors = {name: _double(tensor) for name, tensor in own.items()}
        self._batches = [tuple(map(_double, batch)) for batch in batches]
        try:
            self._expected = self._outputs(copy_with(model, self._tensors))
        except Exception:  # a dtype written into the network's code
            self._tensors, self._batches = own, batches
            try:
                self._expected = self._outputs(model)
            except Exception as error:  # the user's code may fail in any way
                raise does_not_run(error) from error

    def _outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """The outputs for both batches; those of detectors before they choose among boxes."""
        with in_mode(model, training=False), before_boxes(model):
            found = [named_outputs(model(*batch)) for batch in self._batches]
        sizes = zip(BATCH_SIZES, found, strict=True)
        return {f"{name} (batch of {size})": value for size, named in sizes for name, value in named.items()}

    def compare(self, plan: CutPlan) -> tuple[float, str]:
        """Largest difference of the cut network, relative to the largest output, and its precision."""
        cut = {n: cut_tensor(t, plan.tensors.get(n, ())) for n, t in self._tensors.items()}
        expected = self._expected.values()
        dtype = str(next((v.dtype for v in expected if v.is_floating_point()), "")).rpartition(".")[2]
        try:
            outputs = self._outputs(copy_with(self._model, cut, plan))
        except Exception:  # code that holds widths may fail in any way
            return float("inf"), dtype
        found = compare_outputs(self._expected, outputs)
        if found.outputs and all(output.not_compared for output in found.outputs):
            raise PruningError(
                "whether the channels that masks left empty can be cut is not known: none of the network's "
                f"outputs can be compared ({found.outputs[0].name}: {found.outputs[0].not_compared})"
            )
        return float("inf") if found.too_different else found.error, dtype

    def exact(self, error: float, precision: str) -> bool:
        """Whether a difference is only rounding."""
        return error <= (EXACT if precision == "float64" else _EXACT_NARROW)

    def passes(self, graph: ChannelGraph, selection: Selection) -> bool:
        """Whether cutting to this selection leaves the outputs as they are."""
        return self.exact(*self.compare(plan_cut(self._model, graph, selection)))


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
