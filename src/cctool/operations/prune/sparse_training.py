"""Training that drives units towards zero before they are cut, so that cutting them changes little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from cctool.base.errors import PruningError
from cctool.base.networks import copied
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.graph.ledger import Role
from cctool.graph.records import Family
from cctool.operations.context import Context
from cctool.operations.data import example, feed_of
from cctool.operations.keep.events import plain_checkpoint
from cctool.operations.train.finetune import finetune
from cctool.options.prune.choices import Sparsifier
from cctool.options.prune.options import PruneOptions, SparsifyOptions
from cctool.options.train.fit import FitOptions
from cctool.pruning.cut.planner import plan_thinning
from cctool.pruning.cut.report import ThinResult
from cctool.training.constraints.base import Constraint
from cctool.training.constraints.penalties import GroupLasso, GrowingPenalty, Part, ScaleL1
from cctool.transforms.layers.base import swapped_layers

DEFAULT_STRENGTH = {Sparsifier.GAMMA_L1: 1e-2, Sparsifier.GROUP_LASSO: 1e-3}
"""Weight of a penalty where none is given.

An epoch of some 350 steps of SGD at 0.01, its default for trained networks, moves a scale by about 0.2 under
the one and shrinks a weight of usual size by some hundredths under the other: units part, and accuracy
hardly falls (by 0.8 points on a ResNet-20 of CIFAR-10 at twice that rate). The 1e-4 of Liu et al. is made
for 160 epochs at ten times the rate.
"""

CEILING = 1.0
"""Largest coefficient of the growing penalty (Wang et al. 2021, section 4)."""

EVERY = 5
"""Steps between two increases of it (likewise)."""

_GROWING_SHARE = 0.75


def sparsified(
    checkpoint: Checkpoint,
    source: DataSource,
    options: PruneOptions,
    context: Context,
    found: ThinResult | None = None,
) -> Checkpoint:
    """Train a copy of a checkpoint under the penalty that the options ask for; the last epoch counts.

    Args:
        checkpoint: stays as it is; its copy is stored dense.
        source: opened for the checkpoint.
        options: of the pruning that follows; without `sparsify` the checkpoint is given back.
        context: device, seed, reporter.
        found: what that pruning would remove, where the caller has planned it already; else it is planned
            here at the last step's rate. The growing penalty acts on these units, the other two on every
            unit of the families that the plan does not spare.

    Raises:
        PruningError: nothing can be cut.
        TrainingError: no unit is to go, or no scale of a batch norm can be trained.
    """
    wanted = options.sparsify
    if wanted is None:
        return checkpoint
    dense = replace(checkpoint, model=copied(checkpoint.model), resume=None)
    if found is None:
        plain = plain_checkpoint(dense)
        found = plan_thinning(plain.model, example(plain), _at_once(options), seed=context.runtime.seed)
    feed = feed_of(dense, source, options.data, context)
    penalty = _penalty(dense.model, found, wanted, wanted.epochs * len(feed.training()(0)))
    context.reporter.note(
        f"sparse training with {wanted.method}, {wanted.epochs} epoch{'s' if wanted.epochs > 1 else ''}"
    )
    layers = len(swapped_layers(dense.model))
    if layers and wanted.method is not Sparsifier.GAMMA_L1:
        context.reporter.note(
            f"the penalty acts on biases, norms and ordinary weights; the coefficients of {layers} layers "
            "are no channel's own"
        )
    return finetune(
        dense,
        source,
        FitOptions(epochs=wanted.epochs, optimizer=options.optimizer, lr=wanted.lr),
        options.data,
        context,
        constraints=(penalty,),
        # Validation would choose an early epoch, which is hardly sparse.
        choose_best=False,
    )


def _penalty(model: nn.Module, found: ThinResult, wanted: SparsifyOptions, steps: int) -> Constraint:
    pairs = zip(found.graph.families, found.selection.kept, strict=True)
    free = [(family, kept) for family, kept in pairs if family.name not in found.selection.spared]
    if not free:
        raise PruningError("sparse training has nothing to act on: no family can be cut")
    # Of a family between two layers of coefficients nothing may be left that a penalty can act on.
    owned = [(parts_of(model, family), kept) for family, kept in free]
    owned = [(parts, kept) for parts, kept in owned if parts]
    if wanted.method is Sparsifier.GROWING:
        delta = _growth(steps) if wanted.strength is None else wanted.strength
        return GrowingPenalty(
            [parts for parts, _ in owned], [~kept for _, kept in owned], delta, EVERY, CEILING
        )
    strength = DEFAULT_STRENGTH[wanted.method] if wanted.strength is None else wanted.strength
    if wanted.method is Sparsifier.GROUP_LASSO:
        return GroupLasso([parts for parts, _ in owned], strength)
    return ScaleL1([part for family, _ in free for part in parts_of(model, family, (Role.SCALE,))], strength)


def _growth(steps: int) -> float:
    """The increase with which the ceiling is reached after three quarters of a training, however long.

    The paper's 1e-4 needs 10,000 increases to get there.
    """
    return CEILING / max(1.0, _GROWING_SHARE * steps / EVERY)


def parts_of(model: nn.Module, family: Family, roles: Sequence[Role] | None = None) -> list[Part]:
    """What a family's units own of the model's parameters: all that a mask would zero.

    Weights that swapped layers compute are no parameters.

    Args:
        model: the one that was traced, or a copy.
        family: of its channels.
        roles: only these; None takes all.
    """
    parameters = dict(model.named_parameters())
    return [
        Part(parameters[place.tensor], place.dim, place.indices)
        for place in family.places
        if place.tensor in parameters and (roles is None or place.role in roles)
    ]


def _at_once(options: PruneOptions) -> PruneOptions:
    """The options that remove in one step what these remove in all of theirs."""
    keep = None if options.keep is None else options.keep**options.steps
    return replace(options, steps=1, keep=keep)
