"""One protocol for what must follow the weights of a network.

A checkpoint holds a network and much that fits only its present weights: their form in the file, scales and
ranges, codecs, the state of an optimizer. Each kind is a subclass of `Follower` and a line in `events`. Verbs
do not know the followers: they announce what they did to the weights, and `events` tells each follower:

    prune      plan on `plain` -> ordinary tensors cut, `cut` among them -> after_cut
               masks set or dropped                                      -> after_masking
    any verb   weights changed, nothing else at work                     -> after_change
    train      the last layer replaced by a fresh one                    -> after_new_head
    training   before_training -> constraints in the loop ->                after_training
    pipeline   before every file that it writes                          -> as_stored
    evaluate   `stale` -> a warning           export   `plain`, `in_programs`

After `after_change` and `after_training` a checkpoint is as its file will be, so that reports count and
measure what is written. `as_stored` then has nothing left to do; it is for checkpoints whose verb announced
nothing. Methods return the checkpoint and notes for the history. Models are changed in place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from cctool.base.networks import MARK, copied
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.thin import Cut
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.tables import EditKind, Tables
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.options.common import DataOptions
from cctool.pruning.cut.planner import Planner
from cctool.pruning.cut.surgery import CutPlan, named_tensors
from cctool.training.constraints.base import Constraint


class Followed(NamedTuple):
    """A checkpoint after an event, and notes for its history."""

    checkpoint: Checkpoint
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cutting:
    """A cut that was carried out.

    Attributes:
        plan: of the plain network.
        before: tensors before the cut, by name.
        context: of the command.
    """

    plan: CutPlan
    before: Mapping[str, Tensor]
    context: Context


@dataclass(frozen=True)
class Change:
    """What followers may use after weights were changed or trained.

    Attributes:
        source: opened for the checkpoint; None without data.
        data: batch size and workers.
        context: device, seed, tables, reporter.
        forms: by which tensors that were decoded for training are stored again; their parts are not read.
    """

    source: DataSource | None
    data: DataOptions
    context: Context
    forms: Mapping[str, EncodedTensor] = field(default_factory=dict)


class Follower:
    """One kind of thing that must follow the weights; every method here does nothing.

    Attributes:
        kind: name of its edit in a spec; "" without one.
        edit: how that edit is read and applied; None without one.
        in_programs: whether `export` can write it for other programs; if not, it is left out there.
    """

    kind: str = ""
    edit: EditKind | None = None
    in_programs: bool = False

    def cut(self, model: nn.Module, plan: CutPlan) -> Collection[str]:
        """Cut its part of a network, just before ordinary tensors are cut; in trial networks, too.

        Returns:
            Names of modules that are done, of which no ordinary tensor is to be cut.
        """
        return ()

    def after_cut(self, checkpoint: Checkpoint, cutting: Cutting) -> Followed:
        """Update spec, stored forms and training state after a cut."""
        return Followed(checkpoint)

    def after_masking(self, checkpoint: Checkpoint) -> Checkpoint:
        """Update spec and stored forms after masks were set or dropped."""
        return checkpoint

    def after_new_head(self, checkpoint: Checkpoint, names: Collection[str], context: Context) -> Followed:
        """Forget what belonged to the layers that fresh ones replaced, under all their ``names``."""
        return Followed(checkpoint)

    def constraints(self, checkpoint: Checkpoint, forms: Mapping[str, EncodedTensor]) -> Sequence[Constraint]:
        """Constraints on training, if tensors will be stored again as ``forms`` say."""
        return ()

    def after_change(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Follow weights that were changed while it did not take part in the forward pass."""
        return Followed(checkpoint)

    def after_training(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Follow weights that were trained while it took part; ``change.source`` is not None."""
        return Followed(checkpoint)

    def as_stored(self, checkpoint: Checkpoint, tables: Tables, *, settle: bool) -> Checkpoint:
        """Give tensors their form in a file; with ``settle`` weights may change to the decoded values."""
        return checkpoint

    def own_forms(self, checkpoint: Checkpoint) -> Collection[str]:
        """Names of stored tensors that it encodes again by itself after any change."""
        return ()

    def stale(self, checkpoint: Checkpoint) -> str:
        """A warning if it was fitted to other weights than the network has; else ""."""
        return ""

    def plain(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint without it, of ordinary layers and tensors; the given one is not changed."""
        return checkpoint

    def fixed_widths(self, planner: Planner, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Families whose width it keeps, by name, with the reason; ``planner`` has the plain network.

        Raises:
            PruningError: if there is nothing else to cut.
        """
        return {}


def within(name: str, modules: Collection[str]) -> bool:
    """Whether a module or tensor is one of these modules or inside one.

    >>> within("fc.weight", ["fc"]), within("fc2.weight", ["fc"])
    (True, False)
    """
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def own_cuts(plan: CutPlan, module: str) -> dict[str, Sequence[Cut]]:
    """Cuts of a module's own tensors, by their local names."""
    return {
        name.rpartition(".")[2]: cuts
        for name, cuts in plan.tensors.items()
        if name.rpartition(".")[0] == module
    }


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy that shares all tensors except those of companions (quantizers), which are cut in place."""
    own = tuple(f"{key}." for key, child in model._modules.items() if getattr(child, MARK, False))
    return copied(model, {id(t): t for name, t in named_tensors(model) if not name.startswith(own)})
