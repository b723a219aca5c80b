"""The protocol of a task: what a network's outputs mean, and by what they are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from cctool.base.errors import TrainingError
from cctool.base.outputs import named_tensors


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

    def shown(self, value: float, digits: str = ".4g") -> str:
        """A value with its unit."""
        return f"{value:{digits}} {self.unit}".rstrip()

    @property
    def heading(self) -> str:
        """As a column is called."""
        title = self.title[0].upper() + self.title[1:]
        return f"{title} ({self.unit})" if self.unit else title


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

    @property
    def has_loss(self) -> bool:
        """Whether it has a loss of its own; without, the user's functions alone judge."""
        ...

    def fits(self, outputs: Any) -> bool:
        """Whether what a network returned may mean this."""
        ...

    def classes_in(self, outputs: Any) -> int | None:
        """How many classes the outputs tell apart; None for a task without classes."""
        ...

    def imitation(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Mean distance of a student's main output from a teacher's, which is a constant; a scalar."""
        ...

    def compared(self, outputs: Any) -> list[Tensor]:
        """The floating-point tensors by which `divergence` compares two passes."""
        ...

    def divergence(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        """How much outputs differ from others of the same images: 0 or more, infinite if not finite."""
        ...

    def guess(self, classes: int | None) -> float | None:
        """The main metric of a blind guess among so many classes; None if that is not known."""
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


def only_tensor(outputs: Any) -> Tensor:
    """The first floating-point tensor in what a network returned, else its first tensor.

    Raises:
        TrainingError: if there is none.
    """
    found = list(named_tensors(outputs).values())
    if not found:
        raise TrainingError(f"the network returned a {type(outputs).__name__} without any tensor")
    return next((tensor for tensor in found if tensor.is_floating_point()), found[0])


def divergence_of_classes(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Mean over images and positions of KL(softmax(wanted) || softmax(found)), logits being (N, C, ...)."""
    if not _finite(found):
        return math.inf
    # Rounding errors can make the divergence of nearly equal predictions slightly negative.
    p, q = wanted[0].double().log_softmax(1), found[0].double().log_softmax(1)
    return max(0.0, float(F.kl_div(q, p, log_target=True, reduction="none").sum(1).mean()))


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Mean over the tensors of: mean squared error divided by the mean square of what is wanted."""
    if not _finite(found):
        return math.inf
    errors = [
        float((a.double() - b.double()).square().mean() / b.double().square().mean().clamp(min=1e-30))
        for a, b in zip(found, wanted, strict=True)
        if b.numel()
    ]
    return sum(errors) / max(len(errors), 1)


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


class Values:
    """What holds of outputs that tell no classes apart."""

    agreement: None = None

    def classes_in(self, outputs: Any) -> int | None:
        """None: values are no classes."""
        return None

    def imitation(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Mean squared difference; the temperature has no meaning here."""
        return (student - teacher.detach()).square().mean()

    def divergence(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        """Mean squared error divided by the mean square, averaged over the tensors."""
        return relative_error(found, wanted)

    def guess(self, classes: int | None) -> float | None:
        """Not known: the error of a guess depends on how far the targets spread."""
        return None
