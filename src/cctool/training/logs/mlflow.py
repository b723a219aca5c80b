"""Figures as a run in a local MLflow file store."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cctool.base.errors import TrainingError
from cctool.checkpoint.spec import Metrics
from cctool.training.logs.table import figures
from cctool.training.resume.progress import EpochRow

# No data leave this machine, and since MLflow 3 its file store must be enabled.
_SETTINGS = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
_BINS = 30
_LONGEST_PARAMETER = 500


@contextmanager
def _quiet() -> Iterator[None]:
    """Set what MLflow reads from the environment, and ignore warnings, during one call."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update(_SETTINGS)
    try:
        with warnings.catch_warnings():
            # Of its dependencies, and its advice to use a database.
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class MlflowLog:
    """Writes one run, in the experiment ``cctool``.

    Args:
        store: folder of the file store, for ``mlflow ui --backend-store-uri``.
        name: of the run.
        note: file that holds the run's id, so that a resumed training run continues it.
        resume: whether to continue the run in ``note``.
    """

    def __init__(self, store: Path, name: str, note: Path, *, resume: bool = False) -> None:
        with _quiet():
            try:
                from mlflow.tracking import MlflowClient
            except ImportError:
                raise TrainingError(
                    "--mlflow needs the package mlflow: pip install 'cctool[mlflow]'"
                ) from None
            self._client: Any = MlflowClient(tracking_uri=store.resolve().as_uri())
            self._last = 0
            if resume and note.exists():
                self._run = note.read_text(encoding="utf-8").strip()
                self._client.set_terminated(self._run, status="RUNNING")
                return
            found = self._client.get_experiment_by_name("cctool")
            experiment = found.experiment_id if found else self._client.create_experiment("cctool")
            self._run = self._client.create_run(experiment, run_name=name).info.run_id
        note.write_text(f"{self._run}\n", encoding="utf-8")

    def parameters(self, values: Mapping[str, object]) -> None:
        """Write the options as parameters."""
        with _quiet():
            for name, value in values.items():
                self._client.log_param(self._run, name, str(value)[:_LONGEST_PARAMETER])

    def epoch(self, row: EpochRow, model: nn.Module) -> None:
        """Write metrics, and a histogram of each weight as the artifact ``histograms/epoch-N.json``."""
        with _quiet():
            for name, value in figures(row, model).items():
                self._client.log_metric(self._run, name, value, step=row.epoch)
            self._client.log_dict(self._run, _histograms(model), f"histograms/epoch-{row.epoch:04d}.json")
        self._last = row.epoch

    def finish(self, metrics: Sequence[Metrics]) -> None:
        """Write the metrics of the finished network as ``final/SPLIT/NAME``, and end the run."""
        with _quiet():
            for measured in metrics:
                for name, value in {**measured.values, "n": measured.n}.items():
                    self._client.log_metric(
                        self._run, f"final/{measured.split}/{name}", value, step=self._last
                    )
            self._client.set_terminated(self._run)

    def close(self) -> None:
        """End the run with the status "killed"."""
        with _quiet():
            self._client.set_terminated(self._run, status="KILLED")


def _histograms(model: nn.Module) -> dict[str, dict[str, Any]]:
    found = {}
    for name, weight in model.named_parameters():
        values = weight.detach().float().cpu().flatten()
        low, high = values.min().item(), values.max().item()
        counts = torch.histc(values, bins=_BINS, min=low, max=high)
        found[name] = {"low": low, "high": high, "counts": counts.long().tolist()}
    return found
