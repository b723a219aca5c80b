"""Fine-tuning a network that an operation has changed, with a new optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.spec import Metrics
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.data import feed_of, refuse_unlabelled
from cctool.operations.judge.task import judge_of
from cctool.operations.keep import events
from cctool.operations.train.rate_penalty import rate_penalties
from cctool.operations.train.remarks import say_remarks
from cctool.options.common import DataOptions
from cctool.options.train.fit import FitOptions
from cctool.training.constraints.base import Constraint
from cctool.training.evaluate import evaluate
from cctool.training.loop.fit import Training, fit
from cctool.training.objectives import Objective, Supervised, has_batch_norm
from cctool.training.processes import make_fabric


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
    forms: Mapping[str, EncodedTensor] | None = None,
) -> Checkpoint:
    """Train a checkpoint's model in place, to the weights of the best epoch by validation.

    Args:
        checkpoint: training works on decoded values; the result is dense.
        source: opened for the checkpoint.
        options: epochs, optimizer, learning rate.
        data: batch size and workers.
        context: device, seed, reporter.
        objective: what is minimised; None is the loss of the task, or the user's. `teacher.distillation`
            gives one with a teacher.
        constraints: on the parameters of this model, in addition to the followers'.
        choose_best: take the best epoch; if false the last, without validation.
        fresh: whether the weights were never trained, which decides the default learning rate.
        forms: by which tensors will be stored again; training respects them.
    """
    judge = judge_of(checkpoint, context)
    judge.require_loss("fine-tuning")
    refuse_unlabelled(source, judge, "fine-tuning")
    say_remarks(checkpoint, source, options, data, context)
    trained = events.decoded(checkpoint, context)
    feed = feed_of(checkpoint, source, data, context)

    def validate(model: nn.Module) -> Metrics:
        return evaluate(
            model,
            feed.plain("validation"),
            split="validation",
            device=context.device,
            precision=str(context.runtime.precision),
            task=judge.task,
            loss=judge.loss,
            metric=judge.metric,
        )

    with rate_penalties(trained.model, options.rate_weight) as penalties:
        fit(
            Training(
                model=trained.model,
                batches=feed.training(augment=options.augment),
                options=options,
                objective=objective or Supervised(loss=judge.loss, task=judge.task),
                lr=options.learning_rate(fresh=fresh, normalised=has_batch_norm(trained.model)),
                fabric=make_fabric(context.device, context.runtime.precision),
                validate=validate if choose_best and feed.has("validation") else None,
                user_code=context.user_code,
                reporter=context.reporter,
                input_shape=trained.spec.input_shape,
                constraints=(*events.constraints_of(trained, forms), *constraints, *penalties),
                judged_by=(judge.main.name, judge.main.rising),
            )
        )
    return trained
