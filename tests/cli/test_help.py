"""Help must not cost the import of torch, nor of what Typer checks values with."""

import json
import subprocess
import sys

import pytest

from cctool.cli.main import app

COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]

PROBE = """
import sys, json
from cctool.cli.main import main
try:
    main()
except SystemExit as stop:
    heavy = [name for name in ("torch", "numpy", "onnx", "torchvision", "pydantic") if name in sys.modules]
    print(json.dumps([stop.code, heavy]), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_leaves_torch_alone(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True
    )
    code, heavy = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    assert heavy == []
    assert "--help" in done.stdout


def test_all_verbs_of_the_mission_are_there() -> None:
    assert {"train", "evaluate", "distill", "prune", "quantize", "analyze", "export"} <= set(COMMANDS)


def test_an_unknown_command_is_wrong_usage() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, "prnue"], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr.splitlines()[-1])[0] == 2
