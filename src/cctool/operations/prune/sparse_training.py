"""Sparse training: it drives units towards zero before they are cut, so that cutting them changes little."""

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
"""Default weight of each penalty.

An epoch of about 350 steps of SGD at 0.01, its default for trained networks, moves a batch norm's scale by
about 0.2 under the first penalty, and shrinks a typical weight by a few hundredths under the second. That
separates the units, and accuracy hardly falls (0.8 points for a ResNet-20 on CIFAR-10 at twice that rate).
The 1e-4 of Liu et al. is meant for 160 epochs at ten times the rate.
"""

CEILING = 1.0
"""Largest coefficient of the growing penalty (Wang et al. 2021, section 4)."""

EVERY = 5
"""Steps between two increases of it (likewise)."""

# Of the training, after which the growing penalty has its largest coefficient.
_GROWING_SHARE = 0.75


def sparsified(
    checkpoint: Checkpoint,
    source: DataSource,
    options: PruneOptions,
    context: Context,
    found: ThinResult | None = None,
) -> Checkpoint:
    """Train a dense copy of a checkpoint for the last epoch's weights, under the penalty of the options.

    ``options`` are of the pruning that follows, and ``found`` what it would remove at the last step; without
    ``found`` that is planned here. The growing penalty acts on these units, the other two on every unit of
    families that can be cut. Without `sparsify` in the options the checkpoint is returned.

    Raises:
        PruningError: nothing can be cut.
        TrainingError: no unit is to be removed, or no scale of a batch norm can be trained.
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
    # A family between two layers of coefficients may have no parameter that a penalty can act on.
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
    """The increase that reaches the ceiling after three quarters of a training of any length.

    The paper's 1e-4 takes 10,000 increases.
    """
    return CEILING / max(1.0, _GROWING_SHARE * steps / EVERY)


def parts_of(model: nn.Module, family: Family, roles: Sequence[Role] | None = None) -> list[Part]:
    """The parts of the model's parameters that belong to a family's units: all that a mask would zero.

    ``model`` is the one that was traced, or a copy; ``roles`` selects some places, None all. Weights that
    swapped layers compute are not parameters.
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
