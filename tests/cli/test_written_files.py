"""No command replaces a file that it reads, or writes two files of one name."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cctool
from cctool.base.errors import CheckpointError
from cctool.cli.main import app

DATA = ("--data", "digits", "--limit", "16", "--batch-size", "8")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--device", "cpu"])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    for name in ("a", "teacher"):
        result = run("train", "--arch", "lenet", *DATA, "--epochs", "0", "-o", str(folder / f"{name}.pt"))
        assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in built.glob("*.pt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())


def refused(message: str, status: int, *arguments: str) -> None:
    """Run a command that must fail in one sentence and change no file."""
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (status, ""), result.stderr
    assert message in result.stderr
    assert "--force replaces it" not in result.stderr
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


VERBS = {
    "train": ("train", "a.pt", *DATA, "--epochs", "1"),
    "train nothing": ("train", "a.pt", *DATA, "--epochs", "0"),
    "distill": ("distill", "a.pt", *DATA, "--teacher", "teacher.pt", "--epochs", "1"),
    "prune": ("prune", "a.pt", "--method", "l1"),
    "prune masks": ("prune", "a.pt", "--method", "l1", "--granularity", "element"),
    "quantize stored": ("quantize", "a.pt", "--method", "fp16"),
    "quantize calibrated": ("quantize", "a.pt", "--method", "int8", *DATA),
    "quantize trained": ("quantize", "a.pt", "--method", "qat", *DATA, "--epochs", "1"),
    "transform weights": ("transform", "a.pt", "--kernel", "dct"),
    "transform features": ("transform", "a.pt", "--target", "features", "--taps", "features.0", *DATA),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
def test_the_product_is_not_the_input(verb: str, force: tuple[str, ...]) -> None:
    refused("a.pt is the input itself; name another file", 1, *VERBS[verb], "-o", "a.pt", *force)


@pytest.mark.parametrize("kind", ["symlink", "hard link", "folder link", "absolute", "dots"])
def test_another_spelling_of_the_input_is_the_input(kind: str, tmp_path: Path) -> None:
    names = {"absolute": str(tmp_path / "a.pt"), "dots": "sub/../a.pt", "folder link": "here/a.pt"}
    name = names.get(kind, "link.pt")
    (tmp_path / "sub").mkdir()
    if kind == "symlink":
        (tmp_path / "link.pt").symlink_to("a.pt")
    if kind == "hard link":
        os.link("a.pt", "link.pt")
    if kind == "folder link":
        (tmp_path / "here").symlink_to(tmp_path, target_is_directory=True)
    refused("is the input itself", 1, *VERBS["prune"], "-o", name, "--force")


def test_input_is_not_replaced_through_a_link_either(tmp_path: Path) -> None:
    (tmp_path / "link.pt").symlink_to("a.pt")
    refused("a.pt is the input itself", 1, "prune", "link.pt", "--method", "l1", "-o", "a.pt", "--force")


def test_a_step_of_several_does_not_replace_the_input() -> None:
    Path("a.pt").rename("x.step2.pt")
    line = ("prune", "x.step2.pt", "--method", "l1", "--steps", "2", "-o", "x.pt", "--force")
    refused("x.step2.pt is the input itself", 1, *line)
    assert not Path("x.step1.pt").exists()


def test_a_teacher_or_an_earlier_checkpoint_is_not_replaced() -> None:
    product = ("-o", "teacher.pt", "--force")
    refused("teacher.pt is the file of --teacher", 1, *VERBS["distill"], *product)
    refused("teacher.pt is the file of --teacher", 1, *VERBS["quantize trained"], "--teacher", "teacher.pt",
            *product)  # fmt: skip
    refused(
        "teacher.pt is the file of --rewind", 1, *VERBS["prune masks"], "--rewind", "teacher.pt", *product
    )


def test_a_table_that_is_read_is_not_replaced_by_a_report() -> None:
    Path("steps.json").write_text(json.dumps({"*": 1.0}))
    line = (*VERBS["transform features"], "--q-table", "steps.json", "--report-file", "./steps.json")
    refused("steps.json is the file of --q-table", 1, *line, "--force", "-o", "b.pt")


def test_what_is_written_does_not_replace_the_input_of_a_verb_that_measures() -> None:
    refused("a.pt is the input itself", 1, "export", "a.pt", "-o", "./a.pt", "--force")
    Path("net.csv").write_bytes(Path("a.pt").read_bytes())
    refused("net.csv is the input itself", 1, "evaluate", "net.csv", *DATA, "--predictions", "net.csv",
            "--force")  # fmt: skip
    refused(
        "net.csv is the input itself", 1, "compare", "a.pt", "net.csv", *DATA, "--csv", "net.csv", "--force"
    )
    refused("net.csv is the input itself", 1, "analyze", "net.csv", "--macs-file", "net.csv", "--force")


@pytest.mark.parametrize(
    "line",
    [
        ("evaluate", "a.pt", *DATA, "--per-class", "--csv", "x.csv", "--predictions", "./x.csv"),
        ("evaluate", "a.pt", *DATA, "--predictions", "x.csv", "--report-file", "x.csv"),
        ("analyze", "a.pt", "--macs-file", "x.json", "--sparsity-file", "./x.json"),
        ("analyze", "a.pt", "--macs", "--sparsity-file", "a.macs.xlsx"),
        (*VERBS["transform features"], "--sweep", "quality", "--report-file", "b.sweep.csv", "-o", "b.pt"),
    ],
)
def test_two_files_of_one_name_are_refused(line: tuple[str, ...]) -> None:
    refused("two files would have one name", 2, *line)


def test_a_folder_is_no_product() -> None:
    Path("b.pt").mkdir()
    refused("b.pt is a folder; -o names a file", 1, *VERBS["train"], "-o", "b.pt", "--force")


def test_the_python_functions_keep_their_file_too() -> None:
    with pytest.raises(CheckpointError, match="is the input itself"):
        cctool.export(cctool.load("a.pt"), output="a.pt", force=True)
