"""The protocol of a task: what a network's outputs mean, and by what they are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Measure:
    """A metric as people read it.

    Attributes:
        name: its key in records and JSON.
        title: as tables and sentences name it.
        unit: after its values; empty for plain numbers.
        rising: whether larger is better.
        share: whether it is the percentage of samples (or pixels) for which something holds, so that an
            interval follows from the number of samples.
    """

    name: str
    title: str
    unit: str = ""
    rising: bool = True
    share: bool = False


LOSS = Measure("loss", "loss", rising=False)
"""The mean loss, which every task has that has one at all."""


@dataclass(frozen=True)
class Agreeing:
    """What two versions of a network are asked to choose alike, for instance before and after an export.

    Attributes:
        name: its key in records.
        title: as sentences name it, as in "top-1 agreement".
        things: what a choice is made for, in the plural.
        choices: the choices in a main output (N, ...), whole numbers (N,) or (N, ...).
    """

    name: str
    title: str
    things: str
    choices: Callable[[Tensor], Tensor]


class Task(Protocol):
    """What a network is for.

    Attributes:
        name: in specs and on the command line.
        measures: what is measured besides the loss, the main one first; () if the loss alone judges.
        agreement: what an exported network is asked to choose like the network; None if nothing is chosen, so
            that only differences of the outputs count.
    """

    @property
    def name(self) -> str:
        """See above."""
        ...

    @property
    def measures(self) -> tuple[Measure, ...]:
        """See above."""
        ...

    @property
    def agreement(self) -> Agreeing | None:
        """See above."""
        ...

    def main_output(self, outputs: Any) -> Tensor:
        """The tensor in what a network returned that the metrics are about.

        Raises:
            TrainingError: if there is none.
        """
        ...

    def loss(self, outputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean loss of a batch, a scalar.

        Raises:
            TrainingError: if outputs and targets do not fit.
        """
        ...

    def refuse(self, outputs: Any, targets: Tensor, split: str) -> None:
        """Refuse targets that no output stands for; called before the loss of a measured batch.

        Raises:
            DataError: naming the split and the target.
        """
        ...

    def sums(self, outputs: Any, targets: Tensor, *, training: bool = False) -> Mapping[str, Tensor] | None:
        """Figures of a batch that add up over a split, on the outputs' device; None if they do not apply.

        ``training`` asks for those alone that the progress of training shows, as scalars.
        """
        ...

    def values(self, sums: Mapping[str, Tensor], n: float) -> dict[str, float]:
        """Metrics of the sums over ``n`` samples, in the order of `measures`."""
        ...


def main_measure(task: Task) -> Measure:
    """The measure by which epochs, searches and budgets judge."""
    return task.measures[0] if task.measures else LOSS
