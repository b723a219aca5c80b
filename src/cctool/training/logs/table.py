"""Where training writes its figures: always a CSV table, TensorBoard and MLflow on request.

Each log takes one row per epoch and the metrics at the end. A resumed training run continues the same log.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import nn

from cctool.checkpoint.file.atomic import write_bytes
from cctool.checkpoint.spec import Metrics
from cctool.training.resume.progress import EpochRow


class Log(Protocol):
    """A place for the figures of one training run."""

    def parameters(self, values: Mapping[str, object]) -> None:
        """Write the options, flat, once."""

    def epoch(self, row: EpochRow, model: nn.Module) -> None:
        """Write the figures of one epoch and, of the weights after it, sparsity or histograms."""

    def finish(self, metrics: Sequence[Metrics]) -> None:
        """Write the metrics of the finished network and close."""

    def close(self) -> None:
        """Close early, after an interruption or an error."""


def figures(row: EpochRow, model: nn.Module) -> dict[str, float]:
    """All scalars of one epoch by the names that TensorBoard and MLflow show them under."""
    found = {f"train/{name}": value for name, value in row.train.items()}
    found |= {f"validation/{name}": value for name, value in row.validation.items()}
    found |= {"learning_rate": row.lr, "batch_ms": row.batch_ms}
    for name, share in weight_sparsity(model).items():
        found["sparsity/total" if name == TOTAL else f"sparsity/weights/{name}"] = share
    return found


def write_csv(rows: Iterable[EpochRow], path: Path) -> None:
    """Write one line per epoch; always the whole table, so that a crash or a resume leaves none half written.

    Columns: epoch, learning_rate, batch_ms, seconds, best, sparsity (percent), then train_n, train_* and
    validation_n, validation_*.
    """
    lines = [_line(row) for row in rows]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_bytes(path, text.getvalue().encode())


def _line(row: EpochRow) -> dict[str, object]:
    return {
        "epoch": row.epoch,
        "learning_rate": row.lr,
        "batch_ms": round(row.batch_ms, 3),
        "seconds": round(row.seconds, 3),
        "best": int(row.best),
        "sparsity": row.sparsity,
        "train_n": row.n,
        **{f"train_{name}": value for name, value in row.train.items()},
        **({"validation_n": row.validation_n} if row.validation else {}),
        **{f"validation_{name}": value for name, value in row.validation.items()},
    }


TOTAL = "total"
"""Key of the whole network in what `weight_sparsity` returns."""


def weight_sparsity(model: nn.Module) -> Mapping[str, float]:
    """Percentage of exact zeros in each weight of at least two dimensions, and in all of them (``total``).

    Biases and normalisation are left out; tied weights count once.
    """
    weights = {name: value for name, value in model.named_parameters() if value.dim() >= 2}
    zeros = {name: int(value.numel() - value.detach().count_nonzero()) for name, value in weights.items()}
    elements = sum(value.numel() for value in weights.values())
    shares = {name: 100 * zeros[name] / value.numel() for name, value in weights.items() if value.numel()}
    return shares | {TOTAL: 100 * sum(zeros.values()) / elements if elements else 0.0}
