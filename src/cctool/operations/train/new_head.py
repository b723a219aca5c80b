"""Transfer learning: a fresh last layer for the classes of another data set."""

from __future__ import annotations

from dataclasses import replace

from cctool.base.errors import ArchitectureError, DataError
from cctool.base.networks import some
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.graph.heads import output_layers
from cctool.operations.context import Context
from cctool.operations.data import example
from cctool.operations.keep import events
from cctool.operations.keep.follower import Followed


def with_new_head(checkpoint: Checkpoint, source: DataSource, context: Context) -> Followed:
    """The checkpoint whose last layer is fresh, with an output for each class of a data set; notes say so.

    The model is changed in place. Auxiliary classifiers get a fresh layer, too.

    Raises:
        DataError: if the data set has no classes.
        ArchitectureError: if no layer alone gives the outputs, or the network does not run with another one.
    """
    if not source.classes:
        raise DataError(f"--new-head needs a data set with classes, and {source.reference} has none")
    plain = events.plain_checkpoint(checkpoint)
    layers = output_layers(plain.model, example(plain))
    outputs, before = (
        len(source.classes),
        plain.model.get_submodule(layers[0]).get_parameter("weight").shape[0],
    )
    found, notes = events.new_head(checkpoint, layers, outputs, context)
    try:
        again = output_layers(events.plain_checkpoint(found).model, example(found))
    except ArchitectureError as error:
        raise ArchitectureError(
            f"the network does not take a last layer of {outputs} outputs ({error}); --arg may tell its "
            "builder the number of classes"
        ) from error
    if again != layers:
        raise ArchitectureError(f"the network does not take a last layer of {outputs} outputs")
    spec = found.spec.model_copy(update={"classes": source.classes, "data": source.reference})
    kind = "class" if outputs == 1 else "classes"
    remark = f"new head: {some(layers)}, {outputs} {kind} (was {before})"
    for note in (remark, *notes):
        context.reporter.note(note)
    return Followed(replace(found, spec=spec), (remark, *notes))
