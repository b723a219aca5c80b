"""`--resume` as it is typed: a run folder belongs to one product, one network, one data set."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from cctool.cli.main import app
from cctool.operations.train.resume import find_resumed

NET = """
from torch import nn

def make_net(num_classes=10, in_channels=1, width=2):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )
"""
ARCH = ("--arch", "net.py:make_net")
SMALL = (*ARCH, "--data", "digits", "--limit", "16", "--batch-size", "8", "--device", "cpu")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    yield
    torch.use_deterministic_algorithms(False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def made(*arguments: str) -> str:
    """Run a command that must work; its last product."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines()[-1]


def begun(output: str, *more: str) -> str:
    """A training of two epochs that was stopped after the first."""
    return made("train", *more, *SMALL, "--epochs", "2", "--stop-after", "1", "-o", output)


def refused(*arguments: str) -> str:
    """The error of a command that must fail and write nothing."""
    before = {path: path.read_bytes() for path in Path().rglob("*.pt")}
    result = run(*arguments)
    assert result.exit_code == 1, result.stderr
    assert {path: path.read_bytes() for path in Path().rglob("*.pt")} == before
    return result.stderr.splitlines()[-1]


def test_the_training_of_input_is_not_resumed_under_another_name() -> None:
    begun("a.pt")
    said = refused("train", "a.pt", *ARCH, "-o", "z.pt", "--resume", "--device", "cpu")
    assert "nothing to resume: z.run/last.pt does not exist" in said
    assert "-o a.pt" in said


@pytest.mark.parametrize("verb", ["train", "distill"])
@pytest.mark.parametrize("source", ["a.run/last.pt", "copy.pt", "a.run/epoch-0001.pt"])
def test_a_last_checkpoint_is_not_resumed_under_another_name(verb: str, source: str) -> None:
    taught: tuple[str, ...] = ()
    if verb == "distill":
        taught = ("--teacher", made("train", *SMALL, "--epochs", "0", "-o", "t.pt"))
    line = (*SMALL, *taught, "--epochs", "2", "--stop-after", "1", "--save-every", "1")
    made(verb, *line, "-o", "a.pt")
    shutil.copy("a.run/last.pt", "copy.pt")
    said = refused(verb, source, *ARCH, *taught, "-o", "z.pt", "--resume", "--device", "cpu")
    assert "nothing to resume: z.run/last.pt does not exist; leave --resume out to begin" in said
    assert said.endswith("or go on with the training of INPUT itself by -o a.pt") == ("last" in source)
    assert not Path("z.run").exists()


@pytest.mark.parametrize("source", ["a.run/last.pt", "copy.pt"])
def test_a_last_checkpoint_may_be_input_for_its_own_product(source: str) -> None:
    begun("a.pt")
    shutil.copy("a.run/last.pt", "copy.pt")
    made("train", source, *ARCH, "-o", "a.pt", "--resume", "--device", "cpu")
    whole = made("train", *SMALL, "--epochs", "2", "-o", "whole.pt")
    assert Path("a.pt").read_bytes() == Path(whole).read_bytes()


@pytest.mark.parametrize("source", ["t.run/last.pt", "t.pt", "a.run/epoch-0001.pt"])
def test_a_training_that_is_named_as_input_is_not_left_aside(source: str) -> None:
    begun("t.pt", "--seed", "1")
    made("train", *SMALL, "--epochs", "3", "--stop-after", "2", "--save-every", "1", "-o", "a.pt")
    said = refused("train", source, *ARCH, "-o", "a.pt", "--resume", "--device", "cpu")
    assert f"began with a fresh network, and {source} is another network" in said


def test_what_replaces_files_changes_nothing_where_a_training_goes_on() -> None:
    begun("a.pt")
    result = run("train", "a.pt", *ARCH, "-o", "a.pt", "--resume", "--force", "--device", "cpu")
    assert result.exit_code == 0
    assert "--force changes nothing: --resume goes on with what is there" in result.stderr


def test_a_distillation_does_not_resume_the_training_of_its_student() -> None:
    begun("t.pt")
    made("distill", *SMALL, "--teacher", "t.pt", "--epochs", "2", "--stop-after", "1", "-o", "a.pt")
    said = refused("distill", "a.pt", *ARCH, "--teacher", "t.pt", "-o", "z.pt", "--resume", "--device", "cpu")
    assert "nothing to resume: z.run/last.pt does not exist" in said


def test_a_run_folder_that_has_no_epoch_yet_is_still_the_one_that_is_meant() -> None:
    begun("a.pt")
    Path("a.train.run").mkdir()
    Path("a.train.run/log.txt").write_text("killed in the first epoch\n")
    said = refused("train", "a.pt", *ARCH, "--resume", "--device", "cpu")
    assert "nothing to resume: a.train.run/last.pt does not exist" in said


@pytest.mark.parametrize("spelling", ["./a.pt", "link.pt", "sub/../a.pt"])
def test_a_product_is_resumed_by_any_spelling_of_its_name(spelling: str, tmp_path: Path) -> None:
    begun("a.pt")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.pt").symlink_to("a.pt")
    made("train", spelling, *ARCH, "-o", "a.pt", "--resume", "--device", "cpu")
    whole = made("train", *SMALL, "--epochs", "2", "-o", "whole.pt")
    assert Path("a.pt").read_bytes() == Path(whole).read_bytes()


def test_a_copied_run_folder_does_not_go_on_for_another_network() -> None:
    begun("a.pt")
    made("train", *SMALL, "--epochs", "0", "--seed", "1", "-o", "other.pt")
    shutil.copytree("a.run", "z.run")
    said = refused("train", "other.pt", *ARCH, "-o", "z.pt", "--resume", "--device", "cpu")
    assert "began with a fresh network" in said
    assert "other.pt is another network" in said


def test_a_run_folder_moves_with_its_product() -> None:
    begun("a.pt")
    Path("a.run").rename("b.run")
    Path("a.pt").rename("b.pt")
    Path("b.safetensors").touch()
    said = refused("train", "b.pt", *ARCH, "-o", "b.safetensors", "--resume", "--device", "cpu")
    assert "b.run holds the training of b.pt, not of b.safetensors" in said
    made("train", "b.pt", *ARCH, "--resume", "--device", "cpu")
    whole = made("train", *SMALL, "--epochs", "2", "-o", "whole.pt")
    assert Path("b.pt").read_bytes() == Path(whole).read_bytes()


def test_the_input_of_a_resumed_training_must_be_the_one_it_began_with() -> None:
    for seed in ("0", "1"):
        made("train", *SMALL, "--epochs", "0", "--seed", seed, "-o", f"net{seed}.pt")
    begun("a.pt", "net0.pt")
    said = refused("train", "net1.pt", *ARCH, "-o", "a.pt", "--resume", "--device", "cpu")
    assert "began with net0.pt, and net1.pt is another network" in said
    # Its name does not matter, only what it holds.
    Path("net0.pt").rename("moved.pt")
    assert made("train", "moved.pt", *ARCH, "-o", "a.pt", "--resume", "--device", "cpu") == "a.pt"


def test_a_fresh_network_of_other_arguments_is_refused() -> None:
    begun("a.pt")
    said = refused("train", *SMALL, "--arg", "width=3", "--epochs", "2", "-o", "a.pt", "--resume")
    assert "--arch net.py:make_net is another network" in said
    begun("b.pt", "a.pt")
    said = refused("train", *SMALL, "--epochs", "2", "-o", "b.pt", "--resume")
    assert "began with a.pt" in said


def test_other_data_under_the_same_name_are_refused() -> None:
    for split in ("train", "val"):
        for number in range(8):
            folder = Path(f"images/{split}/{number % 2}")
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 30 * number).save(folder / f"{number}.png")
    line = ("train", *ARCH, "--data", "folder:images", "--batch-size", "4", "--device", "cpu", "-o", "a.pt")
    made(*line, "--epochs", "2", "--stop-after", "1")
    Image.new("L", (8, 8), 9).save("images/train/0/more0.png")
    Image.new("L", (8, 8), 9).save("images/train/0/more1.png")
    said = refused(*line, "--epochs", "2", "--resume")
    assert "the train split of folder:images had 8 images and has 10 now" in said


def test_the_same_command_goes_on_although_it_may_replace_files() -> None:
    line = ("train", *SMALL, "--epochs", "2", "-o", "a.pt", "--force")
    made(*line, "--stop-after", "1")
    assert "going on after epoch 1 of 2" in run(*line, "--resume").stderr


@pytest.mark.parametrize("name", ["last.pt", "epoch-0001.pt"])
def test_a_new_training_does_not_empty_the_folder_that_it_reads_from(name: str) -> None:
    made("train", *SMALL, "--epochs", "2", "--stop-after", "1", "--save-every", "1", "-o", "a.pt")
    said = refused("train", f"a.run/{name}", *SMALL, "--epochs", "1", "-o", "a.pt", "--force")
    assert f"a.run/{name} is in the run folder of a" in said
    assert Path("a.run/metrics.csv").exists()


def test_a_last_checkpoint_finds_a_product_of_either_suffix(tmp_path: Path) -> None:
    (tmp_path / "x.run").mkdir()
    (tmp_path / "x.run/last.pt").touch()
    assert find_resumed("x.run/last.pt", None, "train") == ("x.run/last.pt", "x.pt")
    (tmp_path / "x.safetensors").touch()
    assert find_resumed("x.run/last.pt", None, "train") == ("x.run/last.pt", "x.safetensors")


@pytest.mark.parametrize("verb", ["train", "distill"])
@pytest.mark.parametrize(("first", "second"), [("g.pt", "g.safetensors"), ("g.safetensors", "g.pt")])
def test_products_of_one_stem_do_not_resume_each_others_training(verb: str, first: str, second: str) -> None:
    one = made("train", *SMALL, "--epochs", "0", "--seed", "1", "-o", "one.pt")
    two = made("train", *SMALL, "--epochs", "0", "--seed", "2", "-o", "two.pt")
    line = (*SMALL, *(("--teacher", one) if verb == "distill" else ()), "--epochs", "2", "--stop-after", "1")
    made(verb, one, *line, "-o", first)
    said = refused(verb, two, *line, "-o", second)
    assert f"g.run holds the training of {first}, which --force would delete; another -o keeps it" in said
    forced = run(verb, two, *line, "-o", second, "--force")
    assert forced.exit_code == 0
    assert f"the training of {first} in g.run is deleted and cannot be resumed" in forced.stderr
    kept = {path: path.read_bytes() for path in (Path(first), Path(second))}
    more = (*ARCH, *(("--teacher", one) if verb == "distill" else ()), "--device", "cpu", "--resume")
    for name in ((first,), (one, "-o", first), (two, "-o", first)):
        assert f"g.run holds the training of {second}" in refused(verb, *name, *more)
    assert {path: path.read_bytes() for path in kept} == kept
    assert made(verb, "g.run/last.pt", *more) == second
    assert Path(first).read_bytes() == kept[Path(first)]


def test_a_run_folder_that_does_not_name_its_product_goes_on() -> None:
    begun("a.pt")
    Path("a.run/product.txt").unlink()
    made("train", "a.pt", *ARCH, "--resume", "--device", "cpu")
    assert Path("a.run/product.txt").read_text() == "a.pt\n"
