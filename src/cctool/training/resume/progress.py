"""How far a training run has come, and how that is stored in a `ResumeState`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from cctool.base.errors import CorruptCheckpointError
from cctool.checkpoint.file.payload import ResumeState
from cctool.checkpoint.spec import Metrics
from cctool.training.averaging import WeightAverage
from cctool.training.resume.state import (
    flatten,
    generator_states,
    restore_generators,
    restore_optimizer,
    unflatten,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric


_BEST = "best/"


@dataclass(frozen=True)
class EpochRow:
    """One epoch in figures.

    Attributes:
        epoch: from 1.
        lr: learning rate of its last step.
        batch_ms: milliseconds per step, including loading data.
        seconds: of its training, without validation.
        n: training images seen by all processes.
        train: ``loss``, its components and what the task counts while training, means over the images.
        validation: metrics of the validation split; empty if it was not evaluated.
        validation_n: number of its images.
        best: whether it was the best epoch so far.
        sparsity: percentage of zeros in all weights after it.
    """

    epoch: int
    lr: float
    batch_ms: float
    seconds: float
    n: int
    train: Mapping[str, float]
    validation: Mapping[str, float] = field(default_factory=dict)
    validation_n: int = 0
    best: bool = False
    sparsity: float = 0.0


@dataclass(frozen=True)
class Best:
    """The best epoch so far: its number from 1, its metrics and a copy of its weights on the CPU."""

    epoch: int
    metrics: Metrics | None
    weights: Mapping[str, Any]


@dataclass
class Progress:
    """The number of epochs done, a row for each, and the best of them."""

    epoch: int = 0
    rows: list[EpochRow] = field(default_factory=list)
    best: Best | None = None


def capture(
    progress: Progress, optimizer: Optimizer, fabric: Fabric, average: WeightAverage | None = None
) -> ResumeState:
    """Store everything except the weights that the next epoch depends on; called by all processes."""
    tensors = generator_states(fabric) | ({} if average is None else average.state())
    best = progress.best
    state: dict[str, Any] = {
        "epoch": progress.epoch,
        "rows": [asdict(row) for row in progress.rows],
        "optimizer": flatten(optimizer.state_dict(), "optimizer", tensors),
        "scaler": flatten(fabric.strategy.precision.state_dict(), "scaler", tensors),
        "best": None,
    }
    if best is not None:
        # If the last epoch is the best, the file holds its weights already, unless those are an average.
        elsewhere = best.epoch != progress.epoch or average is not None
        metrics = best.metrics.model_dump(mode="json") if best.metrics else None
        state["best"] = {"epoch": best.epoch, "metrics": metrics, "elsewhere": elsewhere}
        if elsewhere:
            tensors |= {f"{_BEST}{name}": value for name, value in best.weights.items()}
    return ResumeState(tensors=tensors, state=state)


def restore(
    resume: ResumeState, weights: Mapping[str, Any], optimizer: Optimizer, fabric: Fabric
) -> Progress:
    """Restore everything that `capture` stored.

    Args:
        resume: from a file.
        weights: state dict of the network in the same file.
        optimizer: over the same parameters.
        fabric: with as many processes as before.

    Raises:
        TrainingError: if it does not fit this training.
        CorruptCheckpointError: if it is malformed.
    """
    try:
        state: Any = resume.state
        rows = [EpochRow(**row) for row in state["rows"]]
        progress = Progress(int(state["epoch"]), rows, best_of(resume, weights))
        optimizer_state, scaler = state["optimizer"], state["scaler"]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(
            f"the resume state is malformed: {type(error).__name__} {error}"
        ) from None
    restore_optimizer(optimizer, optimizer_state, resume.tensors)
    fabric.strategy.precision.load_state_dict(unflatten(scaler, resume.tensors))
    restore_generators(resume.tensors, fabric)
    return progress


def best_of(resume: ResumeState, weights: Mapping[str, Any]) -> Best | None:
    """The best epoch in a resume state, of which ``weights`` are those of the network in the same file."""
    found: Any = resume.state["best"]
    if found is None:
        return None
    metrics = Metrics.model_validate(found["metrics"]) if found["metrics"] else None
    if found["elsewhere"]:
        weights = {
            name.removeprefix(_BEST): value
            for name, value in resume.tensors.items()
            if name.startswith(_BEST)
        }
    copies = {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
        for name, value in weights.items()
    }
    return Best(int(found["epoch"]), metrics, copies)
