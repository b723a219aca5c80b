"""Regression: outputs and targets of one shape, judged by their mean squared and absolute difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cctool.base.errors import DataError, TrainingError
from cctool.tasks.base import Measure


@dataclass(frozen=True)
class Regression:
    """Targets of any shape (N, ...), which the main output has too."""

    name: str = "regression"
    measures: tuple[Measure, ...] = (
        Measure("mse", "mean squared error", rising=False),
        Measure("mae", "mean absolute error", rising=False),
    )
    agreement: None = None

    def main_output(self, outputs: Any) -> Tensor:
        """The tensor itself, ``out`` of a dict, or the first of several.

        Raises:
            TrainingError: if there is no tensor.
        """
        found = outputs.get("out") if isinstance(outputs, Mapping) else outputs
        found = found[0] if isinstance(found, (tuple, list)) and found else found
        if not isinstance(found, Tensor):
            raise TrainingError(
                f"the network returned a {type(outputs).__name__}; regression needs a tensor (N, ...)"
            )
        return found

    def loss(self, outputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean squared error over all elements.

        Raises:
            TrainingError: if outputs and targets have different shapes.
        """
        return self._errors(outputs, targets).square().mean()

    def refuse(self, outputs: Any, targets: Tensor, split: str) -> None:
        """Refuse targets that are not finite numbers.

        Raises:
            DataError: naming the split.
        """
        if targets.is_floating_point() and targets.device.type == "cpu" and not targets.isfinite().all():
            raise DataError(f"the {split} split has targets that are NaN or infinite")

    def sums(self, outputs: Any, targets: Tensor, *, training: bool = False) -> Mapping[str, Tensor] | None:
        """Sum over the samples of each one's mean squared and absolute error."""
        errors = self._errors(outputs, targets).flatten(1) if targets.dim() > 1 else None
        errors = self._errors(outputs, targets)[:, None] if errors is None else errors
        return {"mse": errors.square().mean(1).sum(), "mae": errors.abs().mean(1).sum()}

    def values(self, sums: Mapping[str, Tensor], n: float) -> dict[str, float]:
        """Means over the samples."""
        return {measure.name: float(sums[measure.name]) / n for measure in self.measures}

    def _errors(self, outputs: Any, targets: Tensor) -> Tensor:
        found = self.main_output(outputs)
        if found.shape != targets.shape:
            raise TrainingError(
                f"the network returned shape {list(found.shape)} for targets of shape {list(targets.shape)}: "
                "regression needs equal shapes"
            )
        return found - targets.to(found.dtype)
