"""The course of a training, shared by `train` and `distill`: start or resume, fit, measure, yield."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from cctool.base.errors import (
    CctoolError,
    CorruptCheckpointError,
    DataError,
    UsageError,
    UserCodeError,
)
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.file.payload import ResumeState
from cctool.checkpoint.spec import Metrics, Parent
from cctool.data.classes import NEW_HEAD
from cctool.data.records import DataSource
from cctool.operations.context import Context, Outcome
from cctool.operations.data import open_source, preprocessing_of, refuse_unlabelled, require_source
from cctool.operations.judge.task import Judge, judge_of
from cctool.operations.keep import events
from cctool.operations.keep.follower import Followed
from cctool.operations.train.new_head import with_new_head
from cctool.operations.train.one_process import Fitted, Start, fit_here, metrics_of
from cctool.operations.train.rate_penalty import refuse_rate_without_taps
from cctool.operations.train.remarks import refuse_rising_rate, say_idle_ends, say_remarks
from cctool.operations.train.resume import (
    forms_from,
    may_resume,
    nothing_to_resume,
    refuse_other_data,
    refuse_other_files,
    refuse_other_input,
    refuse_other_options,
    starts_afresh,
    unfinished_step,
)
from cctool.operations.train.run_folder import LoggedReporter, RunFolder
from cctool.operations.train.workers import fit_in_processes, node_rank
from cctool.options.fields import recorded
from cctool.options.paths import INPUT
from cctool.tasks.base import LOSS
from cctool.training.averaging import average_in
from cctool.training.evaluate import trial_outputs
from cctool.training.objectives import Objective, has_batch_norm
from cctool.training.resume.progress import EpochRow, best_of


@dataclass(frozen=True)
class Goal:
    """What a verb minimises.

    Attributes:
        objective: given to `fit`.
        others: files that were read for it, such as a teacher, by role.
    """

    objective: Objective
    others: Mapping[str, Parent] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainReport:
    """How a training went.

    Attributes:
        epochs: number of completed epochs.
        best_epoch: the epoch whose weights the product has; None without training.
        metrics_before: of the input network.
        metrics_after: of the product, after it was encoded again (--keep-storage).
        run_folder: path of the logs and ``last.pt``; None without training, or if none was kept.
        rows: one per epoch.
    """

    epochs: int
    best_epoch: int | None
    metrics_before: tuple[Metrics, ...]
    metrics_after: tuple[Metrics, ...]
    run_folder: str | None = None
    rows: tuple[EpochRow, ...] = ()


MakeGoal = Callable[[Checkpoint, DataSource, Any, Context], Goal]


def conduct(
    verb: str, make_goal: MakeGoal, checkpoint: Checkpoint, options: Any, context: Context
) -> Iterator[Outcome]:
    """Train a checkpoint's network and yield the best epoch, or the best so far if it was stopped early.

    Args:
        verb: the command.
        make_goal: (checkpoint, data, options, context) -> what is minimised.
        checkpoint: trained, foreign or fresh.
        options: of `train` or `distill`: ``fit``, ``data``, ``run`` and ``keep_storage``.
        context: of the command.

    Raises:
        DataError: if there is no data, or it has more classes than the network.
        TrainingError: if training cannot start or continue, or diverges.
    """
    if options.fit.epochs == 0:
        yield _untrained(make_goal, checkpoint, options, context)
        return
    folder = RunFolder(context.output, context.tables)
    if options.run.resume:
        folder.refuse_other_product()
    else:
        folder.refuse_earlier(force=context.force)
        folder.refuse_reading(context.read)
    new_head = options.start.new_head
    source = require_source(options.data, checkpoint, context, verb, renames=True, own_labels=new_head)
    judge = judge_of(checkpoint, context)
    judge.require_loss("training")
    refuse_unlabelled(source, judge, verb)
    if options.run.resume:
        if context.force:
            context.say_once("--force changes nothing: --resume goes on with what is there")
        start = _resumed(verb, checkpoint, source, options, context, folder)
    else:
        start = _started(checkpoint, source, options, context)
    _refuse_other_classes(start.checkpoint, source, context)
    refuse_rate_without_taps(start.checkpoint.model, options.fit.rate_weight)
    if start.resume is None:
        normalised = has_batch_norm(start.checkpoint.model)
        refuse_rising_rate(options.fit, options.fit.learning_rate(fresh=start.fresh, normalised=normalised))
    say_remarks(start.checkpoint, source, options.fit, options.data, context)
    say_idle_ends(options.fit, options.run, _epochs_done(start.resume), context)
    if options.keep_storage and not start.forms:
        context.say_once("--keep-storage changes nothing: INPUT has no encoded tensors")
    goal = make_goal(start.checkpoint, source, options, context)
    if start.continues is not None:
        refuse_other_files(start.continues, goal.others)
    start = replace(start, others=goal.others)
    # A fresh last layer's accuracy is chance; a resumed training has its first metrics in the history.
    if start.resume is None and checkpoint.origin is not None and not new_head:
        start = replace(start, metrics_before=metrics_of(start.checkpoint, source, options, context))
    lost = None if options.run.resume else folder.other_product()
    if lost is not None:
        context.reporter.warn(f"the training of {lost} in {folder.path} is deleted and cannot be resumed")
    folder.begin(context.device, resume=start.resume is not None)
    context = replace(context, reporter=LoggedReporter(context.reporter, folder))
    yield from _fit(verb, goal, start, source, options, context, folder)


def _started(checkpoint: Checkpoint, source: DataSource, options: Any, context: Context) -> Start:
    """Where a training of this checkpoint begins; with a fresh last layer if the options ask for one."""
    fresh = checkpoint.origin is None or starts_afresh(checkpoint.history)
    remarks: tuple[str, ...] = ()
    if options.start.new_head:
        checkpoint, remarks = _with_new_head(checkpoint, source, options, context)
    dense = _completed(events.decoded(checkpoint, context), source, context)
    return Start(dense, fresh=fresh, forms=events.forms_of(checkpoint), remarks=remarks)


def _with_new_head(checkpoint: Checkpoint, source: DataSource, options: Any, context: Context) -> Followed:
    headed, remarks = with_new_head(checkpoint, source, context)
    # Behind a fresh layer, and on other images, maps have other ranges than they were calibrated for.
    followed, more = events.changed(_completed(headed, source, context), source, options.data, context)
    return Followed(followed, (*remarks, *more))


def _fit(
    verb: str, goal: Goal, start: Start, source: DataSource, options: Any, context: Context, folder: RunFolder
) -> Iterator[Outcome]:
    try:
        with _saying_what_is_left(folder, context):
            if options.run.processes == 1:
                result = fit_here(start, goal.objective, source, options, context, folder)
            else:
                result = fit_in_processes(verb, start, options, context, folder)
    except (CctoolError, SystemExit) as error:
        left = _left(folder, context)
        # Logs of worker processes have the traceback of the error.
        if options.run.processes == 1:
            folder.discard()
        if isinstance(error, SystemExit):
            ended = f"code that the training ran ended the program (SystemExit: {error.code})"
            raise UserCodeError(f"{ended}; {left}") from error
        # Of the same class, which decides the exit status.
        raise type(error)(f"{error}; {left}") from error
    if not result.completed:
        if options.run.nodes == 1 or node_rank() == 0:
            with _saying_what_is_left(folder, context):
                stopped = _stopped(len(result.rows), start, source, options, context, folder)
            yield stopped
        return
    if options.run.nodes > 1 and node_rank() > 0:
        # Only one machine may write the product.
        context.reporter.note("this machine trained along; the first one writes the product")
        return
    with _saying_what_is_left(folder, context):
        outcome = _finished(result, start, source, options, context, folder)
    yield outcome


@contextmanager
def _saying_what_is_left(folder: RunFolder, context: Context) -> Iterator[None]:
    """Say what remains of a training that is interrupted, also after its last epoch."""
    try:
        yield
    except KeyboardInterrupt:
        context.reporter.warn(f"interrupted; {_left(folder, context)}")
        raise


def _finished(
    result: Fitted, start: Start, source: DataSource, options: Any, context: Context, folder: RunFolder
) -> Outcome:
    """The best epoch of a completed training, encoded and measured."""
    finished = replace(start.checkpoint, resume=None)
    finished.model.eval()
    forms = start.forms if options.keep_storage else {}
    finished, followed = events.trained(finished, source, options.data, context, forms)
    after = metrics_of(finished, source, options, context)
    for log in result.logs:
        log.finish(after)
    best = result.best_epoch
    context.reporter.note(f"best epoch {best} of {options.fit.epochs}; logs in {folder.path}")
    folder.log(_summary(after, judge_of(finished, context)))
    _warn_of_guessing(finished, after, context)
    report = TrainReport(len(result.rows), best, start.metrics_before, after, str(folder.path), result.rows)
    return Outcome(
        finished,
        report,
        metrics_before=start.metrics_before,
        metrics_after=after,
        notes=(*start.notes(keep_storage=options.keep_storage), *followed),
        others=start.others,
        continues=start.continues,
    )


def _stopped(
    done: int, start: Start, source: DataSource, options: Any, context: Context, folder: RunFolder
) -> Outcome:
    """Yield the best epoch of a training that was stopped early; resuming it replaces this product."""
    last = folder.load(folder.last)
    step = last.history[-1]
    resume = last.resume
    best = best_of(resume, last.model.state_dict()) if resume is not None else None
    if best is not None:
        last.model.load_state_dict(best.weights)
    elif resume is not None:
        # Without a best epoch the average of the weights counts, if the options ask for one.
        last.model.load_state_dict(last.model.state_dict() | average_in(resume.tensors))
    epoch = best.epoch if best is not None else done
    note = f"stopped after epoch {done} of {options.fit.epochs}, with the weights of epoch {epoch}"
    context.reporter.note(f"{note}; the same command with --resume goes on ({folder.last})")
    metrics = step.metrics_after if best is None or best.metrics is None else (best.metrics,)
    product = replace(last, history=last.history[:-1], resume=None)
    forms = forms_from(resume.state.get("storage")) if options.keep_storage and resume is not None else {}
    product, followed = events.trained(product, source, options.data, context, forms)
    if forms:
        metrics = metrics_of(product, source, options, context)
    return Outcome(
        product,
        TrainReport(done, epoch, step.metrics_before, metrics, str(folder.path)),
        metrics_before=step.metrics_before,
        metrics_after=metrics,
        notes=(*start.notes(keep_storage=options.keep_storage), *followed, note),
        others=step.others,
        continues=step,
    )


def _untrained(make_goal: MakeGoal, checkpoint: Checkpoint, options: Any, context: Context) -> Outcome:
    """Yield the network as it came in (--epochs 0), measured if there is data."""
    new_head = options.start.new_head
    source = open_source(options.data, checkpoint, context, own_labels=new_head)
    notes: tuple[str, ...] = ("no epoch was trained",)
    if source is None:
        if new_head:
            raise UsageError("--new-head needs data for its classes: name it with --data")
        return Outcome(checkpoint, TrainReport(0, None, (), ()), notes=notes)
    came_in = checkpoint.origin is not None and not new_head
    if new_head:
        checkpoint, remarks = _with_new_head(checkpoint, source, options, context)
        notes = (*remarks, *notes)
    others = make_goal(checkpoint, source, options, context).others
    after = metrics_of(checkpoint, source, options, context)
    before = after if came_in else ()
    return Outcome(
        replace(checkpoint, spec=checkpoint.spec.model_copy(update={"data": source.reference})),
        TrainReport(0, None, before, after),
        metrics_before=before,
        metrics_after=after,
        notes=notes,
        others=others,
    )


def _completed(checkpoint: Checkpoint, source: DataSource, context: Context) -> Checkpoint:
    """The checkpoint whose spec has the data set, its classes and the preprocessing that is used."""
    spec = checkpoint.spec
    update: dict[str, Any] = {
        "data": source.reference,
        "preprocessing": preprocessing_of(checkpoint, source, context),
    }
    if source.classes != spec.classes and len(source.classes) == _width(checkpoint, context):
        if spec.classes is not None:
            context.reporter.warn(
                f"the classes of {source.reference} take the place of those that the network was made for"
            )
        update["classes"] = source.classes
    return replace(checkpoint, spec=spec.model_copy(update=update))


def _resumed(
    verb: str, checkpoint: Checkpoint, source: DataSource, options: Any, context: Context, folder: RunFolder
) -> Start:
    """Where ``last.pt`` in the run folder left off, or INPUT if that is a ``last.pt`` that was cut."""
    own = folder.last.exists()
    source_path = next((str(file.path) for file in context.read if file.by == INPUT), None)
    found = folder.load(folder.last) if own else checkpoint
    if found.resume is None or not may_resume(found.history, own=own):
        raise nothing_to_resume(folder.last, source_path)
    cut = found.history[-1].verb == "prune"
    earlier = unfinished_step(found.history)
    if found is not checkpoint:
        refuse_other_input(earlier, found, checkpoint, source_path, folder.last)
    now = recorded(options) | {"runtime": recorded(context.runtime)}
    refuse_other_options(earlier, verb, now, found.spec.data)
    epoch, rows = _epochs_done(found.resume), found.resume.state.get("rows")
    if not epoch or "best" not in found.resume.state:
        raise CorruptCheckpointError(f"{folder.last} holds a malformed state of training")
    if isinstance(rows, list) and rows and isinstance(rows[-1], dict):
        refuse_other_data(rows[-1], source, options.run.processes)
    context.reporter.note(f"going on after epoch {epoch} of {options.fit.epochs}")
    return Start(
        replace(found, history=found.history if cut else found.history[:-1], resume=None),
        fresh=earlier.parent is None or starts_afresh(found.history[: found.history.index(earlier)]),
        forms=forms_from(found.resume.state.get("storage")),
        resume=found.resume,
        continues=None if cut else earlier,
        metrics_before=found.history[-1].metrics_after if cut else earlier.metrics_before,
        remarks=() if cut else tuple(map(str, found.resume.state.get("remarks") or ())),  # type: ignore[arg-type]
    )


def _epochs_done(resume: ResumeState | None) -> int:
    """Completed epochs of a training; 0 for none, or if its state is malformed."""
    epoch = None if resume is None else resume.state.get("epoch")
    return epoch if isinstance(epoch, int) else 0


def _refuse_other_classes(checkpoint: Checkpoint, source: DataSource, context: Context) -> None:
    width, judge = _width(checkpoint, context), judge_of(checkpoint, context)
    # The user's own loss may use outputs and labels in another way, and targets for another task are refused
    # as what they are.
    judged = judge.loss is None and source.task in (None, judge.task.name)
    if judged and width is not None and width < len(source.classes):
        raise DataError(
            f"{source.reference} has {len(source.classes)} classes, the network tells {width} "
            f"apart: another data set, or another network, is needed{NEW_HEAD}"
        )


_ENOUGH = 100


def _warn_of_guessing(checkpoint: Checkpoint, after: tuple[Metrics, ...], context: Context) -> None:
    """Warn if the network does no better than a guess."""
    judge = judge_of(checkpoint, context)
    measure, guess = judge.main, judge.task.guess(_width(checkpoint, context))
    if judge.metric is not None or not measure.share or not guess:
        return
    for found in after:
        value = found.values.get(measure.name)
        # Two standard deviations of guessing may be mere chance; of few samples they are most of the scale.
        if (
            value is not None
            and found.n >= _ENOUGH
            and value <= guess + 2 * math.sqrt(guess * (100 - guess) / found.n)
        ):
            context.reporter.warn(
                f"{found.split} {measure.title} {value:.2f} {measure.unit} (n={found.n:,}) is what guessing "
                f"gives, {guess:.2f} {measure.unit}: nothing was learnt; more --epochs or another --lr may "
                "help"
            )
            return


def _width(checkpoint: Checkpoint, context: Context) -> int | None:
    """Number of classes that the outputs tell apart; None if they are about something else."""
    outputs = trial_outputs(checkpoint.model, checkpoint.spec.input_shape)
    task = judge_of(checkpoint, context).task
    return task.classes_in(outputs) if task.fits(outputs) else None


def _left(folder: RunFolder, context: Context) -> str:
    """Write the best epoch so far, and say what remains of a training that was interrupted."""
    if not folder.last.exists():
        return "no epoch was completed"
    last = folder.load(folder.last)
    if last.resume is None:
        return "nothing can be resumed"
    done = last.resume.state["epoch"]
    text = f"epoch {done} is complete in {folder.last}, and the same command with --resume goes on"
    best = best_of(last.resume, last.model.state_dict())
    if best is not None:
        last.model.load_state_dict(best.weights)
        folder.save(replace(last, resume=None), folder.best)
        text += f"; the best so far (epoch {best.epoch}) is {folder.best}"
    return text


def _summary(metrics: tuple[Metrics, ...], judge: Judge) -> str:
    less = {LOSS.name, *(measure.name for measure in judge.task.measures)} - {judge.main.name}
    less -= {judge.task.measures[0].name} if judge.task.measures else set()
    return ", ".join(
        f"{measured.split} {judge.measure(name).title} {judge.measure(name).shown(value, '.2f')} "
        f"(n {measured.n})"
        for measured in metrics
        for name, value in measured.values.items()
        if name not in less
    )
