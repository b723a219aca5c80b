"""What commands say of their data, and the arguments of the user's own data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import cctool
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec
from cctool.cli.main import app
from cctool.data.registry import open_data
from cctool.data.serving.streaming import stacked
from cctool.operations.data import feed_of
from cctool.operations.python.data_in_memory import in_memory
from cctool.options.common import DataOptions
from cctool.tasks.custom import Untold
from cctool.tasks.table import TASKS
from layouts import write_class_folders, write_image
from procedure_toys import context

CODE = """
import numpy as np

def data(size, n=24, noise="low"):
    random = np.random.default_rng(0)
    images = random.integers(0, {"low": 50, "high": 255}[noise], (n, size, size), dtype=np.uint8)
    parts = {"train": (images, np.arange(n) % 3), "test": (images[:6], np.arange(min(n, 6)) % 3)}
    return parts | {"validation": (images[:3], np.arange(3)), "classes": ["a", "b", "c"]}
"""


def ran(*line: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in line])
    assert result.exit_code == exit_code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "my.py").write_text(CODE)
    return f"{tmp_path / 'my.py'}:data"


@pytest.fixture
def net(tmp_path: Path, code: str) -> Path:
    path = tmp_path / "net.pt"
    line = ["--arch", "lenet", "--epochs", 0, "--data", code, "--data-arg", "size=32", "--data-arg", "n=12"]
    ran("train", *line, "-o", path)
    return path


def test_arguments_are_read_recorded_and_remembered(net: Path, code: str) -> None:
    kept = cctool.load(net)
    assert kept.spec.data == f'{code} {{"size": 32, "n": 12}}'
    assert kept.history[-1].options["data"]["data_arguments"] == ["size=32", "n=12"]
    said = ran("evaluate", net, "--data", code)
    assert "3 classes; 12 training, 3 validation, 6 test images" in said
    assert "--data-arg gives others" in said
    others = ran("evaluate", net, "--data", code, "--data-arg", "size=32", "--data-arg", "n=18")
    assert "3 classes; 18 training, 3 validation, 6 test images" in others
    assert "--data-arg gives others" not in others


def test_a_file_never_runs_code(net: Path, code: str) -> None:
    said = ran("evaluate", net, exit_code=1)
    assert "is user code, which runs only when it is named" in said


def test_arguments_change_what_is_measured(net: Path, code: str) -> None:
    values = [
        cctool.evaluate(cctool.load(net), data=code, data_arg=["size=32", f"noise={noise}"]).metrics.values
        for noise in ("low", "high")
    ]
    assert values[0] != values[1]


def test_other_splits_have_their_own_arguments(net: Path, code: str) -> None:
    line = ["--data", code, "--val-data", code, "--val-data-arg", "size=32", "--test-data", code]
    said = ran("evaluate", net, *line, "--test-data-arg", "size=32", "--test-data-arg", "n=4")
    assert "3 classes; 12 training, 3 validation, 4 test images" in said
    assert "raised TypeError" in ran("evaluate", net, "--data", code, "--val-data", code, exit_code=1)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--data-arg", "size=3"], "--data-arg needs --data my.py:factory"),
        (["--data", "digits", "--data-arg", "size=3"], "digits takes no arguments (size=3)"),
        (["--data", "digits", "--val-data-arg", "a=1"], "--val-data-arg needs --val-data"),
        (["--data", "digits", "--test-data-arg", "a=1"], "--test-data-arg needs --test-data"),
        (
            ["--data", "digits", "--test-data", "digits", "--test-data-arg", "a=1"],
            "digits takes no arguments",
        ),
        (["--data", "digits", "--data-arg", "size"], "--data-arg size: key=value is expected"),
    ],
)
def test_wrong_arguments(net: Path, line: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(net), *line])
    assert result.exit_code in (1, 2)
    assert says in " ".join(result.output.split())
    assert len([row for row in result.output.splitlines() if row.startswith("error:")]) == 1


def test_what_the_data_hold_is_said_once_and_not_if_quiet(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "set")
    (tmp_path / "set" / "cow").mkdir()
    net, data = tmp_path / "net.pt", f"folder:{tmp_path / 'set'}"
    line = ["--arch", "lenet", "--input", "1x32x32", "--data", data, "--batch-size", 4]
    said = ran("train", *line, "--epochs", 1, "-o", net)
    contents = f"data: {data}: 2 classes; 16 training, 2 validation, 2 test images"
    warning = f"warning: {data}: the class folder cow has no images"
    assert said.count(contents) == 1
    assert said.count(warning) == 1
    assert contents in ran("evaluate", net)
    assert "2 classes; 5 training, 2 validation, 2 test images" in ran("evaluate", net, "--limit", 5)
    quiet = ran("evaluate", net, "--quiet")
    assert contents not in quiet
    assert warning in quiet


def test_pictures_are_enough_to_calibrate_and_to_rank(tmp_path: Path, net: Path) -> None:
    for index in range(6):
        write_image(tmp_path / "pictures" / str(index % 2) / f"{index}.jpg", seed=index)
    data = f"images:{tmp_path / 'pictures'}"
    rows = tmp_path / "rows.csv"
    ran("evaluate", net, "--data", data, "--predictions", rows)
    assert len(rows.read_text().splitlines()) == 7
    coded = tmp_path / "coded.pt"
    assert "calibrated on 6 training images" in ran(
        "transform", net, "--target", "features", "--taps", "features.1", "--data", data, "-o", coded
    )
    ranked = ran(
        "prune", net, "--method", "apoz", "--rate", 0.5, "--data", data, "-o", tmp_path / "pruned.pt"
    )
    assert "cut equals masked" in ranked
    before = sorted(tmp_path.iterdir())
    for verb, *line in (["evaluate"], ["compare"], ["train", "--epochs", "1"]):
        said = ran(verb, net, "--data", data, *line, exit_code=1)
        assert said.count("error:") == 1
        assert "no labels" in said.partition("error:")[2]
    assert sorted(tmp_path.iterdir()) == before


def test_targets_in_memory_tell_the_task() -> None:
    images = torch.rand(6, 1, 8, 8)
    for targets, task, classes in (
        (torch.rand(6, 2), "regression", ()),
        (torch.rand(6), "regression", ()),
        (torch.arange(6) % 3, "classification", ("0", "1", "2")),
        (torch.arange(6).view(6, 1, 1).expand(6, 8, 8) % 2, "segmentation", ("0", "1")),
        (torch.arange(12).view(6, 2), None, ()),
        (None, None, ()),
    ):
        part = images if targets is None else (images, targets)
        source = in_memory({"train": part}, (), None)
        assert (source.task, source.classes) == (task, classes)
        assert source.labelled is (targets is not None)
        if targets is not None:
            assert torch.equal(source.split("train").labels, targets)
            loaded = in_memory({"train": DataLoader(TensorDataset(images, targets), batch_size=4)}, (), None)
            assert (loaded.task, loaded.classes) == (task, ())
    mixed = {"train": (images, torch.rand(6)), "test": (images, torch.arange(6))}
    with pytest.raises(cctool.CctoolError, match="train for regression, test for classification"):
        in_memory(mixed, (), None)


def test_a_task_that_batches_its_targets_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class Padding(Untold):
        """Targets of different lengths."""

        def batched(self, targets: Sequence[Any]) -> Tensor:
            return pad_sequence(list(targets), batch_first=True)

    monkeypatch.setitem(TASKS, "padding", Padding("padding"))
    source = open_data("digits")
    found = {}
    for task in ("classification", "padding"):
        spec = ModelSpec(architecture="toy", input_shape=(1, 32, 32), task=task)
        found[task] = feed_of(Checkpoint(nn.Identity(), spec), source, DataOptions("digits"), context())
    assert found["classification"].make_targets is stacked
    feed = found["padding"]
    assert feed.make_targets([torch.ones(2), torch.ones(3)]).tolist() == [[1, 1, 0], [1, 1, 1]]
