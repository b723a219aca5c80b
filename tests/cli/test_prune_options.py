"""`cctool prune` on wrong command lines: what is refused, and what the message says."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cctool.cli.main import app


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
        ("--min-channels 0", "min_channels 0 is below 1"),
        ("--granularity nm --pattern 4:2", "fewer must stay than there are"),
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
        ("--growth agp", "a single step has no course"),
        ("--step-mode progressive", "a single step has no course"),
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
    from cctool.options.prune_parts import Quantity, Target, parse_target

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
    assert not parse_target("bytes=2").relative
