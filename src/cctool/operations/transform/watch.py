"""What `cctool evaluate` sees of coded feature maps while it measures: figures, bitstreams, reports."""

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

__all__ = ["Seen", "TapWatch", "refuse_unwatched", "watched"]


@dataclass(frozen=True)
class Seen:
    """What was seen of taps.

    Attributes:
        taps: figures.
        streams: sizes of bitstreams.
        written: folders and files.
    """

    taps: tuple[TapFigures, ...] = ()
    streams: tuple[StreamFigures, ...] = ()
    written: tuple[str, ...] = ()


def refuse_unwatched(checkpoint: Checkpoint, options: EvaluateOptions, context: Context) -> None:
    """Refuse to start work that has nothing to look at, or whose files could not be written.

    Raises:
        UsageError: if the network has no taps and something of them is asked for.
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
    """Looks at every pass through a tap, once on the way of a split through the network."""

    checkpoint: Checkpoint
    data: str
    split: str
    options: EvaluateOptions
    context: Context
    folder: Path | None
    statistics: NetworkStatistics
    streams: Bitstreams | None

    def __call__(self, name: str, symbols: Symbols, x: Tensor, y: Tensor) -> Tensor | None:
        """Count one pass, and write it; what it decodes to, where that goes on."""
        self.statistics(name, symbols, x, y)
        return None if self.streams is None else self.streams(name, symbols, x, y)

    def batches(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Pass the batches of the split on."""
        return batches if self.streams is None else self.streams.batches(batches)

    def finish(self, metrics: Metrics | None) -> Seen:
        """Write everything that was asked for, once all batches have passed."""
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
    """Look at all passes through taps within; the folder of streams gets its name at the end.

    Args:
        checkpoint: the network, with or without taps.
        data: reference of the data set.
        split: that is passed.
        options: what is to be written.
        context: device, and whether files may be replaced.
    """
    with contextlib.ExitStack() as stack:
        folder = streams = None
        if options.bitstream is not None:
            folder = stack.enter_context(
                folder_atomically(Path(options.bitstream), overwrite=context.force, ours=is_ours)
            )
        if options.through_bitstream or folder is not None:
            streams = Bitstreams(checkpoint.model, folder, through=options.through_bitstream)
            stack.callback(streams.close)
        statistics = NetworkStatistics(checkpoint.model)
        watch = TapWatch(checkpoint, data, split, options, context, folder, statistics, streams)
        stack.enter_context(recording(checkpoint.model, watch))
        yield watch
