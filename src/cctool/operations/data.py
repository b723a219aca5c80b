"""Which data an operation uses: the command line's, or the last that the checkpoint remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cctool.base.errors import DataError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Preprocessing
from cctool.operations.context import Context
from cctool.operations.opening import DataShape
from cctool.options.common import DataOptions, ModelOptions

if TYPE_CHECKING:
    from cctool.data.records import DataSource

__all__ = ["describe", "open_source", "require_source"]


def describe(options: DataOptions, model: ModelOptions, named: frozenset[str]) -> DataShape:
    """Say what a data set wants of a fresh network."""
    from cctool.data.registry import open_data

    source = open_data(
        str(options.data),
        val_data=options.val_data,
        test_data=options.test_data,
        user_code=named,
        input_shape=model.input_shape,
        limit=options.limit,
    )
    return DataShape(source.shape, source.classes, Preprocessing(mean=source.mean, std=source.std))


def open_source(options: DataOptions, checkpoint: Checkpoint, context: Context) -> DataSource | None:
    """Open the data for a checkpoint; None where none was named and none is remembered or to be found.

    A data set that is only remembered and cannot be opened is a warning; one that was named is an error.
    """
    from cctool.data.registry import open_data

    remembered = options.data is None
    reference = checkpoint.spec.data if remembered else options.data
    if reference is None:
        for option, other in (("--val-data", options.val_data), ("--test-data", options.test_data)):
            if other is not None:
                raise UsageError(f"{option} {other} replaces a split of a data set: name that with --data")
        return None
    if remembered:
        context.reporter.note(f"data: {reference}, the checkpoint's last (--data names another)")
    try:
        source = open_data(
            reference,
            val_data=options.val_data,
            test_data=options.test_data,
            user_code=context.user_code,
            input_shape=checkpoint.spec.input_shape,
            limit=options.limit,
        )
    except DataError as error:
        if not remembered:
            raise
        context.reporter.warn(
            f"the checkpoint's last data set cannot be opened, so nothing is measured: {error}"
        )
        return None
    for note in source.notes:
        context.reporter.note(f"data: {note}")
    return source


def require_source(options: DataOptions, checkpoint: Checkpoint, context: Context, why: str) -> DataSource:
    """Open the data for a checkpoint, or fail with the way out.

    Raises:
        UsageError: if no data set was named and none is remembered.
        DataError: if it cannot be opened.
    """
    reference = options.data or checkpoint.spec.data
    if reference is None:
        raise UsageError(f"{why} needs data: name it with --data, as in --data digits or --data folder:DIR")
    source = open_source(options, checkpoint, context)
    if source is None:
        raise DataError(f"{why} needs data, and {reference} cannot be opened; --data names another")
    return source
