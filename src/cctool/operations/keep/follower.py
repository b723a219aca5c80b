"""What must follow the weights of a network, as one protocol: a kind is a class here and a line in `events`.

A checkpoint is a network and much that only fits these very weights: how they lie in the file, scales and
ranges, codecs, the state of an optimizer. Each kind of that is a `Follower`. Verbs do not know them; they say
what they have done to the weights, and `events` passes it on to every follower, in the order of one table:

    prune      plan on `plain` -> ordinary tensors cut, `cut` among them -> after_cut
               masks set or dropped                                      -> after_masking
    any verb   weights changed, nothing else at work                     -> after_change
    training   before_training -> constraints in the loop ->                after_training
    pipeline   before every file that it writes                          -> as_stored
    evaluate   `stale` -> a warning           export   `plain`, `in_programs`

After `after_change` and after `after_training` a checkpoint is as its file will be, so that reports count and
measure what is written; `as_stored` then finds nothing left to do, and serves networks of which nobody said
anything. A method hands back the checkpoint, and what the history should say. Models are changed in place.
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

__all__ = ["Change", "Cutting", "Followed", "Follower", "own_cuts", "sharing_copy"]


class Followed(NamedTuple):
    """A checkpoint after an event, and what the history should say of it."""

    checkpoint: Checkpoint
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cutting:
    """A cut that was carried out.

    Attributes:
        plan: of the plain network.
        before: tensors before the cut, by name.
        context: knows the encodings.
    """

    plan: CutPlan
    before: Mapping[str, Tensor]
    context: Context


@dataclass(frozen=True)
class Change:
    """What followers may use after weights were changed or trained.

    Attributes:
        source: opened for the checkpoint; None where there are no data.
        data: batch size and workers.
        context: device, seed, tables, reporter.
        forms: how tensors are to be stored again that were decoded for a training; parts are not looked at.
    """

    source: DataSource | None
    data: DataOptions
    context: Context
    forms: Mapping[str, EncodedTensor] = field(default_factory=dict)


class Follower:
    """One kind of what must follow the weights; by itself it does nothing.

    Attributes:
        kind: name of its edit in a spec; "" where it has none.
        edit: how that edit is read and applied; None where it has none.
        in_programs: whether `export` knows how to write it into other programs; else it is left out there.
    """

    kind: str = ""
    edit: EditKind | None = None
    in_programs: bool = False

    def cut(self, model: nn.Module, plan: CutPlan) -> Collection[str]:
        """Cut what of it lies in a network, just before the ordinary tensors are; also in trial networks.

        Returns:
            Names of modules of which nothing else is to be cut.
        """
        return ()

    def after_cut(self, checkpoint: Checkpoint, cutting: Cutting) -> Followed:
        """Bring spec, stored forms and state in line with a network that was cut."""
        return Followed(checkpoint)

    def after_masking(self, checkpoint: Checkpoint) -> Checkpoint:
        """Bring spec and stored forms in line with masks that were set or dropped."""
        return checkpoint

    def constraints(self, checkpoint: Checkpoint, forms: Mapping[str, EncodedTensor]) -> Sequence[Constraint]:
        """What training must respect, where tensors will be stored again as ``forms`` says."""
        return ()

    def after_change(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Follow weights that were changed without it at work."""
        return Followed(checkpoint)

    def after_training(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Follow weights that were trained with it in the loop; ``change.source`` is there."""
        return Followed(checkpoint)

    def as_stored(self, checkpoint: Checkpoint, tables: Tables, *, settle: bool) -> Checkpoint:
        """Give tensors the form that they have in a file.

        Args:
            checkpoint: any.
            tables: to decode what was encoded.
            settle: whether weights may change to the values that the form leaves.
        """
        return checkpoint

    def own_forms(self, checkpoint: Checkpoint) -> Collection[str]:
        """Names of stored tensors whose forms it makes anew by itself, whatever becomes of them."""
        return ()

    def stale(self, checkpoint: Checkpoint) -> str:
        """What to warn of where it was made for other weights than the network has; else ""."""
        return ""

    def plain(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint without it, of ordinary layers and tensors; the checkpoint itself stays as it is."""
        return checkpoint

    def fixed_widths(self, planner: Planner, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Families whose width it keeps, by name, with the reason.

        Args:
            planner: of the plain network.
            checkpoint: the network itself.

        Raises:
            PruningError: if nothing else is left to cut.
        """
        return {}


def own_cuts(plan: CutPlan, module: str) -> dict[str, Sequence[Cut]]:
    """Cuts of a module's own tensors, by their names in it."""
    return {
        name.rpartition(".")[2]: cuts
        for name, cuts in plan.tensors.items()
        if name.rpartition(".")[0] == module
    }


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy that shares all tensors but those of companions, such as quantizers, which are cut in place."""
    own = tuple(f"{key}." for key, child in model._modules.items() if getattr(child, MARK, False))
    return copied(model, {id(t): t for name, t in named_tensors(model) if not name.startswith(own)})
