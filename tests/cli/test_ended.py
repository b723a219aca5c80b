"""A training that is ended from outside says what is kept, and how to go on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cctool.cli.main import app

NET = """
import os, signal
from torch import nn

def make_net(num_classes=10, in_channels=1):
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * in_channels, num_classes))

def ended(outputs, labels):
    ended.calls += outputs.requires_grad
    if ended.calls == 3:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return nn.functional.cross_entropy(outputs, labels)
ended.calls = 0

def late(outputs, labels):
    # Called once an epoch, and then for the splits of the finished network.
    late.calls += 1
    if late.calls == 3:
        raise KeyboardInterrupt
    return 1.0
late.calls = 0
"""
LINE = ("train", "--arch", "net.py:make_net", "--data", "digits", "--limit", "32", "--batch-size", "16")
LINE = (*LINE, "--epochs", "2", "--device", "cpu", "-o", "a.pt")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)


@pytest.mark.parametrize(
    ("number", "word", "status"), [(signal.SIGTERM, "terminated", 143), (signal.SIGINT, "interrupted", 130)]
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")
def test_a_signal_says_what_is_left(number: signal.Signals, word: str, status: int) -> None:
    # Shells start commands in the background with SIGINT ignored, which these would inherit.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "from cctool.cli.main import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", start, *LINE, "--loss", "net.py:ended"],
        env={**os.environ, "SIGNAL": str(int(number))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (status, ""), ended.stderr
    *_, left, last = ended.stderr.splitlines()
    assert "epoch 1 is complete in a.run/last.pt, and the same command with --resume goes on" in left
    assert last == f"error: {word}"


def test_an_interruption_after_the_last_epoch_says_so_too() -> None:
    result = CliRunner().invoke(app, [*LINE, "--metric", "net.py:late"])
    assert (result.exit_code, result.stdout) == (130, "")
    assert "epoch 2 is complete in a.run/last.pt, and the same command with --resume goes on" in result.stderr
    result = CliRunner().invoke(app, [*LINE, "--metric", "net.py:late", "--resume"])
    assert (result.exit_code, result.stdout) == (0, "a.pt\n"), result.stderr
