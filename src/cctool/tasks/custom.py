"""Tasks without a loss of their own: the user's functions judge, or nothing does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cctool.base.errors import TrainingError
from cctool.base.outputs import named_tensors
from cctool.tasks.base import Measure, Values, only_tensor

CUSTOM = "custom"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Untold(Values):
    """Outputs of which nothing is known; what needs only forward passes works.

    Attributes:
        name: ``unknown``, or ``custom`` where the user's loss or metric judges.
        measures: the user's metric, if it is named.
    """

    name: str = UNKNOWN
    measures: tuple[Measure, ...] = ()
    has_loss: bool = False

    def main_output(self, outputs: Any) -> Tensor:
        """The first floating-point tensor, else the first tensor.

        Raises:
            TrainingError: if there is none.
        """
        return only_tensor(outputs)

    def fits(self, outputs: Any) -> bool:
        """Always."""
        return True

    def compared(self, outputs: Any) -> list[Tensor]:
        """All floating-point tensors."""
        return [tensor for tensor in named_tensors(outputs).values() if tensor.is_floating_point()]

    def loss(self, outputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """There is none.

        Raises:
            TrainingError: always.
        """
        raise TrainingError("this network has no loss: name one with --loss, or its --task")

    def refuse(self, outputs: Any, targets: Tensor, split: str) -> None:
        """Refuses nothing: targets mean what the user's functions take them for."""

    def sums(self, outputs: Any, targets: Tensor, *, training: bool = False) -> Mapping[str, Tensor] | None:
        """None: nothing is counted."""
        return None

    def values(self, sums: Mapping[str, Tensor], n: float) -> dict[str, float]:
        """Nothing."""
        return {}
