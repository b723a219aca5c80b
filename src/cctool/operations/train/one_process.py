"""One process's part of a training: batches, validation, logs and the checkpoint after each epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from torch import nn

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.payload import ResumeState
from cctool.checkpoint.spec import Metrics, Parent, Step
from cctool.data.records import DataSource
from cctool.operations.context import Context, Outcome
from cctool.operations.data import feed_of
from cctool.operations.judge.task import Judge, judge_of
from cctool.operations.keep import events
from cctool.operations.train.rate_penalty import rate_penalties
from cctool.operations.train.resume import flat, forms_to
from cctool.operations.train.run_folder import RunFolder
from cctool.options.fields import recorded
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import RunOptions
from cctool.training.evaluate import evaluate
from cctool.training.logs.table import Log, write_csv
from cctool.training.loop.feed import Feed
from cctool.training.loop.fit import Training, fit
from cctool.training.objectives import Objective, has_batch_norm
from cctool.training.processes import Group, group_of, make_fabric
from cctool.training.resume.progress import EpochRow, Progress


@dataclass(frozen=True)
class Start:
    """What a training starts or resumes from.

    Attributes:
        checkpoint: dense, its spec complete, without the line of history that this training will add.
        fresh: whether the network was never trained before, which decides the default learning rate.
        forms: of the input's tensors that were not stored dense.
        resume: state of the training that is resumed.
        continues: its unfinished line of history.
        metrics_before: of the input network.
        others: other files that were read, by role.
        remarks: notes for the history on how the network was changed before the training.
    """

    checkpoint: Checkpoint
    fresh: bool
    forms: Mapping[str, EncodedTensor] = field(default_factory=dict)
    resume: ResumeState | None = None
    continues: Step | None = None
    metrics_before: tuple[Metrics, ...] = ()
    others: Mapping[str, Parent] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def notes(self, *, keep_storage: bool) -> tuple[str, ...]:
        """Notes for the history about a fresh last layer and encoded tensors."""
        if not self.forms:
            return self.remarks
        done = "encoded again" if keep_storage else "left dense"
        return (
            *self.remarks,
            f"{len(self.forms)} stored tensors were decoded to float32 for training and {done}",
        )


@dataclass(frozen=True)
class Fitted:
    """How far a training got; the logs of a completed one are still open."""

    rows: tuple[EpochRow, ...]
    best_epoch: int | None
    completed: bool
    logs: Sequence[Log] = ()


def fit_here(
    start: Start, objective: Objective, source: DataSource, options: Any, context: Context, folder: RunFolder
) -> Fitted:
    """Train in this process, which may be one of several."""
    fit_options: FitOptions = options.fit
    run: RunOptions = options.run
    model, forms = start.checkpoint.model, start.forms if options.keep_storage else {}
    fabric = make_fabric(context.device, context.runtime.precision, devices=run.devices, nodes=run.nodes)
    feed = feed_of(start.checkpoint, source, options.data, context, fabric=fabric)
    judge = judge_of(start.checkpoint, context)
    has_validation = feed.has("validation")
    if not has_validation:
        context.reporter.note(
            f"{source.reference} has no validation split: the last epoch counts as the best"
        )
    first = int(str(start.resume.state["epoch"])) if start.resume else 0
    # Only the first process writes logs.
    logs = open_logs(options, context, folder, first) if fabric.is_global_zero else ()
    measure = partial(
        _measure, feed=feed, split="validation", judge=judge, context=context, group=group_of(fabric)
    )
    result = None
    try:
        with rate_penalties(model, fit_options.rate_weight) as penalties:
            result = fit(
                Training(
                    model=model,
                    batches=feed.training(augment=fit_options.augment),
                    options=fit_options,
                    objective=objective,
                    lr=fit_options.learning_rate(fresh=start.fresh, normalised=has_batch_norm(model)),
                    fabric=fabric,
                    validate=measure if has_validation else None,
                    user_code=context.user_code,
                    reporter=context.reporter,
                    observers=(
                        partial(_speak, context, judge, fit_options.epochs),
                        *(log.epoch for log in logs),
                    ),
                    save=partial(_save, start, options, context, folder),
                    resume=start.resume,
                    stop_after=run.stop_after,
                    input_shape=start.checkpoint.spec.input_shape,
                    constraints=(*events.constraints_of(start.checkpoint, forms), *penalties),
                    judged_by=(judge.main.name, judge.main.rising),
                )
            )
    finally:
        # The logs of a completed training get the final metrics first.
        if result is None or not result.completed:
            for log in logs:
                log.close()
    return Fitted(result.rows, result.best.epoch if result.best else None, result.completed, logs)


def metrics_of(
    checkpoint: Checkpoint, source: DataSource, options: Any, context: Context
) -> tuple[Metrics, ...]:
    """Measure a checkpoint on the validation and test splits that the data has."""
    feed = feed_of(checkpoint, source, options.data, context)
    model, judge = checkpoint.model.to(context.device), judge_of(checkpoint, context)
    return tuple(
        _measure(model, feed, split, judge, context) for split in ("validation", "test") if feed.has(split)
    )


def _measure(
    model: nn.Module, feed: Feed, split: str, judge: Judge, context: Context, group: Group | None = None
) -> Metrics:
    return evaluate(
        model,
        feed.plain(split),
        split=split,
        device=feed.device,
        precision=str(context.runtime.precision),
        task=judge.task,
        loss=judge.loss,
        metric=judge.metric,
        group=group,
    )


def open_logs(options: Any, context: Context, folder: RunFolder, first_epoch: int) -> tuple[Log, ...]:
    """Open the logs that the options ask for in addition to the CSV table."""
    run: RunOptions = options.run
    logs: list[Log] = []
    if run.tensorboard:
        from cctool.training.logs.tensorboard import TensorBoardLog

        logs.append(TensorBoardLog(folder.path / "tensorboard", first_epoch))
    if run.mlflow:
        from cctool.training.logs.mlflow import MlflowLog

        store = Path(run.mlflow_dir) if run.mlflow_dir else folder.path / "mlflow"
        note = folder.path / "mlflow-run.txt"
        logs.append(MlflowLog(store, context.output.stem, note, resume=first_epoch > 0))
    if not first_epoch:
        for log in logs:
            log.parameters(flat(recorded(options) | {"runtime": recorded(context.runtime)}))
    return tuple(logs)


def _speak(context: Context, judge: Judge, epochs: int, row: EpochRow, model: nn.Module) -> None:
    """Report loss, metrics and speed of an epoch."""
    main = judge.task.measures[0] if judge.task.measures else judge.main
    parts = [f"loss {row.train['loss']:.4f}"]
    parts += [
        f"{measure.title} {measure.shown(row.train[measure.name], '.2f')}"
        for measure in judge.task.measures
        if measure.name in row.train
    ]
    minor = {measure.name for measure in judge.task.measures} - {main.name, judge.main.name}
    parts += [
        f"validation {judge.measure(name).title} {judge.measure(name).shown(value)}"
        for name, value in row.validation.items()
        if name not in minor
    ]
    parts += [f"lr {row.lr:.3g}", f"{row.batch_ms:.1f} ms a step"]
    mark = " (best)" if row.best else ""
    context.reporter.note(f"epoch {row.epoch}/{epochs}: {', '.join(parts)}{mark}")


def _save(
    start: Start,
    options: Any,
    context: Context,
    folder: RunFolder,
    model: nn.Module,
    state: ResumeState,
    progress: Progress,
) -> None:
    """Write ``last.pt`` and the CSV table after an epoch."""
    # The forms are not in the model, and a resumed training must know how to encode the product.
    row = progress.rows[-1]
    more: dict[str, JsonValue] = {"remarks": list(start.remarks)} if start.remarks else {}
    resume = ResumeState(state.tensors, {**state.state, "storage": forms_to(start.forms), **more})
    measured = Metrics(split="validation", n=row.validation_n, values=dict(row.validation))
    unfinished = Outcome(
        replace(start.checkpoint, model=model, resume=resume),
        None,
        metrics_before=start.metrics_before,
        metrics_after=(measured,) if row.validation else (),
        notes=start.notes(keep_storage=False),
        others=start.others,
        continues=start.continues,
    )
    folder.save(context.stamp(unfinished), folder.last)
    write_csv(progress.rows, folder.path / "metrics.csv")
    every = options.run.save_every
    if every is not None and progress.epoch % every == 0:
        folder.keep_copy(progress.epoch)
