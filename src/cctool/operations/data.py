"""The data that an operation uses: opened, served as its checkpoint wants them, and measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cctool.base.errors import DataError, UsageError
from cctool.base.networks import device_of, in_mode
from cctool.base.user_code import is_named, looks_like_user_code, split_arguments
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics, Preprocessing
from cctool.data.classes import by_name
from cctool.data.serving.batches import Batch, Batches
from cctool.graph.execution import run_at_once
from cctool.operations.context import Context
from cctool.operations.judge.task import Judge, judge_of
from cctool.operations.opening import parse_arguments
from cctool.options.common import DataOptions
from cctool.tasks.base import LOSS, Task
from cctool.tasks.details import Batching
from cctool.training.evaluate import evaluate, outputs_of
from cctool.training.loop.feed import Feed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from cctool.data.records import DataSource, Split


_OF_DATA = ("batch_size", "workers", "limit")


def say_unlooked_at(why: str, context: Context) -> None:
    """Say which of the given options of data change nothing, because no sample is looked at."""
    idle = given_of_data(context, "data", "data_arg")
    if idle:
        context.say_once(f"{', '.join(idle)} changes nothing: {why}")


def given_of_data(context: Context, *more: str) -> list[str]:
    """Flags of the options of data that were given."""
    return [f"--{name.replace('_', '-')}" for name in (*more, *_OF_DATA) if name in context.given]


def say_other_splits(split: str, context: Context) -> None:
    """Say which data are for a split that a command does not look at, which measures ``split`` alone."""
    for keyword, replaced in (("val_data", "validation"), ("test_data", "test")):
        if keyword in context.given and split != replaced:
            flag = f"--{keyword.replace('_', '-')}"
            context.say_once(f"{flag} changes nothing: it is the {replaced} split, and {split} is measured")


def open_source(
    options: DataOptions,
    checkpoint: Checkpoint,
    context: Context,
    *,
    renames: bool = False,
    own_labels: bool = False,
) -> DataSource | None:
    """Open the data for a checkpoint; None if no data set is given, or a remembered one cannot be opened.

    Labels are numbered by the names of the network's classes. ``renames`` keeps the data set's own numbers if
    it has as many classes and none of these names, for a training that gives the network other classes;
    ``own_labels`` always keeps them, for a network that gets a last layer for them.

    A remembered data set that cannot be opened gives a warning; one that was given is an error.
    """
    remembered = options.data is None
    reference = reference_of(options, checkpoint.spec.data)
    if reference is None:
        for option, other in (("--val-data", options.val_data), ("--test-data", options.test_data)):
            if other is not None:
                raise UsageError(f"{option} {other} replaces a split of a data set: name that with --data")
        idle = given_of_data(context)
        if idle:
            context.say_once(
                f"{', '.join(idle)} changes nothing: no data set is named (--data) or remembered"
            )
        return None
    if remembered:
        context.say_once(f"data: {reference}, the checkpoint's last (--data names another)")
    elif reference != options.data and not options.data_arguments:
        context.say_once(f"data: {reference}, with the arguments of the last time (--data-arg gives others)")
    try:
        source = _opened_first(options, checkpoint, context) or open_named(
            options, reference, context.user_code, checkpoint.spec.input_shape
        )
        contents = f"data: {source.reference}: {source.contents()}"
        known = checkpoint.spec.classes
        others = known is not None and set(source.classes).isdisjoint(known)
        # The numbers of a data set for something else are no classes of this network.
        own_labels = own_labels or checkpoint.spec.task != source.task
        if not own_labels and not (
            renames and others and known is not None and len(source.classes) == len(known)
        ):
            source = by_name(source, known)
    except DataError as error:
        if not remembered:
            raise
        context.reporter.warn(
            f"the checkpoint's last data set cannot be opened, so nothing is measured: {error}"
        )
        return None
    context.say_once(contents)
    for note in source.notes:
        context.say_once(f"data: {note}")
    for warning in source.warnings:
        context.reporter.warn(warning)
    return source


def reference_of(options: DataOptions, remembered: str | None) -> str | None:
    """The data set that a command names, or the remembered one.

    The user's function gets the arguments that the command gives, and else those that it got the last time.

    Raises:
        DataError: if arguments are given for data that are not the user's own.
    """
    from cctool.data.registry import with_arguments

    if options.data is None:
        return remembered
    arguments = parse_arguments(options.data_arguments)
    code, before = split_arguments(remembered or "")
    if not arguments and before and is_named(code, (options.data,)):
        arguments = before
    return with_arguments(options.data, arguments)


def open_named(
    options: DataOptions, reference: str, named: frozenset[str], input_shape: tuple[int, int, int] | None
) -> DataSource:
    """Open a data set, for a network of that input shape or before there is one."""
    from cctool.data.registry import open_data, with_arguments

    val_data, test_data = (
        None if other is None else with_arguments(other, parse_arguments(given))
        for other, given in (
            (options.val_data, options.val_data_arguments),
            (options.test_data, options.test_data_arguments),
        )
    )
    return open_data(
        reference,
        val_data=val_data,
        test_data=test_data,
        user_code=named,
        input_shape=input_shape,
        limit=options.limit,
    )


def _opened_first(options: DataOptions, checkpoint: Checkpoint, context: Context) -> DataSource | None:
    """The data set opened before there was a network, if opening it for the checkpoint gives the same."""
    found = context.opened
    if found is None or found.reference != options.data:
        return None
    # Data in memory cannot be opened by name; their limit was applied when they were taken.
    if found.held:
        return found
    if found.limit != options.limit:
        return None
    # Data sets of other splits may have other shapes; a user's function may return other data each time.
    if options.val_data or options.test_data or looks_like_user_code(found.reference):
        return None
    return found if found.shape == checkpoint.spec.input_shape else None


def require_source(
    options: DataOptions,
    checkpoint: Checkpoint,
    context: Context,
    why: str,
    *,
    renames: bool = False,
    own_labels: bool = False,
) -> DataSource:
    """Open the data for a checkpoint, as `open_source`; ``why`` says in the error what needs them.

    Raises:
        UsageError: if no data set is given or remembered.
        DataError: if it cannot be opened.
    """
    reference = options.data or checkpoint.spec.data
    if reference is None:
        raise UsageError(f"{why} needs data: name it with --data, as in --data digits or --data folder:DIR")
    source = open_source(options, checkpoint, context, renames=renames, own_labels=own_labels)
    if source is None:
        raise DataError(f"{why} needs data, and {reference} cannot be opened; --data names another")
    return source


def preprocessing_of(
    checkpoint: Checkpoint,
    source: DataSource,
    context: Context,
    *,
    whose: str = "this model",
    options: str = "--mean and --std",
) -> Preprocessing:
    """The preprocessing that the model was trained with; if unknown, the data set's, with a warning."""
    if checkpoint.spec.preprocessing is not None:
        return checkpoint.spec.preprocessing
    context.reporter.warn(
        f"the preprocessing of {whose} is unknown: using {source.name}'s, mean {_short(source.mean)} "
        f"std {_short(source.std)}; {options} say better"
    )
    return Preprocessing(mean=source.mean, std=source.std)


def with_preprocessing(checkpoint: Checkpoint, source: DataSource, context: Context) -> Checkpoint:
    """Record in the spec the preprocessing that the network was just trained with, if none is recorded."""
    if checkpoint.spec.preprocessing is not None:
        return checkpoint
    update = {"preprocessing": preprocessing_of(checkpoint, source, context)}
    return replace(checkpoint, spec=checkpoint.spec.model_copy(update=update))


def _short(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


def feed_of(
    checkpoint: Checkpoint,
    source: DataSource,
    options: DataOptions,
    context: Context,
    *,
    fabric: Fabric | None = None,
) -> Feed:
    """Serve a data set, opened for the checkpoint's input shape, normalised as the checkpoint says.

    ``fabric`` belongs to the processes that share the data; None if there is only this one.
    """
    return Feed(
        source,
        preprocessing_of(checkpoint, source, context),
        batch_size=options.batch_size,
        device=context.device if fabric is None else fabric.device,
        seed=context.runtime.seed,
        workers=options.workers,
        rank=0 if fabric is None else fabric.global_rank,
        world_size=1 if fabric is None else fabric.world_size,
        **making_targets(judge_of(checkpoint, context).task),
    )


def making_targets(task: Task) -> dict[str, Any]:
    """How batches make the targets of a task that does not stack them, as a keyword of `batches`."""
    return {"make_targets": task.batched} if isinstance(task, Batching) else {}


def first_images(batches: Iterable[Batch], count: int) -> Iterator[Tensor]:
    """The first ``count`` images of batches, (N, C, H, W) each."""
    for batch in batches:
        yield batch.images[:count]
        count -= len(batch.images)
        if count <= 0:
            return


def serve(
    checkpoint: Checkpoint, source: DataSource, split: str, options: DataOptions, context: Context
) -> Batches:
    """Serve a split un-augmented and in order, each image once."""
    return feed_of(checkpoint, source, options, context).plain(split)


def measured(
    checkpoint: Checkpoint,
    source: DataSource,
    options: DataOptions,
    context: Context,
    *,
    split: str = "test",
    also: Callable[[Any, Tensor], None] | None = None,
) -> Metrics:
    """Measure the loss and the metrics of the network's task on ``train``, ``validation`` or ``test``.

    Moves the model to the context's device. ``also`` gets the outputs and targets of each batch, too.

    Raises:
        DataError: if the data has no such split, no targets, or other classes than the network.
        TrainingError: if nothing says how the network is judged.
    """
    judge = judge_of(checkpoint, context)
    judge.require_measure("measuring")
    served = serve(checkpoint, source, split, options, context)
    found = evaluate(
        checkpoint.model.to(context.device),
        context.reporter.progress(served, f"evaluating on {split}", len(served)),
        split=split,
        device=context.device,
        precision=str(context.runtime.precision),
        task=judge.task,
        loss=judge.loss,
        metric=judge.metric,
        also=also,
    )
    warn_of_no_numbers(found, judge, context)
    return found


def warn_of_no_numbers(found: Metrics, judge: Judge, context: Context) -> None:
    """Warn if a network puts out NaN, so that its loss is none."""
    if judge.task.has_loss and LOSS.name not in found.values:
        context.reporter.warn(
            f"the {found.split} loss is NaN or infinite: the network's outputs are no numbers, and what else "
            "was measured means nothing"
        )


def measured_or_run(
    checkpoint: Checkpoint, source: DataSource, options: DataOptions, context: Context, *, split: str
) -> Metrics:
    """Measure on a split; a network that nothing can judge only runs on its images, and has no values."""
    if can_measure(checkpoint, source, (split,), context):
        return measured(checkpoint, source, options, context, split=split)
    served = serve(checkpoint, source, split, options, context)
    shown = context.reporter.progress(served, f"running on {split}", len(served))
    model = checkpoint.model.to(context.device)
    n = sum(
        len(b.images) for _, b in outputs_of(model, shown, context.device, str(context.runtime.precision))
    )
    return Metrics(split=split, n=n, values={})


def measured_splits(
    checkpoint: Checkpoint, source: DataSource | None, options: DataOptions, context: Context
) -> tuple[Metrics, ...]:
    """Measure on the validation and test splits that the data has.

    () without data, without targets, and for a network of which nothing says how it is judged; the last two
    are said.
    """
    if source is None:
        return ()
    splits = [split for split in ("validation", "test") if split in source.loaders]
    if not can_measure(checkpoint, source, splits, context):
        return ()
    return tuple(measured(checkpoint, source, options, context, split=split) for split in splits)


def can_measure(checkpoint: Checkpoint, source: DataSource, splits: Sequence[str], context: Context) -> bool:
    """Whether a network can be measured on splits; says why not."""
    judge = judge_of(checkpoint, context)
    if not judge.measures:
        option = "--metric" if "--metric" in judge.recorded or "--loss" not in judge.recorded else "--loss"
        context.say_once(f"not measured: {judge.why_not(option)}")
        return False
    missing = [f"{name} {reference}" for name, reference in judge.recorded.items() if not judge.has(name)]
    if missing:
        context.say_once(f"this network was trained with {' and '.join(missing)}, not named here")
    unlabelled = (split for split in splits if judge.needs_targets and not has_targets(source.split(split)))
    found = next(unlabelled, None)
    if found is not None:
        context.say_once(f"not measured: {source.origin(found)} has no labels")
    return found is None


def refuse_unlabelled(source: DataSource, judge: Judge, why: str) -> None:
    """Refuse training images without targets, unless the user's functions need none.

    Raises:
        DataError: naming the data set, and what needs them.
    """
    if judge.needs_targets and not has_targets(source.split("train")):
        raise DataError(f"{source.reference} has no labels, and {why} needs them")


def has_targets(split: Split) -> bool:
    """Whether the images of a split have labels or other targets."""
    if split.loaded is not None:
        return split.loaded.labelled
    if split.labels is not None or split.stream is None or not len(split):
        return split.labels is not None
    # A stream's labels come with its images: the first one tells.
    return split.stream.read(0, split.shape, None, 0)[1] is not None


def example(checkpoint: Checkpoint) -> tuple[Tensor, ...]:
    """Two random images on the model's device, the same each time, to trace the network with.

    Raises:
        ArchitectureError: the network does not run on its own input size.
    """
    # Normal noise, not zeros: the cut and the masked network are compared on these very images.
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *checkpoint.spec.input_shape, generator=generator).to(device_of(checkpoint.model))
    with in_mode(checkpoint.model, training=False):
        run_at_once(checkpoint.model, images)
    return (images,)
