"""What `cctool train` can be asked beside the options of training itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePath

from cctool.base.errors import UsageError
from cctool.options.common import DataOptions
from cctool.options.train.fit import FitOptions
from cctool.options.transform.choices import Mode

__all__ = [
    "LayerSwap",
    "RunOptions",
    "TrainOptions",
    "find_resumed",
    "parse_swap",
    "refuse_small_batches",
    "run_folder_of",
]

_STEERS = {"recorded": False}


@dataclass(frozen=True)
class RunOptions:
    """How one call runs and what it writes beside its product; `train` and `distill` share it.

    What does not change the result is left out of the history, so that an interrupted and resumed training
    gives the same file as an uninterrupted one.

    Attributes:
        resume: go on from the run folder's ``last.pt``.
        stop_after: stop after so many epochs of this call, to be resumed later.
        save_every: keep a checkpoint of every so many epochs in the run folder.
        tensorboard: write TensorBoard event files into the run folder.
        mlflow: write an MLflow run.
        mlflow_dir: folder of MLflow's file store; None puts it into the run folder.
        devices: processes on this machine, a device each.
        nodes: machines; each is given the same command, with MASTER_ADDR, MASTER_PORT and NODE_RANK set.
    """

    resume: bool = field(default=False, metadata=_STEERS)
    stop_after: int | None = field(default=None, metadata=_STEERS)
    save_every: int | None = field(default=None, metadata=_STEERS)
    tensorboard: bool = field(default=False, metadata=_STEERS)
    mlflow: bool = field(default=False, metadata=_STEERS)
    mlflow_dir: str | None = field(default=None, metadata=_STEERS)
    devices: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"{option} {value}: at least 1 is needed"
            for option, value in (
                ("--stop-after", self.stop_after),
                ("--save-every", self.save_every),
                ("--devices", self.devices),
                ("--nodes", self.nodes),
            )
            if value is not None and value < 1
        ]
        if self.mlflow_dir is not None and not self.mlflow:
            problems.append("--mlflow-dir needs --mlflow")
        if problems:
            raise UsageError("; ".join(problems))

    @property
    def processes(self) -> int:
        """Processes on all machines together."""
        return self.devices * self.nodes


@dataclass(frozen=True)
class LayerSwap:
    """Layers of a fresh network that live in a transform domain from the beginning.

    Attributes:
        mode: how they do.
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
        UsageError: if it is something else.
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
class TrainOptions:
    """Options of one training.

    Attributes:
        fit: epochs, optimizer, schedule and so on.
        data: which data, and how much of it at a time.
        run: how this call runs and what it writes beside its product.
        keep_storage: store tensors again as the input stored them; metrics are measured after that.
        swap: layers of a fresh network that live in a transform domain, see `parse_swap`; None where there
            are none.
    """

    fit: FitOptions = field(default_factory=FitOptions)
    data: DataOptions = field(default_factory=DataOptions)
    run: RunOptions = field(default_factory=RunOptions)
    keep_storage: bool = False
    swap: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        refuse_small_batches(self.data, self.run)
        _ = self.swaps

    @property
    def swaps(self) -> tuple[LayerSwap, ...]:
        """What `swap` says, parsed.

        Raises:
            UsageError: if one of them is malformed.
        """
        return tuple(map(parse_swap, self.swap or ()))


def refuse_small_batches(data: DataOptions, run: RunOptions) -> None:
    """Refuse batches with less than two images a process, which batch norm cannot normalise."""
    if run.processes > 1 and data.batch_size < 2 * run.processes:
        raise UsageError(
            f"--batch-size {data.batch_size}: it is shared by {run.processes} processes, "
            f"so at least {2 * run.processes} is needed"
        )


def run_folder_of(output: str) -> PurePath:
    """Path of the run folder that belongs to a product.

    >>> str(run_folder_of("out/net.train.pt"))
    'out/net.train.run'
    """
    path = PurePath(output)
    return path.with_name(f"{path.stem}.run")


def find_resumed(source: str | None, output: str | None, verb: str) -> tuple[str | None, str | None]:
    """Find what ``--resume`` means: input and output of the training to go on with.

    The same command line finds its run folder by its output. A ``last.pt`` in a run folder, or a product
    whose run folder lies beside it, goes on with that training and writes its product.

    Args:
        source: INPUT as it was given.
        output: ``--output`` as it was given.
        verb: the command.
    """
    if source is None or source == "-":
        return source, output
    path = Path(source)
    expected = output or str(path.with_name(f"{path.stem}.{verb}.pt"))
    if Path(run_folder_of(expected), "last.pt").exists():
        return source, output
    if path.name == "last.pt" and path.parent.suffix == ".run":
        return source, output or str(path.parent.with_suffix(".pt"))
    beside = Path(run_folder_of(source), "last.pt")
    return (str(beside), output or source) if beside.exists() else (source, output)
