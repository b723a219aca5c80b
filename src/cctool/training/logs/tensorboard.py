"""Figures and weight histograms as TensorBoard event files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from cctool.base.errors import TrainingError
from cctool.checkpoint.spec import Metrics
from cctool.training.logs.table import figures
from cctool.training.resume.progress import EpochRow


class TensorBoardLog:
    """Writes into a folder that ``tensorboard --logdir`` shows.

    Args:
        folder: made if it does not exist.
        first_epoch: epochs done before; what an interrupted run wrote after them is hidden.
    """

    def __init__(self, folder: Path, first_epoch: int = 0) -> None:
        with warnings.catch_warnings():
            # tensorboard still imports what setuptools and numpy have deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise TrainingError(
                    "--tensorboard needs the package tensorboard: pip install 'cctool[tensorboard]'"
                ) from None
        self._writer = SummaryWriter(str(folder), purge_step=first_epoch + 1 if first_epoch else None)
        self._last = first_epoch

    def parameters(self, values: Mapping[str, object]) -> None:
        """Write the options as a text panel."""
        text = json.dumps(dict(values), indent=2, default=str)
        self._writer.add_text("options", f"```json\n{text}\n```")

    def epoch(self, row: EpochRow, model: nn.Module) -> None:
        """Write scalars and a histogram of each weight."""
        for name, value in figures(row, model).items():
            self._writer.add_scalar(name, value, row.epoch)
        for name, weight in model.named_parameters():
            self._writer.add_histogram(f"weights/{name}", weight.detach().float().cpu(), row.epoch)
        self._writer.flush()
        self._last = row.epoch

    def finish(self, metrics: Sequence[Metrics]) -> None:
        """Write the metrics of the finished network as ``final/SPLIT/NAME``."""
        for measured in metrics:
            for name, value in {**measured.values, "n": measured.n}.items():
                self._writer.add_scalar(f"final/{measured.split}/{name}", value, self._last)
        self.close()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
