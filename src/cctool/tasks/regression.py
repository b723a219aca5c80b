"""Regression: outputs and targets of one shape, judged by their mean squared and absolute difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cctool.base.errors import DataError, TrainingError
from cctool.base.outputs import named_tensors
from cctool.tasks.base import Measure, Values

_MOST_VALUES = 16  # predicted numbers of a sample that are written down


@dataclass(frozen=True)
class Regression(Values):
    """Targets of any shape (N, ...), which the main output has too."""

    name: str = "regression"
    measures: tuple[Measure, ...] = (
        Measure("mse", "mean squared error", rising=False),
        Measure("mae", "mean absolute error", rising=False),
    )

    def main_output(self, outputs: Any) -> Tensor:
        """The tensor itself, ``out`` of a dict, or the first of several.

        Raises:
            TrainingError: if there is no tensor.
        """
        found = _first(outputs)
        if not isinstance(found, Tensor):
            raise TrainingError(
                f"the network returned a {type(outputs).__name__}; regression needs a tensor (N, ...)"
            )
        return found

    has_loss = True

    def fits(self, outputs: Any) -> bool:
        """Whether there is one floating-point tensor, alone or as ``out`` of a dict."""
        named = isinstance(outputs, Mapping) and "out" in outputs
        found = _first(outputs)
        single = named or len(named_tensors(outputs)) == 1
        return single and isinstance(found, Tensor) and found.is_floating_point()

    def compared(self, outputs: Any) -> list[Tensor]:
        """The main output."""
        return [self.main_output(outputs)]

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
        """Sum over the samples of each one's mean squared and absolute error; None for other shapes."""
        if self.main_output(outputs).shape != targets.shape:
            return None
        errors = _rows(self._errors(outputs, targets))
        return {"mse": errors.square().mean(1).sum(), "mae": errors.abs().mean(1).sum()}

    def values(self, sums: Mapping[str, Tensor], n: float) -> dict[str, float]:
        """Means over the samples."""
        return {measure.name: float(sums[measure.name]) / n for measure in self.measures}

    def predictions(
        self, outputs: Any, targets: Tensor | None, names: Sequence[str]
    ) -> Iterator[Mapping[str, object]]:
        """Mean squared and absolute error of each sample, and its predicted numbers, if 16 at most."""
        found = _rows(self.main_output(outputs))
        errors = _rows(self._errors(outputs, targets)) if targets is not None else None
        for index, values in enumerate(found.tolist()):
            error = None if errors is None else errors[index]
            row: dict[str, object] = {
                "squared_error": "" if error is None else f"{float(error.square().mean()):.6g}",
                "absolute_error": "" if error is None else f"{float(error.abs().mean()):.6g}",
            }
            if len(values) <= _MOST_VALUES:
                row |= {f"predicted_{place}": f"{value:.6g}" for place, value in enumerate(values)}
            yield row

    def _errors(self, outputs: Any, targets: Tensor) -> Tensor:
        found = self.main_output(outputs)
        if found.shape != targets.shape:
            raise TrainingError(
                f"the network returned shape {list(found.shape)} for targets of shape {list(targets.shape)}: "
                "regression needs equal shapes"
            )
        return found - targets.to(found.dtype)


def _first(outputs: Any) -> Any:
    found = outputs.get("out") if isinstance(outputs, Mapping) else outputs
    return found[0] if isinstance(found, (tuple, list)) and found else found


def _rows(values: Tensor) -> Tensor:
    """A row of numbers for each sample."""
    return values.flatten(1) if values.dim() > 1 else values[:, None]
