"""Training a network that an operation has just changed, with a new optimizer over its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.payload import MemoryPlace, place
from cctool.checkpoint.spec import Metrics
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.keep.codebooks import codebooks_after
from cctool.operations.keep.masked_weights import encode_under_mask, lossy_forms, masks_by_place
from cctool.operations.measuring import feed_of
from cctool.operations.train.rate_penalty import rate_penalties
from cctool.options.common import DataOptions
from cctool.options.train.fit import FitOptions
from cctool.training.constraints.base import Constraint
from cctool.training.constraints.masked_weights import keeping_masks
from cctool.training.evaluate import evaluate
from cctool.training.loop.fit import Task, fit
from cctool.training.objectives import Objective, Supervised, has_batch_norm
from cctool.training.processes import make_fabric

__all__ = ["decoded", "encoded_again", "finetune"]


def finetune(
    checkpoint: Checkpoint,
    source: DataSource,
    options: FitOptions,
    data: DataOptions,
    context: Context,
    *,
    objective: Objective | None = None,
    constraints: Sequence[Constraint] = (),
    choose_best: bool = True,
    fresh: bool = False,
) -> Checkpoint:
    """Train a checkpoint's model in place; it ends with the weights of the best epoch by validation.

    Args:
        checkpoint: its stored tensors are dropped, because training works on decoded values.
        source: opened for the checkpoint.
        options: epochs, optimizer, learning rate.
        data: batch size and workers.
        context: device, seed, reporter.
        objective: what is minimised; None is cross-entropy. `teaching.distillation` gives one with a teacher.
        constraints: what is respected besides; they hold the parameters of the checkpoint's own model.
        choose_best: whether the best epoch counts; else the last one does, and nothing is validated.
        fresh: whether the weights were never trained, which decides the default learning rate.

    Returns:
        The same model, stored dense.
    """
    trained = decoded(checkpoint, context)
    feed = feed_of(checkpoint, source, data, context)

    def validate(model: nn.Module) -> Metrics:
        return evaluate(
            model,
            feed.plain("validation"),
            split="validation",
            device=context.device,
            precision=str(context.runtime.precision),
        )

    with rate_penalties(trained.model, options.rate_weight) as penalties:
        fit(
            Task(
                model=trained.model,
                batches=feed.training(augment=options.augment),
                options=options,
                objective=objective or Supervised(),
                lr=options.learning_rate(fresh=fresh, normalised=has_batch_norm(trained.model)),
                fabric=make_fabric(context.device, context.runtime.precision),
                validate=validate if choose_best and feed.has("validation") else None,
                user_code=context.user_code,
                reporter=context.reporter,
                input_shape=trained.spec.input_shape,
                constraints=(*keeping_masks(trained.model), *constraints, *penalties),
            )
        )
    return trained


def decoded(checkpoint: Checkpoint, context: Context) -> Checkpoint:
    """The checkpoint with all tensors dense; says so where some were rounded."""
    rounded = lossy_forms(checkpoint)
    if rounded:
        methods = ", ".join(sorted({tensor.encoding for tensor in rounded.values()}))
        context.reporter.note(
            f"training works on decoded float32: {len(rounded)} tensors were stored as {methods} "
            "(--keep-storage stores them so again)"
        )
    return replace(checkpoint, stored={})


def encoded_again(checkpoint: Checkpoint, earlier: Checkpoint, context: Context) -> Checkpoint:
    """Store tensors as ``earlier`` stored them; the model gets the values that this leaves.

    Weights that trained with `keeping_codebooks` keep their assignment and are not rounded.

    Args:
        checkpoint: a trained one, all dense, on any device.
        earlier: tells each tensor's encoding and its parameters.
        context: tables.
    """
    state = checkpoint.model.state_dict()
    masks = masks_by_place(checkpoint.model)
    encodings = context.tables.encodings
    stored: dict[str, EncodedTensor] = {}
    # Tied tensors are encoded once, and stored once.
    made: dict[MemoryPlace, EncodedTensor] = {}
    shared = codebooks_after(checkpoint, replace(earlier, stored=lossy_forms(earlier)))
    for name, form in lossy_forms(earlier).items():
        if name in shared:
            stored[name] = shared[name]
            continue
        tensor: Tensor = state[name]
        if place(tensor) not in made:
            encoded = encode_under_mask(
                tensor.detach().cpu(), masks.get(place(tensor)), encodings[form.encoding], form.parameters
            )
            made[place(tensor)] = encoded
            tensor.copy_(encodings[encoded.encoding].decode(encoded))
        stored[name] = made[place(tensor)]
    return replace(checkpoint, stored=stored)
