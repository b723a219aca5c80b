"""Folding a network: computed tensors, then batch norms and branches in turn, each checked on its outputs.

Every fold is tried on a copy in float64 and kept if all outputs stay the same up to rounding: what the code
of a network does with a module is seen by running it, never by the module's class. It is run on random inputs
of several scales, constants and images (`probes.py`). Networks whose code does not run in float64 are folded
in their own type, with that type's rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cctool.base.networks import copied, in_mode, qualified
from cctool.checkpoint.edits.computed import computed_tensors, computed_values, parts_of
from cctool.checkpoint.edits.fold import Fold
from cctool.checkpoint.edits.mask import masked_places
from cctool.graph.execution import execute
from cctool.transforms.fold.branches import branch_candidates
from cctool.transforms.fold.checks import FoldChecks
from cctool.transforms.fold.layers import Candidate, Stays, carry_out, layer_at
from cctool.transforms.fold.norms import norm_candidates, normalises
from cctool.transforms.fold.passes import LAYERS, TracedPass, pass_of

_ROUNDS = 100


@dataclass
class TakenIn:
    """What was folded into one layer: in words, and the modules that it came from."""

    what: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Folding:
    """What folding did to a network.

    Attributes:
        edits: final state of each module that changed.
        tensors: names of the parameters that got other values.
        layers: what was folded into each layer, by its name.
        stays: what was not folded, and why.
        norms_left: number of modules that still normalise by batch norm.
        double_error: largest difference of outputs in float64, of their range; None where it could not run.
        error: the same in the network's own type.
        noise: how far the network itself was from float64 there; None where that could not run.
        images: number of images among the inputs that it was checked on.
        decides: modules whose code asks for the values of tensors that depend on the input, as `if` does.
    """

    edits: tuple[Fold, ...]
    tensors: tuple[str, ...]
    layers: dict[str, TakenIn]
    stays: tuple[Stays, ...]
    norms_left: int
    double_error: float | None
    error: float
    noise: float | None
    images: int = 0
    decides: tuple[str, ...] = ()


def fold_network(model: nn.Module, input_shape: Sequence[int], images: Sequence[Tensor] = ()) -> Folding:
    """Bake what can be baked into plain layers, in place.

    Args:
        model: without quantizers and codecs.
        input_shape: (C, H, W) of one input.
        images: batches (B, C, H, W), as the network is given them, on which outputs have to stay, too.

    Raises:
        ArchitectureError: if the network does not run on such inputs.
        TransformError: if its outputs change by more than rounding; the network is then not to be used.
    """
    start = FoldChecks(model, input_shape, images)
    watched = [0]
    while True:
        worker = _Worker(start, watched)
        worker.fold()
        moved = start.moved(worker.network, watched) if worker.edits else []
        if not moved:
            break
        # Folded anew, because a fold that changes something may be any of them.
        watched += moved
    double_error, error, noise = None, 0.0, None
    if worker.edits:
        double_error, noise = start.double_error(worker.network), start.noise
        carry_out(model, list(worker.edits.values()), worker.values)
        error = start.error(model)
    return Folding(
        edits=tuple(worker.edits.values()),
        tensors=tuple(worker.values),
        layers=worker.log,
        stays=tuple(worker.stays),
        norms_left=worker.norms_left,
        double_error=double_error,
        error=error,
        noise=noise,
        images=start.images,
        decides=worker.decides,
    )


class _Worker:
    """A copy of the network that is folded step by step.

    Attributes:
        network: the copy.
        edits: by module, all that was done to it.
        values: of the tensors that were set, by name.
        watched: numbers of the probes whose outputs have to stay.
    """

    def __init__(self, start: FoldChecks, watched: Sequence[int]) -> None:
        self.start, self.watched = start, watched
        self.network = start.network
        self.inputs = start.reference.probes[0].inputs.to(start.reference.dtype)
        self.trains = _runs_in_training(self.network, self.inputs)
        self.edits: dict[str, Fold] = {}
        self.values: dict[str, Tensor] = {}
        self.log: dict[str, TakenIn] = {}
        self.stays: list[Stays] = []
        self.failed: dict[tuple[str, ...], str] = {}
        self.norms_left = 0
        self.decides: tuple[str, ...] = ()

    def fold(self) -> None:
        """Fold until nothing more can be folded."""
        computed, stays = _computed(self.network)
        self._try(computed)
        left = [*stays]
        for _ in range(_ROUNDS):
            recorded = pass_of(self.network, (self.inputs.clone(),))
            candidates, left = self._candidates(recorded)
            if not candidates or not self._try(candidates):
                break
        recorded = pass_of(self.network, (self.inputs.clone(),))
        self.decides = recorded.decides
        self.norms_left = len({call.module for call in recorded.calls if normalises(call)})
        failed = [Stays(names[0], reason) for names, reason in self.failed.items()]
        unique = {
            item.name: item
            for item in reversed([*failed, *stays, *left, *_own_weights(self.network, recorded)])
        }
        self.stays = list(reversed(unique.values()))

    def _candidates(self, recorded: TracedPass) -> tuple[list[Candidate], list[Stays]]:
        """Batch norms first: branches are merged when they are plain layers."""
        norms, norms_stay = norm_candidates(self.network, recorded)
        norms = [candidate for candidate in norms if candidate.modules not in self.failed]
        if norms:
            return norms, norms_stay
        branches, branches_stay = branch_candidates(self.network, recorded)
        branches = [candidate for candidate in branches if candidate.modules not in self.failed]
        return branches, [*branches_stay, *norms_stay]

    def _try(self, candidates: Sequence[Candidate]) -> bool:
        """Carry out all candidates if the outputs stay, else those that pass alone; say whether any did."""
        if not candidates:
            return False
        reason = self._adopt(candidates)
        if not reason:
            return True
        if len(candidates) == 1:
            self.failed[candidates[0].modules or (candidates[0].layer,)] = reason
            return False
        # By halves, so that a single misfit costs few trials.
        middle = len(candidates) // 2
        return bool(self._try(candidates[:middle]) | self._try(candidates[middle:]))

    def _adopt(self, candidates: Sequence[Candidate]) -> str:
        """Carry candidates out if the outputs stay what they are; else return why not."""
        trial = copied(self.network)
        edits: list[Fold] = []
        values: dict[str, Tensor] = {}
        try:
            for candidate in candidates:
                more, set_values = candidate.change(trial)
                edits += more
                values |= set_values
            for number in self.watched:
                if not self.start.reference.distance(number, trial) <= self.start.limit:
                    return self._moved_by(number)
        except Exception as error:  # the network's own code may ask anything of a module that is gone
            return f"without it the network's code fails: {' '.join(str(error).split())[:100]}"
        if self.trains and not _runs_in_training(trial, self.inputs):
            return "without it the network could not be trained"
        self.network = trial
        for edit in edits:
            self.edits[edit.module] = edit.after(self.edits.get(edit.module))
        gone = {edit.module for edit in edits if edit.becomes != "layer"}
        self.values = {n: v for n, v in (self.values | values).items() if n.rpartition(".")[0] not in gone}
        for candidate in candidates:
            self._note(candidate)
        for name in gone:
            self.log.pop(name, None)
        return ""

    def _moved_by(self, number: int) -> str:
        if not number:
            return "without it the outputs differ by more than rounding"
        on = (
            "images"
            if self.start.reference.probes[number].images
            else "inputs of another scale, number or size"
        )
        return f"the network's code decides by its input: without it the outputs on {on} differ"

    def _note(self, candidate: Candidate) -> None:
        log = self.log.setdefault(candidate.layer, TakenIn())
        log.what += candidate.what
        for name in candidate.modules:
            # What went into a branch is told with the branch.
            log.modules += [name, *(self.log[name].modules if name in self.log else ())]


def _runs_in_training(network: nn.Module, inputs: Tensor) -> bool:
    try:
        execute(network, (inputs.clone(),), [], training=True)
    except Exception:  # what a network's code cannot do, in whatever way
        return False
    return True


def _computed(network: nn.Module) -> tuple[list[Candidate], list[Stays]]:
    """Modules with tensors that are computed before each call, and why some stay so."""
    owners: dict[int, set[str]] = {}
    for name, module in network.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                owners.setdefault(id(tensor), set()).add(name)
    candidates, stays = [], []
    for name, module in network.named_modules():
        tensors = computed_tensors(module)
        if not tensors:
            continue
        reason = _unbaked(module, name, owners)
        if reason:
            stays.append(Stays(name or "the network", reason))
        else:
            what = tuple(dict.fromkeys(tensors.values()))
            candidates.append(Candidate(name, what, (), _baking(name)))
    return candidates, stays


def _unbaked(module: nn.Module, name: str, owners: dict[int, set[str]]) -> str:
    for leaf in computed_tensors(module):
        for part in parts_of(module, leaf):
            others = [
                o
                for o in owners.get(id(part), ())
                if o != name and not o.startswith(qualified(name, "param"))
            ]
            if others:
                return f"what its {leaf} is computed from is shared with {min(others)}"
    parts = {id(part) for leaf in computed_tensors(module) for part in parts_of(module, leaf)}
    if any(id(place.parameter) in parts for place in masked_places(module)):
        return "what its weight is computed from has masks; fold before masks are set"
    with in_mode(module, training=False):
        first, again = computed_values(module), computed_values(module)
    moving = [leaf for leaf in first if not torch.equal(first[leaf], again[leaf])]
    return f"its {moving[0]} differs from call to call" if moving else ""


def _baking(name: str) -> Callable[[nn.Module], tuple[Sequence[Fold], dict[str, Tensor]]]:
    def change(network: nn.Module) -> tuple[Sequence[Fold], dict[str, Tensor]]:
        module = network.get_submodule(name)
        with in_mode(module, training=False):
            found = computed_values(module)
        edit = Fold(module=name, plain={leaf: tuple(value.shape) for leaf, value in found.items()})
        values = {qualified(name, leaf): value for leaf, value in found.items()}
        carry_out(network, (edit,), values)
        return (edit,), values

    return change


def _own_weights(network: nn.Module, recorded: TracedPass) -> list[Stays]:
    """Layers whose own code computes their weight, which no edit can change."""
    found = []
    for number, call in enumerate(recorded.calls):
        if call.function in LAYERS and recorded.name_of(call, "weight") is None:
            reason = layer_at(network, recorded, number)
            found.append(Stays(call.module or "the network", str(reason)))
    return found
