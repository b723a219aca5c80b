"""What a command line names and would not use is refused, or said in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner, Result

import cctool
from cctool.checkpoint.checkpoint import Checkpoint, load, open_file, save
from cctool.cli.main import app
from cctool.operations.registries import tables

NET = """
from collections import OrderedDict
from torch import nn

def make_net(num_classes=10, in_channels=1, width=4, sizes=None):
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(in_channels, width, 3, stride=2, padding=1), norm=nn.BatchNorm2d(width),
        act1=nn.ReLU(), conv2=nn.Conv2d(width, 8, 3, stride=2, padding=1), act2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(2), flat=nn.Flatten(), fc=nn.Linear(32, num_classes),
    ))

def data(size=8, kind="x"):
    raise AssertionError("must not run")
"""
NAMED = ("--arch", "net.py:make_net")
DATA = ("--data", "digits", "--limit", "32", "--batch-size", "16")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    (folder / "net.py").write_text(NET)
    arch = ("--arch", f"{folder}/net.py:make_net")
    result = CliRunner().invoke(
        app, ["train", *arch, *DATA, "--epochs", "0", "-o", str(folder / "a.pt"), "--device", "cpu"]
    )
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "a.pt").write_bytes((built / "a.pt").read_bytes())


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--device", "cpu"])


def said(*arguments: str) -> str:
    """What a command that works prints on stderr."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stderr


def refused(*arguments: str, status: int = 2) -> str:
    """The error of a command that writes nothing."""
    before = set(Path().iterdir())
    result = run(*arguments)
    assert result.exit_code == status, result.stderr
    assert set(Path().iterdir()) == before
    return result.stderr.splitlines()[-1]


def opened(path: str) -> Checkpoint:
    payload = open_file(Path(path)).payload
    assert payload is not None
    return load(Path(path), tables((payload.spec.architecture,)))


def saved(checkpoint: Checkpoint, path: str) -> None:
    save(checkpoint, Path(path), tables((checkpoint.spec.architecture,)))


# -- tables ------------------------------------------------------------------------------------------------

CODED = ("transform", "a.pt", *NAMED, "--target", "features", "--taps", "act1", "--taps", "act2", *DATA)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.json", '{"act9": [2.0]}', "act9 matches no tap; the taps are act1, act2"),
        ("t.csv", "act9,2.0\n", "act9 matches no tap; the taps are act1, act2"),
        ("t.csv", "act1,3.0\nlayer*,2.0\n", "layer* matches no tap; the taps are act1, act2"),
        ("t.json", '{"*": [2.0], "act2": [3.0]}', "act2 never counts, because a pattern before it matches"),
        ("t.csv", "2.0\nact2,3.0\n", "act2 never counts, because a pattern before it matches"),
        ("t.json", '{"act2": [2.0], "act2": [3.0]}', "the key 'act2' is there twice"),
        ("t.csv", "act2,2.0\nact2,3.0\n", "act2 begins two lines"),
        ("t.csv", "act1,,2.0\n", "line 1 (act1,,2.0): cell 2 is empty"),
        ("t.csv", "tap,steps\n,2.0\n", "line 2 (,2.0): cell 1 is empty"),
        ("t.json", '{"act1": [null]}', "null is no number"),
        ("t.json", '{"act1": [true]}', "true is no number"),
        ("t.json", '{"act1": ["2"]}', '"2" is no number'),
    ],
)
def test_a_table_of_steps_is_used_as_a_whole(name: str, text: str, message: str) -> None:
    Path(name).write_text(text)
    assert message in refused(*CODED, "--q-table", name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--levels", "2"), "--levels 2: dct has none; wavelets do"),
        (("--kernel", "dwt", "--block", "4"), "--block 4: dwt has no blocks"),
        (("--kernel", "db2", "--block", "8"), "--block 8: db2 has no blocks"),
        (("--kernel", "klt", "--levels", "3"), "--levels 3: klt has none"),
        (("--kernel", "identity", "--channel-klt", "--levels", "2"), "--levels 2: identity has none"),
        (("--kernel", "identity", "--channel-klt", "--block", "4"), "--block 4: identity has no blocks"),
        (("--preset", "feature-compression-dwt", "--block", "8"), "--block 8: dwt has no blocks"),
        (("--kernel", "identity", "--sweep", "quality"), "--kernel identity has none"),
        (("--zero-bar",), "--zero-bar is for --histograms"),
    ],
)
def test_options_that_a_kernel_of_maps_has_no_use_for_are_refused(
    line: tuple[str, ...], message: str
) -> None:
    assert message in refused(*CODED, *line, "-o", "b.pt")


@pytest.mark.parametrize(
    "line",
    [
        ("--kernel", "dwt", "--levels", "2"),
        ("--kernel", "klt", "--block", "4"),
        ("--preset", "feature-compression-dwt"),
    ],
)
def test_options_that_a_kernel_of_maps_uses_are_taken(line: tuple[str, ...]) -> None:
    said(*CODED, *line, "-o", "b.pt")


@pytest.mark.parametrize(
    "line",
    [
        ("transform", "--target", "features", "--taps", "act1"),
        ("quantize", "--method", "int8"),
        ("quantize", "--method", "qat", "--epochs", "1"),
    ],
)
def test_more_images_than_there_are_is_said(line: tuple[str, ...]) -> None:
    line = (line[0], "a.pt", *NAMED, *line[1:], *DATA, "-o", "b.pt", "--force")
    assert "--calibration 9,999: 32 are there" in said(*line, "--calibration", "9999").splitlines()
    assert "are there" not in said(*line)
    assert "are there" not in said(*line, "--calibration", "32")


NUMBERED = ("transform", "n.pt", "--target", "features", "--taps", "0", "--taps", "2", *DATA)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose modules have numbers for names."""
    folder = tmp_path_factory.mktemp("numbered")
    (folder / "seq.py").write_text(
        "from torch import nn\n\ndef make(num_classes=10, in_channels=1):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),\n"
        "                         nn.Flatten(), nn.LazyLinear(num_classes))\n".replace(
            "nn.Flatten(), nn.LazyLinear(num_classes)",
            "nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes)",
        )
    )
    line = ("train", "--arch", f"{folder}/seq.py:make", *DATA, "--epochs", "0", "-o", f"{folder}/n.pt")
    assert CliRunner().invoke(app, [*line, "--device", "cpu"]).exit_code == 0
    return folder


def tables_of_steps(text: str, numbered: Path, *more: str) -> list[list[float]]:
    """The steps that a CSV file gives to the taps 0 and 2."""
    Path("t.csv").write_text(text)
    for name in ("n.pt", "seq.py"):
        Path(name).write_bytes((numbered / name).read_bytes())
    line = (*NUMBERED, "--arch", "seq.py:make", "--q-table", "t.csv", "-o", "b.pt", "--force")
    said(*line, *more)
    taps = [edit for edit in opened("b.pt").spec.model_dump()["edits"] if edit["kind"] == "tap"]
    return [list(edit["codec"]["table"]) for edit in taps]


def test_a_number_names_a_tap(numbered: Path) -> None:
    assert tables_of_steps("0,3.0\n2,4.0\n", numbered) == [[3.0], [4.0]]
    assert tables_of_steps("tap,steps\n0,3.0\n2,4.0\n", numbered) == [[3.0], [4.0]]
    # A step is positive, so no table begins with 0; and no tap is named 0.5, or has two tables.
    assert tables_of_steps("0,3.0\n2,4.0\n", numbered, "--block", "2") == [[3.0], [4.0]]
    assert tables_of_steps("0.5,3.0\n2,4.0\n", numbered, "--block", "2") == [[0.5, 3.0, 2.0, 4.0]] * 2
    assert tables_of_steps("2,3.0\n2,4.0\n", numbered, "--block", "2") == [[2.0, 3.0, 2.0, 4.0]] * 2
    wavelet = ("--kernel", "dwt", "--levels", "1", "--no-mean-shift")
    assert tables_of_steps("tap,steps\n2,3.0\n*,5.0,6.0", numbered, *wavelet) == [[5.0, 6.0], [3.0]]
    Path("t.csv").write_text("2,3.0\n")
    message = refused(*NUMBERED, "--arch", "seq.py:make", "--q-table", "t.csv", *wavelet)
    assert "2 is a tap, and may be a step, too: a first line tap,steps says" in message


def test_an_argument_that_a_file_was_built_without_is_named() -> None:
    message = refused("evaluate", "a.pt", *NAMED, *DATA, "--arg", "kind=3")
    assert "a.pt was built without kind, --arg says 3: leave it out" in message


def test_a_table_from_a_spreadsheet_is_read() -> None:
    Path("t.csv").write_text("tap,steps,\nact1,3.0,\n,,\n*,2.0\n", encoding="utf-8-sig")
    said(*CODED, "--q-table", "t.csv", "-o", "b.pt")


DEFAULTS = ['{"act2": [2.0], "*": [3.0]}', '{"act1": [2.0], "act2": [1.0], "*": [3.0]}', "[2.0]"]


@pytest.mark.parametrize("text", DEFAULTS)
def test_a_default_after_patterns_may_be_left_over(text: str) -> None:
    Path("t.json").write_text(text)
    said(*CODED, "--q-table", "t.json", "-o", "b.pt")


def test_a_table_of_rates_has_each_name_once() -> None:
    Path("r.json").write_text('{"conv1": 0.25, "conv1": 0.5}')
    message = refused("prune", "a.pt", *NAMED, "--method", "l1", "--rates", "r.json")
    assert "--rates r.json: the key 'conv1' is there twice" in message


def test_a_spec_has_each_key_once() -> None:
    torch.save(opened("a.pt").model.state_dict(), "bare.pth")
    spec = json.loads(run("analyze", "a.pt", *NAMED, "--spec").stdout)
    text = json.dumps(spec).replace('"input_shape"', '"input_shape": [1, 8, 8], "input_shape"')
    Path("s.json").write_text(text)
    message = refused("evaluate", "bare.pth", "--spec", "s.json", *DATA, status=1)
    assert "--spec s.json: the key 'input_shape' is there twice" in message


# -- key=value ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--arg", "width=16", "--arg", "width=8"), "--arg width: given twice"),
        (("--arg", "width=8", "--arg", "width=8"), "--arg width: given twice"),
        (("--arg", "=8"), "--arg =8: key=value is expected"),
        (("--arg", 'sizes={"a": 1, "a": 2}'), "the key 'a' is there twice"),
    ],
)
def test_an_argument_is_given_once(line: tuple[str, ...], message: str) -> None:
    assert message in refused("train", *NAMED, *DATA, *line, "--epochs", "0", "-o", "b.pt")


@pytest.mark.parametrize(
    ("flag", "of"),
    [("--data-arg", "--data"), ("--val-data-arg", "--val-data"), ("--test-data-arg", "--test-data")],
)
def test_an_argument_of_data_is_given_once(flag: str, of: str) -> None:
    twice = (flag, "size=8", flag, "size=16")
    assert f"{flag} size: given twice" in refused("train", *NAMED, of, "net.py:data", *twice)


def test_arguments_in_a_reference_are_given_once() -> None:
    message = refused("evaluate", "a.pt", *NAMED, "--data", 'net.py:data {"size": 1, "size": 2}')
    assert "the key 'size' is there twice" in message


def test_an_argument_of_the_teacher_is_given_once() -> None:
    line = ("distill", "a.pt", *NAMED, *DATA, "--teacher", "t.pth", "--teacher-arch", "lenet")
    assert "given twice" in refused(*line, "--teacher-arg", "act=relu", "--teacher-arg", "act=tanh")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--teacher-mean", ".5"), "error: --teacher-mean and --teacher-std go together"),
        (
            ("--teacher-mean", ".5,.5", "--teacher-std", "1"),
            "error: --teacher-mean has 2 values and --teacher-std 1: one per channel each",
        ),
        (
            ("--teacher-mean", ".5", "--teacher-std", "0"),
            "error: --teacher-std (0.0,): positive values are needed",
        ),
        (("--teacher-mean", "x", "--teacher-std", "1"), "error: --teacher-mean x: comma-separated numbers"),
        (("--teacher-input", "8x8"), "error: --teacher-input 8x8: CxHxW is expected"),
        (("--teacher-arg", "width"), "error: --teacher-arg width: key=value is expected"),
        (("--teacher-arg", "a=1", "--teacher-arg", "a=2"), "error: --teacher-arg a: given twice"),
        (("--teacher-arg", "width=9"), "--teacher-arg says 9: leave it out"),
        (("--teacher-arch", "lenet"), "--teacher-arch says lenet: leave --teacher-arch out"),
        (
            ("--teacher-mean", ".9", "--teacher-std", ".1"),
            "leave --teacher-mean and --teacher-std out, which say otherwise",
        ),
    ],
)
@pytest.mark.parametrize("verb", [("distill", "--epochs"), ("prune", "--finetune-epochs")])
def test_errors_about_a_teacher_name_the_teachers_options(
    verb: tuple[str, str], line: tuple[str, ...], message: str
) -> None:
    asked = (verb[0], "a.pt", *NAMED, *DATA, verb[1], "1", "--teacher", "a.pt", *line, "-o", "b.pt")
    assert message in refused(*asked)


def test_notes_about_a_teacher_name_the_teachers_options() -> None:
    torch.save(opened("a.pt").model.state_dict(), "t.pth")
    teacher = ("--teacher", "t.pth", "--teacher-arch", "net.py:make_net")
    text = said("distill", "a.pt", *NAMED, *DATA, "--epochs", "1", *teacher, "-o", "b.pt")
    assert "its preprocessing is unknown (--teacher-mean, --teacher-std)" in text


@pytest.mark.parametrize(
    "line",
    [
        ("evaluate",),
        ("quantize", "--method", "int8"),
        ("prune", "--method", "l1"),
        ("train", "--epochs", "1"),
        ("export", "-o", "b.onnx"),
    ],
)
def test_statistics_that_contradict_a_file_are_refused(line: tuple[str, ...]) -> None:
    known = opened("a.pt").spec.preprocessing
    assert known is not None
    asked = (line[0], "a.pt", *NAMED, *DATA, *line[1:])
    message = refused(*asked, "--mean", ".9", "--std", ".1")
    assert "a.pt says that inputs are normalised with mean 0.3053 and std 0.3236" in message
    assert "leave --mean and --std out" in message
    said(*asked, "--mean", str(known.mean[0]), "--std", str(known.std[0]))


# -- weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def broken() -> str:
    checkpoint = opened("a.pt")
    with torch.no_grad():
        checkpoint.model.get_parameter("conv2.weight").view(-1)[3] = float("nan")
        checkpoint.model.get_parameter("fc.weight").view(-1)[5] = float("inf")
    saved(checkpoint, "n.pt")
    return "n.pt"


def nonfinite(path: str) -> dict[str, int]:
    state = opened(path).model.state_dict()
    found = {name: int((~value.isfinite()).sum()) for name, value in state.items()}
    return {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("more", [(), ("--keep", "0.5"), ("--threshold", "0.01")])
def test_a_transform_leaves_weights_that_are_not_finite(broken: str, more: tuple[str, ...]) -> None:
    line = ("transform", broken, *NAMED, "--kernel", "dct", *more, "--allow-nonfinite", "-o", "b.pt")
    assert "its weight holds NaN or infinite values" in said(*line)
    assert nonfinite("b.pt") == {"conv2.weight": 1, "fc.weight": 1}


@pytest.mark.parametrize(
    "line", [("--method", "int4"), ("--method", "int8", *DATA), ("--method", "qat", *DATA)]
)
def test_a_quantization_refuses_weights_that_are_not_finite(broken: str, line: tuple[str, ...]) -> None:
    message = refused("quantize", broken, *NAMED, *line, "--allow-nonfinite", "-o", "b.pt", status=1)
    assert "conv2.weight: 1 NaN or infinite values cannot be quantized; --exclude leaves it" in message


# -- choices without information ---------------------------------------------------------------------------


def test_slimming_by_equal_scales_is_said() -> None:
    text = "which channels go is arbitrary in conv1: all have the same score"
    assert text in said("prune", "a.pt", *NAMED, "--method", "slimming", "--rate", "0.5", "-o", "b.pt")
    assert "arbitrary" not in said("prune", "a.pt", *NAMED, "--method", "l1", "--rate", "0.5", "-o", "c.pt")
    checkpoint = opened("a.pt")
    norm = checkpoint.model.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    saved(checkpoint, "d.pt")
    assert "arbitrary" not in said("prune", "d.pt", *NAMED, "--method", "slimming", "-o", "e.pt")


def test_a_pattern_that_names_no_channels_is_said() -> None:
    line = ("prune", "a.pt", *NAMED, "--method", "l1", "-o", "b.pt")
    assert "--exclude fc changes nothing" in said(*line, "--exclude", "fc")
    assert "changes nothing" not in said(*line, "--exclude", "conv1", "--force")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--layer", "conv*=4", "--layer", "conv2=8"), "--layer conv2 never counts, because one before it"),
        (("--layer", "fc=4", "--layer", "fc=2"), "--layer fc never counts, because one before it"),
        (("--layer", "fc=4", "--exclude", "fc"), "--layer fc never counts: --exclude leaves its layers out"),
        (("--layer", "fc=4", "--include", "conv*"), "--layer fc never counts: --include leaves its layers"),
    ],
)
def test_bits_of_a_layer_that_never_count_are_refused(line: tuple[str, ...], message: str) -> None:
    assert message in refused("quantize", "a.pt", *NAMED, "--method", "int4", *line, "-o", "b.pt")


def test_patterns_of_tensors_that_change_nothing_are_said() -> None:
    line = ("quantize", "a.pt", *NAMED, "--method", "uint8", "-o", "b.pt", "--force")
    text = "norm.weight changes nothing: the same tensors are quantized without it"
    assert f"--exclude {text}" in said(*line, "--exclude", "norm.weight")
    assert "changes nothing" not in said(*line, "--exclude", "fc.weight")
    assert "--include conv1.weight changes" in said(*line, "--include", "conv*", "--include", "conv1.weight")
    assert "changes nothing" not in said(*line, "--include", "conv*", "--include", "fc.weight")


def test_patterns_of_masks_that_change_nothing_are_said() -> None:
    line = ("prune", "a.pt", *NAMED, "--method", "l1", "--granularity", "element", "-o", "b.pt", "--force")
    assert "--exclude norm changes nothing" in said(*line, "--exclude", "norm")
    assert "changes nothing" not in said(*line, "--exclude", "conv1")


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        ("train", ("--milestones", "1", "--milestones", "2")),
        ("train", ("--mean", "0.5", "--mean", "0.4")),
        ("train", ("--lr", "0.5", "--lr", "0.5")),
        ("train", ("-o", "b.pt", "--output", "b.pt")),
        ("quantize", ("--choices", "2,4", "--choices", "8")),
        ("prune", ("--target", "macs=0.5", "--target", "params=0.5")),
        ("prune", ("--rate", "0.2", "--rate", "0.4")),
        ("prune", ("--method=l1", "--method", "l2")),
        ("transform", ("--quality", "20", "--quality", "80")),
        ("evaluate", ("--split", "test", "--split=val")),
        ("export", ("--format", "onnx", "--format", "pt2")),
        ("analyze", ("--json", "--json")),
        ("decode", ("-o", "b", "-o", "c")),
        ("compare", ("--latency", "--latency")),
    ],
)
def test_an_option_of_one_value_is_given_once(verb: str, option: tuple[str, ...]) -> None:
    named = () if verb in ("compare", "decode") else NAMED
    said = refused(verb, "a.pt", *named, *option)
    flag = {"-o": "--output"}.get(option[0], option[0].partition("=")[0])
    assert said == f"error: {flag}: given 2 times; once is allowed"


def test_every_option_that_is_given_too_often_is_named() -> None:
    said = refused("train", *NAMED, "--lr", "1", "--augment", "--lr", "2", "--no-augment", "--lr", "3")
    assert "--lr: given 3 times; once is allowed" in said
    assert "--augment/--no-augment: given 2 times; once is allowed" in said


def test_lists_of_what_there_is_take_each_option_once() -> None:
    result = CliRunner().invoke(app, ["models", "--json", "--json"])
    assert (result.exit_code, result.stderr) == (2, "error: --json: given 2 times; once is allowed\n")


def test_help_may_be_asked_for_twice() -> None:
    assert CliRunner().invoke(app, ["prune", "--rate", "1", "--rate", "2", "--help", "--help"]).exit_code == 0


ATTENTION = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.num_heads = 4
        self.out, self.fc = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        b, n, c = x.shape
        q, k, v = (f(x).view(b, n, self.num_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.fc(self.out(x.transpose(1, 2).reshape(b, n, -1)).mean(1))

def make():
    return Net()
"""


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (("--exact",), "--exact changes nothing: no statistic runs over channels that could go"),
        (("--attention", "heads"), "--attention heads changes nothing: no attention has heads that could go"),
    ],
)
def test_units_that_a_network_does_not_have_are_said(option: tuple[str, ...], text: str) -> None:
    line = ("--method", "l1", *option, "-o", "b.pt", "--force")
    assert text in said("prune", "a.pt", *NAMED, *line)
    Path("heads.py").write_text(ATTENTION)
    made = ("--arch", "heads.py:make")
    said("train", *made, "--input", "1x8x8", "--epochs", "0", "-o", "h.pt")
    assert "changes nothing" not in said("prune", "h.pt", *made, *line)


def test_widths_that_rounding_keeps_are_said() -> None:
    line = ("prune", "a.pt", *NAMED, "--method", "l1", "-o", "b.pt", "--force")
    text = said(*line, "--round-to", "64")
    assert "nothing to remove: --round-to or --min-channels keeps every width" in text
    assert "nothing to remove: the rate is below one unit" in said(*line, "--rate", "0.01")


def test_a_group_that_no_channel_fills_is_said() -> None:
    line = ("quantize", "a.pt", *NAMED, "--method", "int4", "-o", "b.pt", "--force", "--group-size")
    text = "divides nothing: no channel has more than 36 weights, so that each has one scale"
    assert f"--group-size 100,000 {text}" in said(*line, "100000")
    assert f"--group-size 36 {text}" in said(*line, "36")
    assert "divides nothing" not in said(*line, "32")


# -- training ----------------------------------------------------------------------------------------------


def test_a_network_of_more_classes_than_the_data_is_said() -> None:
    wide = ("train", *NAMED, "--arg", "num_classes=1000", *DATA, "--epochs", "1")
    text = (
        "the network tells 1,000 classes apart, digits has 10: the other 990 outputs only learn never to be"
    )
    assert text in said(*wide, "-o", "b.pt")
    assert text in said(
        "prune", "b.pt", *NAMED, *DATA, "--finetune-epochs", "1", "-o", "c.pt", "--method", "l1"
    )
    assert text in said("quantize", "b.pt", *NAMED, *DATA, "--method", "qat", "--epochs", "1", "-o", "d.pt")
    assert "tells" not in said("train", *NAMED, *DATA, "--epochs", "1", "-o", "e.pt")


def test_a_batch_larger_than_the_set_is_said() -> None:
    line = ("train", *NAMED, "--data", "digits", "--limit", "32", "--epochs", "1")
    text = "is more than the 32 training images: an epoch is one step"
    assert f"--batch-size 64 {text}" in said(*line, "--batch-size", "64", "-o", "b.pt")
    assert f"--batch-size 128 {text}" in said(*line, "-o", "c.pt")
    assert "one step" not in said(*line, "--batch-size", "32", "-o", "d.pt")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (("--lr-schedule", "multistep", "--milestones", "1,2"), "--milestones 2 changes nothing"),
        (("--eval-from", "3"), "--eval-from 3 is after the last epoch"),
        (("--keep-storage",), "--keep-storage changes nothing: INPUT has no encoded tensors"),
        (
            ("--lr-schedule", "multistep", "--milestones", "1", "--lr-gamma", "1"),
            "--lr-gamma 1 changes nothing",
        ),
        (("--save-every", "9"), "--save-every 9 changes nothing: the training ends at epoch 2"),
        (("--stop-after", "9"), "--stop-after 9 changes nothing: the training ends at epoch 2"),
        (("--stop-after", "2"), "--stop-after 2 changes nothing: the training ends at epoch 2"),
    ],
)
@pytest.mark.parametrize("verb", [("train",), ("distill", "--teacher", "a.pt")])
def test_an_option_of_a_training_that_changes_nothing_is_said(
    verb: tuple[str, ...], line: tuple[str, ...], text: str
) -> None:
    asked = (verb[0], "a.pt", *verb[1:], *NAMED, *DATA, "--epochs", "2")
    assert text in said(*asked, *line, "-o", "b.pt")


def test_options_of_a_training_that_goes_on_count_its_epochs() -> None:
    line = ("train", "a.pt", *NAMED, *DATA, "--epochs", "3")
    text = said(*line, "--stop-after", "2", "--save-every", "2", "-o", "b.pt")
    assert "changes nothing" not in text
    text = said(*line, "--resume", "--stop-after", "1", "--save-every", "2", "-o", "b.pt")
    assert "--stop-after 1 changes nothing: the training ends at epoch 3" in text
    assert "--save-every 2 changes nothing: the training ends at epoch 3" in text


@pytest.mark.parametrize("schedule", ["cosine", "poly"])
def test_a_rate_does_not_rise_to_the_smallest(schedule: str) -> None:
    line = ("train", "a.pt", *NAMED, *DATA, "--epochs", "1", "--lr-schedule", schedule, "-o", "b.pt")
    message = refused(*line, "--min-lr", "5")
    assert "--min-lr 5 is above the learning rate, 0.003, which falls to it" in message
    assert "above the learning rate, 0.1, " in refused(*line, "--min-lr", "0.2", "--lr", "0.1")
    said(*line, "--min-lr", "0.1", "--lr", "0.1")


def test_what_decays_is_not_chosen_where_nothing_does() -> None:
    line = ("train", *NAMED, *DATA, "--epochs", "1", "--weight-decay", "0", "--decay", "weights")
    assert "--decay: --weight-decay 0 decays nothing" in refused(*line, "-o", "b.pt")


def test_frozen_norms_of_a_network_without_any_are_said() -> None:
    line = ("train", "--arch", "lenet", *DATA, "--epochs", "1", "--freeze-norm", "-o", "b.pt")
    assert "--freeze-norm changes nothing: the network has no batch norm" in said(*line)


@pytest.mark.parametrize(
    "option",
    [
        ("--lr", "0.1"),
        ("--optimizer", "sgd"),
        ("--ema", "0.9"),
        ("--stop-after", "1"),
        ("--tensorboard",),
        ("--keep-storage",),
    ],
)
def test_options_of_a_training_that_is_none_are_refused(option: tuple[str, ...]) -> None:
    message = refused("train", *NAMED, *DATA, "--epochs", "0", *option, "-o", "b.pt")
    assert option[0] in message
    assert "--epochs 0 trains nothing" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("uint8", "--symmetric"), "--symmetric: --method uint8 has no such choice; intN and qat have"),
        (("uint8", "--asymmetric"), "--asymmetric: --method uint8 has no such choice; intN and qat have"),
        (("bf16", "--per-tensor"), "--per-tensor: --method bf16 has no scales"),
        (("int4", "--target", "bytes=0.1", "--weight-bits", "4"), "--weight-bits: --target and --max-drop"),
        (("int8", "--max-drop", "2", "--weight-bits", "8"), "--weight-bits: --target and --max-drop choose"),
        (
            ("int8", "--observer", "n-std", "--deviations", "2e6"),
            "--deviations 2000000.0: (0, 1e6] is allowed",
        ),
    ],
)
def test_options_of_quantizers_that_have_no_such_choice_are_refused(
    line: tuple[str, ...], message: str
) -> None:
    assert message in refused("quantize", "a.pt", *NAMED, *DATA, "--method", *line, "-o", "b.pt")


def test_the_mode_of_a_metric_that_is_not_named_is_refused() -> None:
    line = ("train", *NAMED, *DATA, "--epochs", "1", "-o", "b.pt")
    for mode in ("max", "min"):
        assert "--metric" in refused(*line, "--metric-mode", mode)


# -- streams -----------------------------------------------------------------------------------------------


def test_an_index_without_streams_is_nothing_to_decode() -> None:
    Path("maps").mkdir()
    index = {"network": "lenet", "data": "digits", "split": "test", "made_with": "here", "streams": []}
    Path("maps/index.json").write_text(json.dumps({"format": "cctool feature maps 1", **index}))
    result = CliRunner().invoke(app, ["decode", "maps", "-o", "out"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "names no streams: there is nothing to decode" in result.stderr
    assert not Path("out").exists()


def decoded(*sources: str) -> str:
    """What a decoding that works says on stderr."""
    result = CliRunner().invoke(app, ["decode", *sources, "-o", "out", "--force"])
    assert result.exit_code == 0, result.stderr
    return result.stderr


def test_streams_that_an_index_does_not_name_are_said() -> None:
    said(*CODED, "-o", "c.pt")
    said("evaluate", "c.pt", *NAMED, *DATA, "--bitstream", "maps")
    assert "does not name" not in decoded("maps")
    streams = sorted(path.name for path in Path("maps").glob("*.seg"))
    Path("maps/extra.seg").write_bytes(Path("maps", streams[0]).read_bytes())
    Path("maps/notes.txt").touch()
    text = "maps/index.json does not name extra.seg"
    assert f"{text}: not decoded; named as files, streams are decoded without verification" in decoded("maps")
    assert len(list(Path("out").iterdir())) == len(streams)
    for sources in (("maps", "maps/extra.seg"), ("maps/extra.seg",)):
        found = decoded(*sources)
        assert f"{text}: what is decoded from it is not verified" in found
        assert "not decoded" not in found
        assert Path("out/extra.npy").is_file()


# -- data --------------------------------------------------------------------------------------------------


def test_options_of_data_without_data_are_said() -> None:
    bare = ("train", *NAMED, "--arg", "num_classes=3", "--input", "1x8x8", "--epochs", "0", "-o", "c.pt")
    text = "--batch-size, --limit changes nothing: no data set is named (--data) or remembered"
    said(*bare)
    assert text in said("quantize", "c.pt", *NAMED, "--batch-size", "8", "--limit", "4", "-o", "d.pt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            ("analyze", "--data", "digits"),
            "--data changes nothing: samples are for comparing the file of --onnx",
        ),
        (
            ("analyze", "--limit", "8", "--macs"),
            "--limit changes nothing: samples are for comparing the file",
        ),
        (
            ("export", "--format", "state-dict", "--data", "digits"),
            "--data changes nothing: the tensors of a",
        ),
        (("export", "-o", "x.safetensors", "--limit", "8"), "--limit changes nothing: the tensors of a saf"),
    ],
)
def test_data_that_no_file_is_compared_on_are_said(line: tuple[str, ...], message: str) -> None:
    assert message in said(line[0], "a.pt", *NAMED, *line[1:])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--val-data", "digits"), "--val-data changes nothing: it is the validation split, and test is"),
        (
            ("--test-data", "digits", "--split", "train"),
            "--test-data changes nothing: it is the test split, and train is",
        ),
    ],
)
def test_data_of_a_split_that_is_not_measured_are_said(line: tuple[str, ...], message: str) -> None:
    assert message in said("evaluate", "a.pt", *NAMED, "--data", "digits", *line)


def test_the_mode_of_a_metric_does_not_contradict_the_metric() -> None:
    text = "\ndef errors(outputs, targets):\n    return float(len(targets))\nerrors.direction = 'min'\n"
    Path("net.py").write_text(NET + text)
    line = ("train", *NAMED, *DATA, "--epochs", "1", "--metric", "net.py:errors", "-o", "b.pt")
    assert "--metric-mode max: the metric errors itself says" in refused(*line, "--metric-mode", "max")
    said(*line, "--metric-mode", "min")


# -- in Python ---------------------------------------------------------------------------------------------


def memory() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    return {"images": images, "labels": torch.arange(16) % 10}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"workers": 2}, "workers: data in memory are served as they are given"),
        ({"augment": False}, "augment: data in memory"),
        ({"batch_size": 4, "loader": True}, "batch_size: data in memory"),
        ({"data_arg": "size=8"}, "data_arg: data in memory"),
    ],
)
def test_keywords_that_data_in_memory_have_no_use_for(keywords: dict[str, Any], message: str) -> None:
    held = memory()
    loader = keywords.pop("loader", False)
    tensors = (held["images"], held["labels"])
    data = DataLoader(TensorDataset(*tensors), batch_size=8) if loader else tensors
    with pytest.raises(cctool.CctoolError, match=message):
        cctool.train(arch="lenet", input=(1, 8, 8), data=data, epochs=1, **keywords)


def test_a_report_names_no_folder_that_is_gone(tmp_path: Path) -> None:
    held = memory()
    images = torch.nn.functional.interpolate(held["images"], size=32)
    asked: dict[str, Any] = {"arch": "lenet", "data": (images, held["labels"]), "epochs": 1, "batch_size": 8}
    assert cctool.train(**asked, device="cpu")[1].run_folder is None
    kept = cctool.train(**asked, device="cpu", output=str(tmp_path / "b.pt"))[1].run_folder
    assert kept == str(tmp_path / "b.run")
    assert Path(kept).is_dir()
