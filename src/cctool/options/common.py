"""Options that several verbs share: one dataclass each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cctool.base.errors import UsageError
from cctool.base.json_text import twice
from cctool.options.fields import Choice, Options, at_least, nested, option, section

_network = section("Which network")
_data = section("Data")
_run = section("Where and how to compute")
_output = section("Output")


class Precision(Choice):
    """Arithmetic of forward and backward passes; parameters stay float32."""

    FULL = "32"
    BF16 = "bf16"
    FP16 = "16"


def _argument(text: str, flag: str, example: str) -> str:
    key, equals, _ = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{flag} {text}: key=value is expected, as in {example}")
    return text


def _doubled(arguments: tuple[str, ...], flag: str) -> tuple[bool, str]:
    """Whether a key is given twice among ``key=value`` texts, and the error message."""
    keys = twice(text.partition("=")[0] for text in arguments)
    return bool(keys), f"{flag} {', '.join(keys)}: given twice; once is allowed"


def _data_argument(of: str, flag: str) -> Any:
    """The arguments of the user's function that gives a data set."""
    return _data(
        (),
        f"Argument of the function that {of} names, if it is your own; may be repeated.",
        flag,
        metavar="KEY=VALUE",
        repeated=True,
        if_given=True,
        parse=lambda text: _argument(text, flag, "size=64"),
    )


@dataclass(frozen=True)
class DataOptions(Options):
    """Which data, and how much of it at a time."""

    # fmt: off
    data: str | None = _data(
        None, "Data set: digits, cifar10[:DIR], folder:DIR, my.py:factory, ... See `cctool datasets`.",
        runs_code=True, unset="the checkpoint's last")
    val_data: str | None = _data(None, "Data set that replaces the validation split.", runs_code=True)
    test_data: str | None = _data(None, "Data set that replaces the test split.", runs_code=True)
    batch_size: int = _data(128, "Samples per step, summed over all devices.", bounds=at_least(1))
    workers: int = _data(
        0, "Processes that decode image files; 0 decodes in the main process.", bounds=at_least(0))
    limit: int | None = _data(None, "Use at most this many samples of each split.", bounds=at_least(1))
    data_arguments: tuple[str, ...] = _data_argument("--data", "--data-arg")
    val_data_arguments: tuple[str, ...] = _data_argument("--val-data", "--val-data-arg")
    test_data_arguments: tuple[str, ...] = _data_argument("--test-data", "--test-data-arg")
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Arguments of a function that is not named."""
        # fmt: off
        return (
            (bool(self.data_arguments) and self.data is None, "--data-arg needs --data my.py:factory"),
            (bool(self.val_data_arguments) and self.val_data is None,
             "--val-data-arg needs --val-data my.py:factory"),
            (bool(self.test_data_arguments) and self.test_data is None,
             "--test-data-arg needs --test-data my.py:factory"),
            _doubled(self.data_arguments, "--data-arg"),
            _doubled(self.val_data_arguments, "--val-data-arg"),
            _doubled(self.test_data_arguments, "--test-data-arg"),
        )
        # fmt: on


_task = section("What is measured")


@dataclass(frozen=True)
class TaskOptions(Options):
    """What the network is for, and the user's functions in place of the task's loss and metrics."""

    # fmt: off
    task: str | None = _task(
        None, "What the outputs mean: classification, segmentation, regression, custom (your --loss and "
        "--metric) or unknown.", metavar="TASK", unset="the recorded one, else as data and outputs say",
        if_given=True)
    loss: str | None = _task(
        None, "Your loss(outputs, targets), a scalar tensor; gets inputs, too, if it has such a parameter.",
        metavar="FILE.py:FN", unset="the task's", runs_code=True)
    metric: str | None = _task(
        None, "Your metric(outputs, targets) of a whole split, a number; likewise. Epochs and searches go by "
        "it.", metavar="FILE.py:FN", unset="the task's", runs_code=True)
    # fmt: on


def judged() -> Any:
    """The options of the task, recorded if they are given."""
    return nested(TaskOptions, if_given=True)


def parse_shape(text: str) -> tuple[int, int, int]:
    """Parse ``CxHxW``.

    >>> parse_shape("3x32x32")
    (3, 32, 32)
    """
    pieces = text.lower().split("x")
    if len(pieces) != 3 or not all(piece.isdecimal() and int(piece) > 0 for piece in pieces):
        raise UsageError(f"--input {text}: CxHxW is expected, as in 3x224x224")
    channels, height, width = map(int, pieces)
    return channels, height, width


def parse_values(text: str, flag: str) -> tuple[float, ...]:
    """Parse comma-separated numbers.

    >>> parse_values(".5,.25", "--mean")
    (0.5, 0.25)
    """
    try:
        values = tuple(float(piece) for piece in text.split(","))
        if not all(map(math.isfinite, values)):
            raise ValueError
        return values
    except ValueError:
        raise UsageError(f"{flag} {text}: comma-separated numbers are expected, as in .5,.5,.5") from None


@dataclass(frozen=True)
class ModelOptions(Options):
    """Which network, if the file does not say it."""

    # fmt: off
    arch: str | None = _network(
        None, "Architecture: resnet20, torchvision:NAME, timm:NAME, net.py:factory. See `cctool models`.",
        runs_code=True)
    arguments: tuple[str, ...] = _network(
        (), "Argument of the architecture's builder; may be repeated.", "--arg", metavar="KEY=VALUE",
        repeated=True, parse=lambda text: _argument(text, "--arg", "num_classes=10"))
    input_shape: tuple[int, int, int] | None = _network(
        None, "Channels, height and width of one input.", "--input", metavar="CxHxW", parse=parse_shape)
    mean: tuple[float, ...] | None = _network(
        None, "Channel means to subtract from a foreign model's inputs (images in 0..1).", metavar="M,M,M",
        parse=lambda text: parse_values(text, "--mean"))
    std: tuple[float, ...] | None = _network(
        None, "Channel standard deviations to divide a foreign model's inputs by.", metavar="S,S,S",
        parse=lambda text: parse_values(text, "--std"))
    trust_pickle: bool = _network(
        False, "Unpickle a foreign file, which can run any code: only if you trust its author.")
    spec: str | None = _network(
        None, "Build the network of a bare state dict from this spec (see `analyze --spec`).",
        metavar="FILE.json", reads=True)
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Only one of mean and std, and two names for one network."""
        mean, std = self.mean or (), self.std or ()
        # fmt: off
        return (
            ((self.mean is None) != (self.std is None), "--mean and --std go together"),
            (bool(mean and std) and len(mean) != len(std),
             f"--mean has {len(mean)} values and --std {len(std)}: one per channel each"),
            (min(std, default=1.0) <= 0, f"--std {self.std}: positive values are needed"),
            (self.arch is not None and self.spec is not None,
             "--arch and --spec both name the network: give one"),
            _doubled(self.arguments, "--arg"),
        )
        # fmt: on


@dataclass(frozen=True)
class RuntimeOptions(Options):
    """Where and how to compute."""

    # fmt: off
    device: str = _run("auto", "Device to compute on: auto, cpu, cuda or cuda:N.")
    precision: Precision = _run(Precision.FULL, "Floating-point type of forward and backward passes.")
    seed: int = _run(0, "Seed of all random number generators.")
    deterministic: bool = _run(False, "Refuse operations that have no deterministic implementation.")
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Seeds that numpy does not take."""
        return ((not 0 <= self.seed < 2**32, f"--seed {self.seed}: 0 to {2**32 - 1} is allowed"),)


@dataclass(frozen=True)
class OutputOptions(Options):
    """Where the product goes."""

    # fmt: off
    output: str | None = _output(
        None, "Checkpoint to write: .pt or .safetensors.", "--output", "-o",
        unset="named after INPUT and the command, as in net.prune.pt")
    force: bool = _output(False, "Replace existing files.")
    allow_nonfinite: bool = _output(False, "Write the file even if weights are NaN or infinite.")
    # fmt: on


@dataclass(frozen=True)
class TalkOptions(Options):
    """What a command prints."""

    # fmt: off
    as_json: bool = _output(False, "Print the results as one JSON document.", "--json")
    quiet: bool = _output(False, "Print only warnings and errors.", "--quiet", "-q")
    debug: bool = _output(False, "Show the traceback when an error occurs.")
    # fmt: on


def wrong_suffix(flag: str, path: str | None, *suffixes: str) -> tuple[bool, str]:
    """Whether a file's name ends in none of the suffixes, and the error message."""
    wrong = path is not None and not path.lower().endswith(suffixes)
    return wrong, f"{flag} {path}: a name that ends in {' or '.join(suffixes)} is expected"


def report_file_option(panel: str) -> Any:
    """The table of coded feature maps."""
    text = "Write the figures of each coded feature map (tap) to a workbook or table."
    return option(None, text, metavar="FILE.xlsx|.csv|.json", panel=panel, recorded=False, writes=True)


def histograms_option(panel: str) -> Any:
    """The pictures of coded feature maps."""
    text = "Write PNG histograms into this folder: one per tap, with a panel per sub-band."
    return option(None, text, metavar="DIR", panel=panel, recorded=False, writes=True)


def zero_bar_option(panel: str) -> Any:
    """The bar of zeros in these pictures, which dwarfs the others."""
    return option(False, "Also draw the bar of zeros in the histograms.", panel=panel, recorded=False)


def sampled_data(limit: str) -> Any:
    """Data on which a written model is verified, in addition to random inputs; ``limit`` is a help text."""
    replaced = ("val_data", "val_data_arguments", "test_data", "test_data_arguments")
    changed = {"limit": {"help": limit}}
    few = DataOptions(batch_size=64, limit=256)
    return nested(DataOptions, few, without=replaced, changed=changed)
