"""Logs, read back with the readers of TensorBoard, MLflow and the csv module."""

import csv
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from cctool.checkpoint.spec import Metrics
from cctool.training.logs.table import write_csv
from cctool.training.resume.progress import EpochRow
from training_toys import network

ROWS = [
    EpochRow(1, 0.1, 2.5, 3.0, 64, {"loss": 1.5, "top1": 40.0}),
    EpochRow(2, 0.05, 2.0, 2.8, 64, {"loss": 1.0, "top1": 60.0}, {"loss": 1.1, "top1": 55.0}, 30, best=True),
]
FINAL = (Metrics(split="test", n=21, values={"top1": 57.0, "loss": 1.2}),)


def test_csv_holds_a_line_an_epoch(tmp_path: Path) -> None:
    write_csv(ROWS[:1], tmp_path / "metrics.csv")
    write_csv(ROWS, tmp_path / "metrics.csv")
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert (first["epoch"], first["train_loss"], first["validation_top1"]) == ("1", "1.5", "")
    assert (second["validation_top1"], second["validation_n"], second["best"]) == ("55.0", "30", "1")
    assert (second["learning_rate"], second["batch_ms"], second["sparsity"]) == ("0.05", "2.0", "0.0")


def sparse() -> torch.nn.Sequential:
    model = network()
    with torch.no_grad():
        model[0].weight.flatten()[:27] = 0
    return model


def scalars(folder: Path) -> tuple[dict[str, dict[int, float]], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder))
        found.Reload()
    values = {
        tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]
    }
    return values, found


def test_tensorboard_is_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from cctool.training.logs.tensorboard import TensorBoardLog

    log = TensorBoardLog(tmp_path)
    log.parameters({"fit.lr": 0.1})
    for row in ROWS:
        log.epoch(row, sparse())
    log.finish(FINAL)
    values, events = scalars(tmp_path)
    assert values["train/loss"] == {1: 1.5, 2: 1.0}
    assert values["validation/top1"] == {2: 55.0}
    assert values["learning_rate"] == pytest.approx({1: 0.1, 2: 0.05})
    assert values["batch_ms"] == {1: 2.5, 2: 2.0}
    assert values["sparsity/weights/0.weight"] == {1: 50.0, 2: 50.0}
    assert values["sparsity/total"][2] == pytest.approx(100 * 27 / 1206)
    assert values["final/test/top1"] == {2: 57.0}
    assert values["final/test/n"] == {2: 21.0}
    assert "weights/5.weight" in events.Tags()["histograms"]
    (text,) = events.Tensors("options/text_summary")
    assert b'"fit.lr": 0.1' in text.tensor_proto.string_val[0]


def test_tensorboard_forgets_epochs_that_are_trained_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from cctool.training.logs.tensorboard import TensorBoardLog

    first = TensorBoardLog(tmp_path)
    for row in ROWS:
        first.epoch(row, sparse())
    first.close()
    again = TensorBoardLog(tmp_path, first_epoch=1)
    again.epoch(EpochRow(2, 0.05, 9.0, 9.0, 64, {"loss": 0.5}), sparse())
    again.close()
    values, _ = scalars(tmp_path)
    assert values["train/loss"] == {1: 1.5, 2: 0.5}


@pytest.fixture
def mlflow_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=(tmp_path / "store").as_uri())


def test_mlflow_is_read_back(tmp_path: Path, mlflow_client: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from cctool.training.logs.mlflow import MlflowLog

    environment = dict(os.environ)
    log = MlflowLog(tmp_path / "store", "student", tmp_path / "note")
    log.parameters({"fit.lr": 0.1, "fit.optimizer": "sgd"})
    log.epoch(ROWS[0], sparse())
    log.close()
    log = MlflowLog(tmp_path / "store", "student", tmp_path / "note", resume=True)
    log.epoch(ROWS[1], sparse())
    log.finish(FINAL)

    assert dict(os.environ) == environment
    assert capfd.readouterr().out == ""
    experiment = mlflow_client.get_experiment_by_name("cctool")
    (run,) = mlflow_client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"fit.lr": "0.1", "fit.optimizer": "sgd"}
    history = mlflow_client.get_metric_history(run.info.run_id, "train/loss")
    assert {item.step: item.value for item in history} == {1: 1.5, 2: 1.0}
    metrics = run.data.metrics
    assert metrics["validation/top1"] == 55
    assert metrics["learning_rate"] == 0.05
    assert metrics["batch_ms"] == 2
    assert metrics["sparsity/weights/0.weight"] == 50
    assert metrics["final/test/top1"] == 57
    (histogram,) = (tmp_path / "store").rglob("epoch-0002.json")
    counts = json.loads(histogram.read_text())["0.weight"]
    assert sum(counts["counts"]) == 54
    assert counts["low"] == pytest.approx(sparse()[0].weight.min().item())
