"""`cctool prune` on wrong command lines: what is refused, and what the message says."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cctool.cli.main import app
from cctool.operations.prune import run as prune
from cctool.options.common import DataOptions, ModelOptions, TaskOptions
from cctool.options.prune.choices import (
    AttentionUnit,
    Granularity,
    Growth,
    Images,
    Normalize,
    PruneMethod,
    Reduce,
    Scope,
    Sparsifier,
    StepMode,
)
from cctool.options.prune.options import PruneOptions, PrunePreset, SparsifyOptions
from cctool.options.prune.patterns import Block, Pattern
from cctool.options.target import Quantity, Target
from cctool.options.teacher import TeacherOptions


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("options") / "net.pt"
    arguments = ["train", "--arch", "resnet20", "--arg", "base=4", "--epochs", "0", "-q", "-o", str(path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--target macs", "QUANTITY=VALUE is expected"),
        ("--target flops=0.5", "quantities are macs, params, bytes, latency"),
        ("--target macs=fast", "QUANTITY=VALUE is expected"),
        ("--target macs=0", "a positive number is needed"),
        ("--target macs=150%", "at most 100 %"),
        ("--target macs=5ms", "ms is no unit of macs"),
        ("--target latency=5MB", "MB is no unit of latency"),
        ("--target latency=5", "a time needs its unit"),
        ("--target latency=0.001us", "--target latency=0.001us cannot be reached"),
        ("--target bytes=1B", "--target bytes=1 cannot be reached"),
        ("--target macs=0.5 --rate 0.3", "--target takes the place of --rate"),
        ("--target macs=0.5 --keep 0.9", "each say how much goes"),
        ("--max-drop 1 --target macs=0.5", "each say how much goes"),
        ("--max-drop -1", "0 or more"),
        ("--max-drop 1 --steps 2", "--steps has nothing to do"),
        ("--rates none.csv --rate 0.2", "--rates takes the place of --rate"),
        ("--rates none.csv", "none.csv"),
        ("--rates none.csv --scope global", "leaves --scope global nothing to do"),
        ("--round-to zero", "a whole number from 1 on, or auto"),
        ("--round-to 0", "a whole number from 1 on, or auto"),
        ("--min-channels 0", "--min-channels 0: 1 or more is allowed"),
        ("--granularity nm --pattern 4:2", "fewer must stay than there are"),
        ("--granularity nm --steps 2", "leaves --steps nothing to do"),
        ("--granularity nm --scope global", "within each group of M"),
        ("--granularity nm --rates none.csv", "leaves --rates nothing to do"),
        ("--keep 0.8 --steps 2 --growth agp", "by the same factor"),
        ("--granularity element --sparsify growing --data digits", "growing pushes the channels"),
        ("--apply-masks --plot", "plans no widths"),
        ("--apply-masks --exact", "plans no widths"),
        ("--optimizer sgd", "nothing is trained"),
        ("--recalibrate 8 --data digits --dry-run", "wrongly scaled images"),
        ("--rewind none.pt --dry-run", "none.pt: no such file"),
        ("--teacher none.pt --finetune-epochs 1 --data digits --dry-run", "none.pt: no such file"),
        ("--granularity nm --rate 0.3", "--granularity nm takes the place of --rate"),
        ("--pattern 2:4", "--pattern belongs to --granularity nm"),
        ("--granularity block --block 4", "ROWSxCOLUMNS is expected"),
        ("--block 4x4", "--block belongs to --granularity block"),
        ("--granularity element --method slimming", "slimming ranks channels"),
        ("--granularity element --method apoz", "apoz ranks channels"),
        ("--granularity element --mask", "masks anyway"),
        ("--granularity element --target macs=0.5", "change no width"),
        ("--granularity element --round-to 8", "changes no width"),
        ("--granularity element --plot", "changes no width"),
        ("--mask --apply-masks", "two different commands"),
        ("--apply-masks --method l1", "chooses nothing"),
        ("--apply-masks --rate 0.2", "--apply-masks takes the place of --rate"),
        ("--rewind a.pt --from-scratch", "give one"),
        ("--apply-masks --rewind a.pt", "in a command of its own"),
        ("--teacher t.pt", "--teacher: nothing is fine-tuned"),
        ("--alpha 0.5", "there is no --teacher"),
        ("--temperature 0 --teacher t.pt --finetune-epochs 1", "a positive number is needed"),
        ("--teacher-arch resnet20", "there is no --teacher"),
        ("--sparsify-epochs 2", "there is no --sparsify"),
        ("--sparsify group-lasso --sparsify-epochs 0", "1 or more is allowed"),
        ("--sparsify group-lasso --sparsify-strength 0", "a positive number is needed"),
        ("--growth agp", "a single step has no intermediate rates"),
        ("--step-mode progressive", "a single step has no intermediate rates"),
        ("--samples 8", "looks at no images"),
        ("--method taylor", "--method taylor needs data"),
        ("--recalibrate-images plain", "--recalibrate says from how many images"),
        ("--keep-storage", "nothing is fine-tuned"),
        ("--plot-file a.jpg", "a picture ends in"),
        ("--reduce none", "reduce"),
    ],
)
def test_wrong_lines_are_refused_and_nothing_is_written(net: Path, line: str, message: str) -> None:
    result = CliRunner().invoke(app, ["prune", str(net), *line.split()])
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.split()), result.stderr
    assert [path.name for path in net.parent.iterdir()] == ["net.pt"]


def test_targets_are_read_in_all_their_units() -> None:
    from cctool.options.target import Quantity, Target, parse_target

    expected = {
        "macs=0.5": Target(Quantity.MACS, 0.5),
        "macs=20M": Target(Quantity.MACS, 20e6),
        "params=30%": Target(Quantity.PARAMS, 0.3),
        "bytes=1.2MB": Target(Quantity.BYTES, 1.2e6),
        "bytes=300kB": Target(Quantity.BYTES, 300e3),
        "latency=5ms": Target(Quantity.LATENCY, 5e3),
        "params=1e5": Target(Quantity.PARAMS, 1e5),
    }
    for text, target in expected.items():
        found = parse_target(text)
        assert (found.quantity, found.value) == (target.quantity, pytest.approx(target.value)), text
    assert parse_target("params=100%").relative
    assert not parse_target("latency=0.5us").relative
    assert not parse_target("params=0.001k").relative
    assert not parse_target("bytes=2").relative


@pytest.mark.parametrize("target", ["macs=1", "params=100%", "bytes=1GB"])
def test_a_target_that_is_met_already_removes_nothing_and_says_so(net: Path, target: str) -> None:
    result = CliRunner().invoke(app, ["prune", str(net), "--dry-run", "--target", target])
    assert result.exit_code == 0, result.stderr
    assert "reached" in result.stderr
    assert "1 network counted" in " ".join(result.stderr.split())


def test_a_normalisation_that_compares_nothing_is_warned_of(net: Path) -> None:
    local = ["prune", str(net), "--dry-run", "--method", "l1", "--normalize", "mean"]
    assert "--normalize changes no choice" in CliRunner().invoke(app, local).stderr
    result = CliRunner().invoke(app, [*local, "--scope", "global"])
    assert "--normalize" not in result.stderr


TEACHER = (
    "--finetune-epochs 2 --teacher t.pt --teacher-arch lenet --teacher-arg num_classes=10 "
    "--teacher-input 1x8x8 --teacher-mean 0.5 --teacher-std 0.25 --temperature 2 --alpha 0.5"
)
FOREIGN = ModelOptions(
    arch="lenet", arguments=("num_classes=10",), input_shape=(1, 8, 8), mean=(0.5,), std=(0.25,)
)
READ: dict[str, dict[str, Any]] = {
    "--method l2 --scope global --reduce max --normalize standard": {
        "method": PruneMethod.L2,
        "scope": Scope.GLOBAL,
        "reduce": Reduce.MAX,
        "normalize": Normalize.STANDARD,
    },
    "--method taylor --samples 8 --rate 0.25": {"method": PruneMethod.TAYLOR, "samples": 8, "rate": 0.25},
    "--target params=30%": {"target": Target(Quantity.PARAMS, 0.3)},
    "--max-drop 1.5": {"max_drop": 1.5},
    "--rates a.csv": {"rates": "a.csv"},
    "--keep 0.9": {"keep": 0.9},
    "--apply-masks": {"apply_masks": True},
    "--granularity nm --pattern 1:4": {
        "granularity": Granularity.NM,
        "pattern": Pattern(1, 4),
        "method": PruneMethod.L1,
    },
    "--granularity block --block 2x3": {
        "granularity": Granularity.BLOCK,
        "block": Block(2, 3),
        "method": PruneMethod.L1,
    },
    "--mask --round-to auto --min-channels 4 --exact --attention heads": {
        "mask": True,
        "round_to": None,
        "min_channels": 4,
        "exact": True,
        "attention": AttentionUnit.HEADS,
    },
    "--exclude a --exclude b --only c --round-to 8": {"exclude": ("a", "b"), "only": ("c",), "round_to": 8},
    "--steps 3 --step-mode progressive --growth agp": {
        "steps": 3,
        "step_mode": StepMode.PROGRESSIVE,
        "growth": Growth.AGP,
    },
    "--sparsify growing --sparsify-epochs 2 --sparsify-strength 0.5 --sparsify-lr 0.1 --optimizer sgd": {
        "sparsify": SparsifyOptions(Sparsifier.GROWING, 2, 0.5, 0.1),
        "optimizer": "sgd",
    },
    "--rewind a.pt --recalibrate 64 --recalibrate-images augmented": {
        "rewind": "a.pt",
        "recalibrate": 64,
        "recalibrate_images": Images.AUGMENTED,
    },
    "--from-scratch --finetune-epochs 2 --optimizer sgd --lr 0.5 --keep-storage": {
        "from_scratch": True,
        "finetune_epochs": 2,
        "optimizer": "sgd",
        "lr": 0.5,
        "keep_storage": True,
    },
    TEACHER: {"finetune_epochs": 2, "teacher": TeacherOptions("t.pt", FOREIGN, 2.0, 0.5)},
    "--plot --plot-file a.svg": {"plot": True, "plot_file": "a.svg"},
    "--preset lhy-hw7 --finetune-epochs 0 --steps 1": {
        "preset": PrunePreset.LHY_HW7,
        "keep": 0.95,
        "lr": 1e-3,
        "scope": Scope.LOCAL,
        "only": ("cnn.4.1", "cnn.5.1", "cnn.6.1", "cnn.7.1"),
    },
    "--data digits --val-data digits --test-data digits --batch-size 7 --workers 1 --limit 9": {
        "data": DataOptions("digits", "digits", "digits", 7, 1, 9)
    },
    "--task regression --loss my.py:mse --metric my.py:psnr": {
        "judge": TaskOptions("regression", "my.py:mse", "my.py:psnr")
    },
}


@pytest.mark.parametrize("line", READ)
def test_each_option_reaches_the_operation(net: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    found: list[PruneOptions] = []

    def captured(checkpoint: Any, options: PruneOptions, context: Any) -> tuple[()]:
        found.append(options)
        return ()

    monkeypatch.setattr(prune, "plan", captured)
    result = CliRunner().invoke(app, ["prune", str(net), "--dry-run", *line.split()])
    assert result.exit_code == 0, result.stderr
    default = PruneOptions(dry_run=True)
    changed = {
        field.name: getattr(found[0], field.name)
        for field in fields(PruneOptions)
        if getattr(found[0], field.name) != getattr(default, field.name)
    }
    assert changed == READ[line]


def test_no_option_is_left_out_above() -> None:
    read = {name for options in READ.values() for name in options}
    assert {field.name for field in fields(PruneOptions)} == read | {"dry_run"}
