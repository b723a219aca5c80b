"""What a task may say besides its metrics: of single samples, and of classes.

Each protocol here is optional: an option that needs one is refused for the tasks that lack it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from cctool.tasks.base import Measure


@runtime_checkable
class Weighing(Protocol):
    """A task whose loss is a mean over something else than samples, such as pixels that count."""

    def weight(self, targets: Tensor) -> Tensor:
        """Over how many things the loss of a batch is a mean, a scalar; so that batches add up."""
        ...


@runtime_checkable
class Batching(Protocol):
    """A task whose targets are not simply stacked, such as masks of different sizes."""

    def batched(self, targets: Sequence[Any]) -> Tensor:
        """The targets of a batch (N, ...), of those of its samples."""
        ...


@runtime_checkable
class Predicting(Protocol):
    """A task whose predictions can be written down, a row a sample."""

    def predictions(
        self, outputs: Any, targets: Tensor | None, names: Sequence[str]
    ) -> Iterable[Mapping[str, object]]:
        """A row for each sample of a batch; all have the same columns.

        Args:
            outputs: what the network returned.
            targets: on the outputs' device; None for samples without.
            names: of the classes; () if unknown.

        Raises:
            DataError: if the outputs hold no predictions.
        """
        ...


@runtime_checkable
class Classed(Protocol):
    """A task whose outputs choose among classes.

    Attributes:
        class_measures: what is measured of each class.
        counted: what a confusion matrix counts, in the plural.
    """

    @property
    def class_measures(self) -> tuple[Measure, ...]:
        """See above."""
        ...

    @property
    def counted(self) -> str:
        """See above."""
        ...

    def confusion(self, outputs: Any, targets: Tensor) -> Tensor:
        """Counts of a batch, whole numbers (classes, classes): rows by target, columns by prediction.

        Raises:
            DataError: if the outputs do not choose among classes.
        """
        ...

    def per_class(self, confusion: Tensor) -> Mapping[str, Tensor]:
        """The class measures of counts (classes, classes), (classes,) each; NaN where nothing was counted."""
        ...


@runtime_checkable
class Hitting(Protocol):
    """A task with measures that are shares of samples, so that two networks can be compared by sample."""

    def hits(self, outputs: Any, targets: Tensor) -> Mapping[str, Tensor]:
        """Which samples count, booleans (N,), for each measure that is a share; {} if none applies."""
        ...


def class_name(number: int, names: Sequence[str]) -> str:
    """Name of a class, or its number if it has none."""
    return names[number] if number < len(names) else str(number)


def counts(predicted: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Confusion matrix (classes, classes) of predicted and true classes, both (N,)."""
    return (targets.long() * classes + predicted).bincount(minlength=classes**2).reshape(classes, classes)
