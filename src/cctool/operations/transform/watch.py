"""What `cctool evaluate` records of coded feature maps while it measures: figures, bitstreams, reports."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cctool.base.errors import UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.file.atomic_folder import folder_atomically, refuse_existing_folder
from cctool.checkpoint.spec import Metrics
from cctool.data.serving.batches import Batch
from cctool.operations.context import Context
from cctool.operations.transform.files import refuse_reports, write_reports
from cctool.operations.transform.stream_index import Index, is_ours, made_with, write_index
from cctool.operations.transform.write_streams import Bitstreams, StreamFigures
from cctool.options.inspect.evaluate import EvaluateOptions
from cctool.transforms.codec.codec import Symbols
from cctool.transforms.codec.figures import NetworkStatistics, TapFigures
from cctool.transforms.codec.taps import recording, taps_of


@dataclass(frozen=True)
class Seen:
    """Figures of the taps, sizes of their bitstreams, and the paths of folders and files written."""

    taps: tuple[TapFigures, ...] = ()
    streams: tuple[StreamFigures, ...] = ()
    written: tuple[str, ...] = ()


def refuse_unwatched(checkpoint: Checkpoint, options: EvaluateOptions, context: Context) -> None:
    """Refuse to start if there is nothing to record, or its files could not be written.

    Raises:
        UsageError: if options ask for figures of taps, and the network has none.
        CheckpointError: if a file or folder exists and may not be replaced.
    """
    if options.asks_for_taps and not taps_of(checkpoint.model):
        raise UsageError(
            "--bitstream, --through-bitstream, --report-file and --histograms are about coded feature maps, "
            "and this network has none: `cctool transform --target features` puts codecs in"
        )
    refuse_reports(options, context)
    if options.bitstream is not None:
        refuse_existing_folder(Path(options.bitstream), overwrite=context.force, ours=is_ours)


@dataclass(frozen=True)
class TapWatch:
    """Records every pass through a tap while a split passes the network once.

    Attributes:
        checkpoint: of the network.
        data: reference of the data set.
        split: that passes.
        options: what to write.
        context: of the command.
        folder: where streams are written, under a temporary name; None for no files.
        statistics: counts values, symbols and bits.
        streams: codes maps to bytes; None if not asked for.
    """

    checkpoint: Checkpoint
    data: str
    split: str
    options: EvaluateOptions
    context: Context
    folder: Path | None
    statistics: NetworkStatistics
    streams: Bitstreams | None

    def __call__(self, name: str, symbols: Symbols, x: Tensor, y: Tensor) -> Tensor | None:
        """Count and write one pass; gives the decoded map, if the network is to go on with it."""
        self.statistics(name, symbols, x, y)
        return None if self.streams is None else self.streams(name, symbols, x, y)

    def batches(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Pass on the batches of the split."""
        return batches if self.streams is None else self.streams.batches(batches)

    def finish(self, metrics: Metrics | None) -> Seen:
        """Write all that the options ask for, after the last batch."""
        figures, written = self.statistics.figures(), []
        bitstream = self.options.bitstream
        streams: tuple[StreamFigures, ...] = ()
        if self.streams is not None:
            streams, entries = self.streams.finish(None if bitstream is None else Path(bitstream))
            if self.folder is not None:
                index = Index(
                    network=self.checkpoint.spec.architecture,
                    data=self.data,
                    split=self.split,
                    made_with=made_with(self.context.device),
                    streams=entries,
                )
                write_index(index, self.folder)
                written.append(str(bitstream))
        measured_on = f"{self.data}, {self.split} split"
        after = () if metrics is None else (metrics,)
        written += write_reports(figures, self.options, self.checkpoint, measured_on, (), after, self.context)
        return Seen(figures, streams, tuple(written))


@contextlib.contextmanager
def watched(
    checkpoint: Checkpoint, data: str, split: str, options: EvaluateOptions, context: Context
) -> Iterator[TapWatch]:
    """Record all passes through taps within the block; at its end the folder of streams gets its name."""
    with contextlib.ExitStack() as stack:
        folder = streams = None
        if options.bitstream is not None:
            folder = stack.enter_context(
                folder_atomically(Path(options.bitstream), overwrite=context.force, ours=is_ours)
            )
        # Coding to bytes takes time: only if they are kept, or decoded on the way.
        if options.through_bitstream or folder is not None:
            streams = Bitstreams(checkpoint.model, folder, through=options.through_bitstream)
            stack.callback(streams.close)
        statistics = NetworkStatistics(checkpoint.model)
        watch = TapWatch(checkpoint, data, split, options, context, folder, statistics, streams)
        stack.enter_context(recording(checkpoint.model, watch))
        yield watch
