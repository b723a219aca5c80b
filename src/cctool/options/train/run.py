"""Options of `cctool train` other than those of the training itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from cctool.base.errors import UsageError
from cctool.options.common import DataOptions
from cctool.options.fields import Options, at_least, nested, option, section
from cctool.options.teacher import keep_storage_option
from cctool.options.train.fit import UNTRAINED, FitOptions
from cctool.options.train.start import StartOptions
from cctool.options.transform.choices import Mode

_run_folder = partial(section("The run folder"), idle=UNTRAINED)
_machines = section("Devices and machines")


@dataclass(frozen=True)
class RunOptions(Options):
    """How one call of `train` or `distill` runs, and what it writes in addition to its product.

    Options that do not change the result are not recorded in the history, so that a resumed training gives
    the same file as an uninterrupted one.
    """

    # fmt: off
    resume: bool = _run_folder(False, "Continue from the run folder's last.pt.", recorded=False)
    stop_after: int | None = _run_folder(
        None, "Stop after this many epochs of this call; --resume continues.", metavar="EPOCHS",
        recorded=False, bounds=at_least(1))
    save_every: int | None = _run_folder(
        None, "Keep epoch-NNNN.pt in the run folder at this interval.", metavar="EPOCHS", recorded=False,
        bounds=at_least(1))
    tensorboard: bool = _run_folder(False, "Write TensorBoard event files.", recorded=False)
    mlflow: bool = _run_folder(False, "Log to a local MLflow file store.", recorded=False)
    mlflow_dir: str | None = _run_folder(
        None, "Folder of MLflow's file store.", metavar="DIR", recorded=False, unset="in the run folder")
    devices: int = _machines(1, "Processes on this machine, one device each.", bounds=at_least(1))
    nodes: int = _machines(
        1, "Machines; set MASTER_ADDR, MASTER_PORT and NODE_RANK on each of them.", bounds=at_least(1))
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """The folder of a log without the log."""
        return ((self.mlflow_dir is not None and not self.mlflow, "--mlflow-dir needs --mlflow"),)

    @property
    def processes(self) -> int:
        """Number of processes on all machines together."""
        return self.devices * self.nodes


@dataclass(frozen=True)
class LayerSwap:
    """Layers of a fresh network that are in a transform domain from the beginning.

    Attributes:
        mode: coefficients or basis functions.
        kernel: of the transform.
        layers: ``linear``, ``conv``, ``all`` or a pattern of module names.
    """

    mode: Mode
    kernel: str
    layers: str


def parse_swap(text: str) -> LayerSwap:
    """Parse ``MODE:KERNEL:LAYERS``.

    >>> parse_swap("basis:dct:linear").kernel
    'dct'

    Raises:
        UsageError: if the text has another form.
    """
    mode, _, rest = text.partition(":")
    kernel, _, layers = rest.partition(":")
    modes = [item.value for item in Mode]
    if mode not in modes or not kernel or not layers:
        raise UsageError(
            f"--swap {text}: MODE:KERNEL:LAYERS is expected, as in basis:dct:linear; "
            f"modes are {' and '.join(modes)}"
        )
    return LayerSwap(Mode(mode), kernel, layers)


@dataclass(frozen=True)
class TrainOptions(Options):
    """Options of one training."""

    # fmt: off
    fit: FitOptions = nested(FitOptions)
    data: DataOptions = nested(DataOptions)
    run: RunOptions = nested(RunOptions)
    keep_storage: bool = keep_storage_option("Output", UNTRAINED)
    start: StartOptions = nested(StartOptions, if_given=True)
    swap: tuple[str, ...] | None = option(
        None, "Put layers of a fresh network into a transform domain before training, as in "
        "basis:dct:linear or coefficient:dwt:all; may be repeated.", metavar="MODE:KERNEL:LAYERS",
        panel="Which network", repeated=True)
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_small_batches(self.data, self.run)
        _ = self.swaps

    @property
    def swaps(self) -> tuple[LayerSwap, ...]:
        """`swap`, parsed. Raises UsageError if an item is malformed."""
        return tuple(map(parse_swap, self.swap or ()))


def refuse_small_batches(data: DataOptions, run: RunOptions) -> None:
    """Refuse batches with fewer than two images per process, which batch norm cannot normalise."""
    if run.processes > 1 and data.batch_size < 2 * run.processes:
        raise UsageError(
            f"--batch-size {data.batch_size}: it is shared by {run.processes} processes, "
            f"so at least {2 * run.processes} is needed"
        )
