"""Events that happen to weights, passed on to everything that must follow them: one table, one order.

A verb announces what it did (`cut`, `masked`, `changed`, `trained`); the pipeline announces `stored` before
it writes. Neither knows the followers. A new kind of follower is a class and a line in `FOLLOWERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from cctool.base.networks import device_of
from cctool.base.runtime import Reporter
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.head import fresh_head, put_head
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.tables import EditKind, Tables
from cctool.operations.context import Context
from cctool.operations.keep.codecs import Codecs
from cctool.operations.keep.follower import Change, Cutting, Followed, Follower, sharing_copy
from cctool.operations.keep.heads import Heads
from cctool.operations.keep.layers import FoldedLayers, SwappedLayers, Widths
from cctool.operations.keep.masks import Masks
from cctool.operations.keep.optimizer_state import OptimizerState
from cctool.operations.keep.packed import PackedTensors
from cctool.operations.keep.quantizers import Quantizers, Ranges
from cctool.options.common import DataOptions
from cctool.pruning.cut.surgery import CutPlan, apply_cut, named_tensors

if TYPE_CHECKING:
    from cctool.data.records import DataSource
    from cctool.pruning.cut.planner import Planner
    from cctool.training.constraints.base import Constraint


FOLLOWERS: tuple[Follower, ...] = (
    # The outputs of a last layer before widths, which are cut from them.
    Heads(),
    FoldedLayers(),
    Widths(),
    OptimizerState(),
    # Weights are stored again before anything is fitted to their values, by codebooks and few bits ...
    PackedTensors(),
    SwappedLayers(),
    # ... and by the integers of quantizers: codecs and ranges are calibrated for these values.
    Quantizers(),
    # Codecs before ranges: quantizers of activations see the maps that codecs return.
    Codecs(),
    Ranges(),
    # Last, because a mask takes its zeros out of whatever form the others have given its weight.
    Masks(),
)
"""Every kind of follower, in the order in which each event reaches them."""


def edit_kinds() -> dict[str, EditKind]:
    """Kinds of edit that a spec may name."""
    return {follower.kind: follower.edit for follower in FOLLOWERS if follower.edit is not None}


def cut_model(model: nn.Module, plan: CutPlan) -> None:
    """Cut a network in place by a plan that was made on its plain network.

    The plain network has ordinary layers in place of swapped ones, and no codecs or quantizers.

    Raises:
        TransformError: a swapped layer cannot be cut so.
        PruningError: a plan touches a layer that has no ordinary counterpart.
    """
    # Followers first: the plan's names in these modules are those of ordinary layers, which are not there.
    done = {name for follower in FOLLOWERS for name in follower.cut(model, plan)}
    apply_cut(
        model,
        CutPlan(
            {name: cuts for name, cuts in plan.tensors.items() if name.rpartition(".")[0] not in done},
            {module: values for module, values in plan.attributes.items() if module not in done},
        ),
    )


def thin_copy(model: nn.Module, plan: CutPlan) -> nn.Module:
    """A copy of a network after `cut_model`; it shares the tensors that are not cut."""
    copy = sharing_copy(model)
    cut_model(copy, plan)
    return copy


def cut(checkpoint: Checkpoint, plan: CutPlan, context: Context) -> Followed:
    """Cut a checkpoint's model in place as `cut_model` does, and with it all that follows the weights.

    The notes say what could not be cut along.
    """
    before = {name: tensor.detach() for name, tensor in named_tensors(checkpoint.model)}
    cut_model(checkpoint.model, plan)
    cutting = Cutting(plan, before, context)
    return _passed_on(checkpoint, lambda follower, found: follower.after_cut(found, cutting))


def masked(checkpoint: Checkpoint) -> Checkpoint:
    """Announce that masks were set on a checkpoint's model, or dropped."""
    for follower in FOLLOWERS:
        checkpoint = follower.after_masking(checkpoint)
    return checkpoint


def new_head(checkpoint: Checkpoint, layers: Collection[str], outputs: int, context: Context) -> Followed:
    """Replace last layers by fresh ones, in place, and make all forget them that followed their weights.

    The weights are drawn as torch initialises such a layer, from the command's seed alone.

    Args:
        checkpoint: its model is changed in place.
        layers: names of linear layers or ungrouped convolutions of the plain network.
        outputs: of each fresh layer.
        context: seed; device.
    """
    plain = dict(plain_checkpoint(checkpoint).model.named_modules())
    names: list[str] = []
    with torch.random.fork_rng(devices=[]):
        # Of the CPU alone: generators of devices are not put back.
        torch.default_generator.manual_seed(context.runtime.seed)
        for name in layers:
            layer = fresh_head(plain[name], outputs).to(device_of(checkpoint.model))
            names += put_head(checkpoint.model, name, layer)
    return _passed_on(checkpoint, lambda follower, found: follower.after_new_head(found, names, context))


def changed(
    checkpoint: Checkpoint,
    source: DataSource | None,
    data: DataOptions,
    context: Context,
    forms: Mapping[str, EncodedTensor] | None = None,
) -> Followed:
    """Announce weights that were changed, but not by training; the model may be changed in place.

    ``forms`` are those by which tensors that were decoded are to be stored again, see `forms_of`. Returns the
    checkpoint as its file will be, and notes for the history.
    """
    change = Change(source, data, context, forms or {})
    return _passed_on(checkpoint, lambda follower, found: follower.after_change(found, change))


def trained(
    checkpoint: Checkpoint,
    source: DataSource,
    data: DataOptions,
    context: Context,
    forms: Mapping[str, EncodedTensor] | None = None,
) -> Followed:
    """Announce weights that were trained with their followers at work. Arguments and result as `changed`."""
    change = Change(source, data, context, forms or {})
    return _passed_on(checkpoint, lambda follower, found: follower.after_training(found, change))


def stored(checkpoint: Checkpoint, tables: Tables, *, settle: bool = True) -> Checkpoint:
    """The checkpoint whose tensors have the form of a file, in no more bits than they need.

    With ``settle`` quantized weights get the values that are stored; without it the model does not change,
    and weights that are not on their grid stay dense.
    """
    for follower in FOLLOWERS:
        checkpoint = follower.as_stored(checkpoint, tables, settle=settle)
    return checkpoint


def forms_of(checkpoint: Checkpoint) -> dict[str, EncodedTensor]:
    """Stored forms that training loses: those of tensors that no follower encodes again by itself."""
    own = {name for follower in FOLLOWERS for name in follower.own_forms(checkpoint)}
    return {name: form for name, form in checkpoint.stored.items() if name not in own}


def decoded(checkpoint: Checkpoint, context: Context) -> Checkpoint:
    """The checkpoint with all tensors dense, for training; a note says which encodings were decoded."""
    forms = forms_of(checkpoint)
    if forms:
        methods = ", ".join(sorted({form.encoding for form in forms.values()}))
        context.reporter.note(
            f"training works on decoded float32: {len(forms)} tensors were stored as {methods} "
            "(--keep-storage stores them so again)"
        )
    return replace(checkpoint, stored={})


def constraints_of(
    checkpoint: Checkpoint, forms: Mapping[str, EncodedTensor] | None = None
) -> tuple[Constraint, ...]:
    """Constraints on the training of a checkpoint whose tensors will be stored again as ``forms`` say."""
    return tuple(
        constraint for follower in FOLLOWERS for constraint in follower.constraints(checkpoint, forms or {})
    )


def warn_of_stale(checkpoint: Checkpoint, reporter: Reporter) -> None:
    """Warn of followers that were fitted to other weights than the network has now."""
    for follower in FOLLOWERS:
        text = follower.stale(checkpoint)
        if text:
            reporter.warn(text)


def plain_checkpoint(checkpoint: Checkpoint, kinds: Collection[str] | None = None) -> Checkpoint:
    """The checkpoint of the plain network: ordinary layers and tensors, without followers.

    Args:
        checkpoint: is not changed.
        kinds: of edits; only their followers are left out.

    Returns:
        The checkpoint itself if there is nothing to leave out; else one whose network shares all tensors
        except the weights of swapped layers.
    """
    for follower in FOLLOWERS:
        if kinds is None or follower.kind in kinds:
            checkpoint = follower.plain(checkpoint)
    return checkpoint


def for_programs(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without followers that cannot be written for other programs."""
    for follower in FOLLOWERS:
        if not follower.in_programs:
            checkpoint = follower.plain(checkpoint)
    return checkpoint


def fixed_widths(planner: Planner, checkpoint: Checkpoint) -> dict[str, str]:
    """Families that followers keep at their width, with the reason; ``planner`` has the plain network.

    Raises:
        PruningError: if there is nothing else to cut.
    """
    found: dict[str, str] = {}
    # Reversed, so that the first follower in the table gives the reason.
    for follower in reversed(FOLLOWERS):
        found |= follower.fixed_widths(planner, checkpoint)
    return found


def _passed_on(checkpoint: Checkpoint, event: Callable[[Follower, Checkpoint], Followed]) -> Followed:
    notes: list[str] = []
    for follower in FOLLOWERS:
        checkpoint, more = event(follower, checkpoint)
        notes += more
    return Followed(checkpoint, tuple(notes))
