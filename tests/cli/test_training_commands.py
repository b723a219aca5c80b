"""`cctool train`, `distill` and `evaluate` as they are typed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from cctool.cli.main import app

NET = """
from torch import nn

def make_net(num_classes=10, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, num_classes),
    )

def loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels)

def stops(outputs, labels):
    raise KeyboardInterrupt
"""
SMALL = ["--data", "digits", "--limit", "48", "--batch-size", "24", "--device", "cpu", "--deterministic"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_a_fresh_network_is_trained_and_evaluated() -> None:
    result = run("train", "--arch", "net.py:make_net", *SMALL, "--epochs", "2")
    assert (result.exit_code, result.stdout) == (0, "make_net.train.pt\n"), result.stderr
    assert "epoch 2/2" in result.stderr
    result = run("evaluate", "make_net.train.pt", "--arch", "net.py:make_net", "--limit", "48", "--json")
    report = json.loads(result.stdout)
    assert (report["split"], report["metrics"]["n"]) == ("test", 48)


def test_resume_takes_the_options_that_training_began_with() -> None:
    begun = ("--arch", "net.py:make_net", *SMALL, "--lr", "0.03", "--schedule", "multistep", "--seed", "3")
    begun = (*begun, "--milestones", "1,3", "--no-augment", "--epochs", "4", "--warmup-epochs", "1")
    assert run("train", *begun, "-o", "whole.pt").exit_code == 0
    assert run("train", *begun, "-o", "a.pt", "--stop-after", "2").stdout == "a.pt\n"
    result = run("train", "a.run/last.pt", "--arch", "net.py:make_net", "--resume", "--device", "cpu")
    assert result.stdout == "a.pt\n", result.stderr
    assert Path("a.pt").read_bytes() == Path("whole.pt").read_bytes()
    # Its run is complete now; going on changes nothing, by the product's name too.
    result = run("train", "a.pt", "--arch", "net.py:make_net", "--resume", "--device", "cpu")
    assert result.stdout == "a.pt\n", result.stderr
    assert Path("a.pt").read_bytes() == Path("whole.pt").read_bytes()


def test_resume_refuses_another_option_that_is_given() -> None:
    begun = ("--arch", "net.py:make_net", *SMALL, "--epochs", "3")
    run("train", *begun, "-o", "a.pt", "--stop-after", "1")
    result = run(
        "train", "--arch", "net.py:make_net", "--resume", "--device", "cpu", "-o", "a.pt", "--lr", "0.5"
    )
    assert result.exit_code == 1
    assert "lr was not given, now 0.5" in result.stderr


def test_a_file_never_makes_code_run_that_was_not_named() -> None:
    begun = ("--arch", "net.py:make_net", *SMALL, "--epochs", "2", "--loss", "net.py:loss", "-o", "a.pt")
    run("train", *begun, "--stop-after", "1")
    resumed = ("train", "--arch", "net.py:make_net", "--resume", "--device", "cpu", "-o", "a.pt")
    result = run(*resumed)
    assert result.exit_code == 1
    assert "add --loss net.py:loss" in result.stderr
    assert run(*resumed, "--loss", "net.py:loss").stdout == "a.pt\n"


def test_an_interruption_is_exit_130() -> None:
    result = run("train", "--arch", "net.py:make_net", *SMALL, "--epochs", "2", "--loss", "net.py:stops")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert "no epoch was completed" in result.stderr


def test_a_student_is_distilled_with_a_preset() -> None:
    run("train", "--arch", "lenet", *SMALL, "--epochs", "1", "-o", "teacher.pt")
    result = run(
        "distill", "--arch", "net.py:make_net", *SMALL, "--teacher", "teacher.pt",
        "--preset", "lhy-hw7", "--epochs", "1", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (product,) = json.loads(result.stdout)["products"]
    options = product["step"]["options"]
    assert (options["temperature"], options["alpha"], options["fit"]["optimizer"]) == (20.0, 0.5, "adamw")
    assert options["fit"]["epochs"] == 1
    # --batch-size was given, so that the preset's own does not count.
    assert options["data"]["batch_size"] == 24
    assert product["step"]["others"]["teacher"]["path"] == "teacher.pt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--milestones", "1;2"), "--milestones 1;2"),
        (("--epochs", "-1"), "--epochs -1"),
        (("--optimizer", "sdg"), "sgd, adam, adamw"),
        (("--devices", "2", "--batch-size", "2"), "at least 4 is needed"),
    ],
)
def test_wrong_options_are_exit_2(arguments: tuple[str, ...], message: str) -> None:
    result = run("train", "--arch", "lenet", "--data", "digits", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
