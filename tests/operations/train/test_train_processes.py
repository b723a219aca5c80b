"""Training in two processes equals training in one, and fails in one line."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cctool.base.errors import DeviceError, TrainingError, UsageError, UserCodeError
from cctool.checkpoint.checkpoint import load
from cctool.operations import pipeline
from cctool.operations.registries import tables
from cctool.operations.train import run as train
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import RunOptions, TrainOptions

# Group norm: batch norm of halves of a batch differs, and here the result shall be the same.
NET = """
import os
import torch
from torch import nn

def make_net(num_classes=10, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, num_classes),
    )

def with_batch_norm(num_classes=10, in_channels=1):
    net = make_net(num_classes, in_channels)
    net[1] = nn.BatchNorm2d(4)
    return net

def share(outputs, labels):
    if "RANK" in os.environ:
        print("noise on stdout")
    return len(labels) + (outputs.argmax(1) == labels).float().mean()

def fails_in_the_second(outputs, labels):
    if os.environ.get("RANK") == "1":
        raise ValueError("no luck")
    return nn.functional.cross_entropy(outputs, labels)

def slow(outputs, labels):
    import time
    time.sleep(0.3)
    return nn.functional.cross_entropy(outputs, labels)
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path}/net.py:make_net"


def asked(net: str, output: Path, *user: str) -> pipeline.Request:
    return pipeline.Request(
        verb="train",
        source=None,
        output=str(output),
        model=ModelOptions(arch=net),
        runtime=RuntimeOptions(device="cpu"),
        user_code=user,
    )


def options(devices: int, *, run: dict[str, Any] | None = None, **fit: Any) -> TrainOptions:
    return TrainOptions(
        FitOptions(**{"epochs": 2, "lr": 0.05, **fit}),
        # 63 = one batch of 32 and one of 31: the processes' parts of the last one differ.
        DataOptions(data="digits", limit=63, batch_size=32),
        RunOptions(devices=devices, **(run or {})),
    )


def test_two_processes_give_what_one_gives(
    tmp_path: Path, net: str, capfd: pytest.CaptureFixture[str]
) -> None:
    metric = net.replace("make_net", "share")
    (one,) = pipeline.write(train.run, options(1, metric=metric), asked(net, tmp_path / "one.pt", metric))
    capfd.readouterr()
    wanted = asked(net, tmp_path / "two.pt", metric)
    (two,) = pipeline.write(train.run, options(2, metric=metric, run={"tensorboard": True}), wanted)
    assert "noise" not in capfd.readouterr().out

    for ours, theirs in zip(two.step.metrics_after, one.step.metrics_after, strict=True):
        assert (ours.split, ours.n) == (theirs.split, theirs.n) == (ours.split, 63)
        # The last batch of 31 weighs both halves alike, though one has an image more.
        assert ours.values["loss"] == pytest.approx(theirs.values["loss"], rel=1e-2)
        assert ours.values["top1"] == pytest.approx(theirs.values["top1"], abs=5)
    for ours, theirs in zip(two.report.rows, one.report.rows, strict=True):
        assert (ours.n, ours.validation_n) == (theirs.n, theirs.validation_n) == (63, 63)
        # The whole split reaches the user's metric, each image once.
        assert int(ours.validation["share"]) == 63
        assert ours.train["loss"] == pytest.approx(theirs.train["loss"], rel=1e-2)
    assert two.report.rows[0].train["loss"] == pytest.approx(one.report.rows[0].train["loss"], rel=1e-3)
    folder = tmp_path / "two.run"
    assert "noise on stdout" in (folder / "worker-0.log").read_text()
    assert list((folder / "tensorboard").iterdir())
    found = load(two.path, tables((net,)))
    assert found.resume is None
    assert [step.verb for step in found.history] == ["train"]
    again = replace(wanted, resumes=True)
    with pytest.raises(TrainingError, match="devices was 2, now 1"):
        list(pipeline.write(train.run, options(1, metric=metric, run={"resume": True}), again))


@pytest.mark.slow
def test_resumed_processes_equal_uninterrupted_ones(tmp_path: Path, net: str) -> None:
    net = net.replace("make_net", "with_batch_norm")
    (whole,) = pipeline.write(train.run, options(2), asked(net, tmp_path / "whole.pt"))
    wanted = replace(asked(net, tmp_path / "halved.pt"), resumes=True)
    (halved,) = pipeline.write(train.run, options(2, run={"stop_after": 1}), wanted)
    assert halved.file != whole.file
    (resumed,) = pipeline.write(train.run, options(2, run={"resume": True}), wanted)
    assert resumed.file == whole.file


def test_a_failing_worker_becomes_one_line(tmp_path: Path, net: str) -> None:
    loss = net.replace("make_net", "fails_in_the_second")
    with pytest.raises(UserCodeError, match="fails_in_the_second raised ValueError: no luck") as caught:
        list(pipeline.write(train.run, options(2, loss=loss), asked(net, tmp_path / "a.pt", loss)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.pt").exists()
    assert "Traceback" in (tmp_path / "a.run/worker-1.log").read_text()


# Shells start commands in the background with SIGINT ignored, which these would inherit.
COMMAND = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
COMMAND += "from cctool.cli.main import main; main()"


@pytest.mark.slow
@pytest.mark.parametrize("hard", [False, True], ids=["SIGINT", "SIGKILL"])
def test_workers_do_not_outlive_their_parent(tmp_path: Path, net: str, hard: bool) -> None:
    loss = net.replace("make_net", "slow")
    output = str(tmp_path / "a.pt")
    arguments = [
        "train",
        "--arch",
        net,
        "--data",
        "digits",
        "--epochs",
        "40",
        "--loss",
        loss,
        "--limit",
        "64",
    ]
    parent = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments, "--devices", "2", "--device", "cpu", "-o", output],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parents[3])},
    )
    deadline = time.monotonic() + 90
    while not (tmp_path / "a.run/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    parent.send_signal(signal.SIGKILL if hard else signal.SIGINT)
    out, err = parent.communicate(timeout=30)
    assert out == ""
    if not hard:
        assert parent.returncode == 130
        assert "--resume goes on" in err
        assert "Traceback" not in err
    job = str(tmp_path / "a.run/job0.json")
    while _workers_of(job) and time.monotonic() < deadline + 20:
        time.sleep(0.2)
    assert _workers_of(job) == []


def _workers_of(job: str) -> list[str]:
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if "cctool.operations.train.worker" in line and job in line]


@pytest.mark.slow
def test_two_machines_train_together(tmp_path: Path, net: str) -> None:
    """Two commands on this machine stand for two machines, each with a folder of its own."""
    commands = []
    for rank in range(2):
        folder = tmp_path / f"machine{rank}"
        folder.mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(train.__file__).parents[3]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29517",
            "NODE_RANK": str(rank),
        }
        arguments = [
            "train",
            "--arch",
            net,
            "--data",
            "digits",
            "--epochs",
            "1",
            "--limit",
            "64",
            "-o",
            "a.pt",
        ]
        commands.append(
            subprocess.Popen(
                [sys.executable, "-c", COMMAND, *arguments, "--nodes", "2", "--device", "cpu"],
                cwd=folder,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
    outputs = [command.communicate(timeout=120)[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0]
    assert outputs == ["a.pt\n", ""]
    assert not (tmp_path / "machine1/a.pt").exists()


def test_processes_must_fit_the_machine(tmp_path: Path, net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cctool.operations.train import workers as processes

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="1 usable CUDA"):
        processes._environment(RunOptions(devices=2), torch.device("cuda"))
    with pytest.raises(UsageError, match="--device cuda lets each take its own"):
        processes._environment(RunOptions(devices=2), torch.device("cuda", 1))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match="set MASTER_ADDR"):
        processes._environment(RunOptions(nodes=2), torch.device("cpu"))
    with pytest.raises(UsageError, match="at least 4 is needed"):
        TrainOptions(data=DataOptions(batch_size=3), run=RunOptions(devices=2))
