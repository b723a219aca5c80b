"""Wrong input: one clear line, exit 1 or 2, and nothing under the final name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cctool.checkpoint.checkpoint import Checkpoint, save
from cctool.checkpoint.spec import ModelSpec
from cctool.cli.main import app
from cctool.models import registry
from cctool.operations.registries import tables

READING = {
    "train": ("--epochs", "1", "--data", "digits", "--limit", "8"),
    "evaluate": ("--data", "digits", "--limit", "8"),
    "distill": ("--teacher", "TEACHER", "--epochs", "1", "--data", "digits", "--limit", "8"),
    "prune": ("--method", "l1"),
    "quantize": (),
    "analyze": (),
    "export": ("--format", "state-dict"),
    "compare": (),
}
WRITING = ("train", "distill", "prune", "quantize", "export")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every wrong kind, and two good ones."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    spec = ModelSpec(architecture="lenet", arguments={}, input_shape=(1, 32, 32))
    for name in ("good.pt", "teacher.pt"):
        save(Checkpoint(registry.build("lenet", {}), spec), folder / name, tables())
    data = (folder / "good.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(data[: len(data) // 2])
    (folder / "flipped.pt").write_bytes(data[:9000] + bytes([data[9000] ^ 4]) + data[9001:])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "folder.pt").mkdir()
    torch.save(registry.build("lenet", {}).state_dict(), folder / "foreign.pt")
    torch.save({"weights": [1, 2]}, folder / "nothing.pt")
    torch.save(registry.build("lenet", {}), folder / "pickled.pt")
    broken = registry.build("lenet", {})
    with torch.no_grad():
        next(iter(broken.parameters()))[0, 0, 0, 0] = float("nan")
    save(Checkpoint(broken, spec), folder / "nan.pt", tables())
    return folder


@pytest.fixture
def folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for each test, with the same files."""
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(*arguments: str, status: int | None = None) -> str:
    """Run a command that must fail; give its one line."""
    before = set(Path().rglob("*"))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code in ((1, 2) if status is None else (status,)), result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "fault of cctool" not in errors[0]
    assert "Traceback" not in result.stderr
    left = {path for path in set(Path().rglob("*")) - before if path.is_file() and ".run" not in str(path)}
    assert not left
    return errors[0]


def line(verb: str, source: str) -> list[str]:
    return [verb, source, *("teacher.pt" if word == "TEACHER" else word for word in READING[verb])]


@pytest.mark.parametrize("verb", list(READING))
@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("missing.pt", "no such file"),
        ("truncated.pt", "truncated.pt"),
        ("flipped.pt", "damaged"),
        ("empty.pt", "empty"),
        ("text.pt", "text.pt"),
        ("folder.pt", "not a file"),
        ("foreign.pt", "--arch"),
        ("nothing.pt", "state dict"),
        ("pickled.pt", "--trust-pickle"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_file_that_is_no_checkpoint(verb: str, source: str, says: str) -> None:
    assert says in fails(*line(verb, source), status=1)


@pytest.mark.parametrize("verb", [verb for verb in READING if verb not in ("compare",)])
@pytest.mark.usefixtures("folder")
def test_another_architecture_than_the_file_holds(verb: str) -> None:
    assert "lenet" in fails(*line(verb, "good.pt"), "--arch", "resnet20")
    assert "did you mean resnet20" in fails(*line(verb, "foreign.pt"), "--arch", "resnt20", status=1)
    assert "bn1" in fails(*line(verb, "foreign.pt"), "--arch", "resnet20", status=1)


@pytest.mark.parametrize("verb", [verb for verb in WRITING if verb != "export"])
@pytest.mark.usefixtures("folder")
def test_nan_weights_are_refused_where_they_would_be_written(verb: str) -> None:
    assert "--allow-nonfinite" in fails(*line(verb, "nan.pt"), status=1)


@pytest.mark.parametrize("verb", WRITING)
@pytest.mark.usefixtures("folder")
def test_an_existing_output_is_kept(verb: str) -> None:
    target = Path("target.pt")
    target.write_bytes(b"precious")
    assert "--force" in fails(*line(verb, "good.pt"), "-o", str(target), status=1)
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize("verb", list(READING))
@pytest.mark.usefixtures("folder")
def test_a_device_that_is_not_there(verb: str) -> None:
    assert "cuda" in fails(*line(verb, "good.pt"), "--device", "cuda:99", status=1)
    assert "allowed" in fails(*line(verb, "good.pt"), "--device", "tpu", status=1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "good.pt", "--rate", "1.0"),
        ("prune", "good.pt", "--rate", "-0.1"),
        ("prune", "good.pt", "--rate", "nan"),
        ("prune", "good.pt", "--steps", "0"),
        ("prune", "good.pt", "--round-to", "0"),
        ("prune", "good.pt", "--method", "l1", "--exclude", "nothing"),
        ("prune", "good.pt", "--method", "l1", "--lr", "0.1"),
        ("prune", "good.pt", "--method", "l1", "--optimizer", "adam"),
        ("prune", "good.pt", "--method", "l1", "--keep", "0.5", "--rate", "0.5"),
        ("prune", "good.pt", "--method", "l1", "--test-data", "digits"),
        ("prune", "good.pt", "--method", "l1", "--mean", "nan", "--std", "1"),
        ("prune", "good.pt", "--method", "l1", "--finetune-epochs", "1"),
        ("train", "good.pt", "--data", "digits", "--epochs", "-1"),
        ("train", "good.pt", "--epochs", "1"),
        ("train", "--epochs", "1", "--data", "digits"),
        ("train", "--arch", "lenet", "--arg", "width", "--data", "digits"),
        ("train", "--arch", "lenet", "--input", "3x3", "--data", "digits"),
        ("analyze", "good.pt", "--spec", "--macs"),
        ("analyze", "good.pt", "--history", "--onnx-file", "x.onnx"),
        ("evaluate", "good.pt"),
        ("evaluate", "good.pt", "--data", "digits", "--mean", "0.5"),
        ("quantize", "good.pt", "-o", "x.txt"),
        ("quantize", "good.pt", "--method", "int8"),
        ("quantize", "good.pt", "--method", "lsq"),
        ("quantize", "good.pt", "--method", "codebook", "--layer", "fc=8"),
        ("quantize", "good.pt", "--method", "int4", "--layer", "fc=w8a8"),
        ("quantize", "good.pt", "--method", "int4", "--group-size", "8", "--equalize"),
        ("quantize", "good.pt", "--method", "int4", "--reduce-range"),
        ("quantize", "good.pt", "--method", "int4", "--epochs", "1"),
        ("quantize", "good.pt", "--method", "int8", "--data", "digits", "--epochs", "1"),
        ("quantize", "good.pt", "--method", "int4", "--weight-bits", "5"),
        ("quantize", "good.pt", "--method", "fp16", "--weight-bits", "8"),
        ("quantize", "good.pt", "--method", "int4", "--activation-bits", "4"),
        ("quantize", "good.pt", "--method", "codebook", "--per-channel"),
        ("quantize", "good.pt", "--method", "uint8", "--asymmetric"),
        ("quantize", "good.pt", "--method", "uint8", "--terms", "2"),
        ("quantize", "good.pt", "--method", "uint8", "--epochs", "2"),
        ("quantize", "good.pt", "--method", "int4", "--rounding-steps", "10"),
        ("quantize", "good.pt", "--method", "int4", "--observer", "mse"),
        ("quantize", "good.pt", "--method", "int4", "--rounding", "adaround", "--group-size", "8"),
        ("quantize", "good.pt", "--method", "int8", "--data", "digits", "--percentile", "99"),
        ("quantize", "good.pt", "--method", "int8", "--data", "digits", "--layer", "fc=99"),
        ("quantize", "good.pt", "--method", "int8", "--data", "digits", "--layer", "no.such=4"),
        ("quantize", "good.pt", "--method", "int8", "--data", "digits", "--target", "macs=0.5"),
        ("quantize", "good.pt", "--method", "int8", "--data", "digits", "--choices", "2,4"),
        ("quantize", "good.pt", "--method", "qat", "--data", "digits", "--epochs", "0", "--lr", "0.1"),
        ("export", "good.pt", "--format", "state-dict", "--int4"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("folder")
def test_wrong_options(arguments: tuple[str, ...]) -> None:
    fails(*arguments, status=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "good.pt", "--method", "l1", "--data", "no-such-data"),
        ("prune", "good.pt", "--method", "l1", "--data", "cifar10:nowhere"),
        ("train", "--arch", "no-such-net", "--data", "digits"),
        ("train", "--arch", "lenet", "--arg", "widht=2", "--data", "digits"),
        ("train", "good.pt", "--data", "digits", "-o", "no/such/folder/x.pt"),
        ("distill", "good.pt", "--teacher", "missing.pt", "--data", "digits"),
        ("export", "good.pt", "--format", "onnx", "-o", "no/such/folder/x.onnx"),
        ("models", "no-such-family"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("folder")
def test_what_is_not_there(arguments: tuple[str, ...]) -> None:
    fails(*arguments, status=1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "good.pt", "--method", "l3"),
        ("quantize", "good.pt", "--method", "int9"),
        ("prune",),
        ("nothing",),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_typer_refuses_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.usefixtures("folder")
def test_stdin_must_give_one_path() -> None:
    for text, says in (("", "no path"), ("a.pt\nb.pt\n", "2 paths")):
        result = CliRunner().invoke(app, ["prune", "-"], input=text)
        assert result.exit_code == 1
        assert says in result.stderr
        assert result.stdout == ""


@pytest.mark.usefixtures("folder")
def test_compare_takes_a_path_from_stdin() -> None:
    result = CliRunner().invoke(app, ["compare", "-", "teacher.pt"], input="good.pt\n")
    assert result.exit_code == 0, result.stderr
    # In the table of what was measured, and in that of sizes.
    assert [
        line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ") and ".pt" in line
    ] == [
        "good.pt",
        "teacher.pt",
    ] * 2


@pytest.mark.usefixtures("folder")
def test_a_step_that_exists_is_refused_before_the_first_is_written() -> None:
    Path("good.prune.step2.pt").write_bytes(b"precious")
    arguments = ("prune", "good.pt", "--method", "l1", "--steps", "2")
    assert "good.prune.step2.pt exists" in fails(*arguments, status=1)
    assert Path("good.prune.step2.pt").read_bytes() == b"precious"


@pytest.mark.usefixtures("folder")
def test_what_the_system_refuses_is_one_line_without_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device", "good.train.run/log.txt")

    monkeypatch.setattr("cctool.operations.train.run_folder.RunFolder.begin", full)
    said = fails("train", "good.pt", "--data", "digits", "--limit", "8", "--epochs", "1", status=1)
    assert said == "error: good.train.run/log.txt: No space left on device"


@pytest.mark.parametrize("verb", ["train", "evaluate", "distill", "prune", "analyze"])
@pytest.mark.usefixtures("folder")
def test_a_size_that_the_network_does_not_take(verb: str) -> None:
    assert "Kernel size" in fails(*line(verb, "good.pt"), "--input", "1x16x16", status=1)


@pytest.mark.usefixtures("folder")
def test_a_size_that_the_network_does_not_take_is_neither_exported_nor_measured() -> None:
    assert "--input CxHxW" in fails("export", "good.pt", "--input", "1x16x16", status=1)
    measured = ("quantize", "good.pt", "--input", "1x16x16", "--data", "digits", "--limit", "8")
    assert "--input CxHxW" in fails(*measured, status=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello world, no checkpoint at all", "this is neither"),
        (b"e\n.", "this is neither"),
        (b"{}", "this is neither"),
        (b"<!DOCTYPE html><html>404</html>", "this is neither"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'}", "this is neither"),
        (b"PK\x03\x04" + bytes(200), "the end of its archive is missing"),
        (b"\x80\x02junk", "it is damaged, or torch.save did not write it"),
    ],
)
def test_files_that_are_no_checkpoints_are_refused_in_our_words(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    error = fails("analyze", str(path), status=1)
    assert f"{path} is not a readable checkpoint: " in error
    assert error.endswith(message)


@pytest.mark.usefixtures("folder")
def test_a_word_that_an_option_does_not_know_is_refused_in_our_words() -> None:
    error = fails("quantize", "good.pt", "--method", "int9", status=2)
    assert error.startswith("error: --method int9: fp16, bf16, uint8, ")
    assert error.endswith("is allowed")
