"""Sums of the losses of an epoch; training stops at the first that is NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cctool.base.errors import DivergedError, UserCodeError
from cctool.tasks.base import Task
from cctool.training.objectives import Terms
from cctool.training.processes import Group


class Tally:
    """Sums over the training images of one epoch.

    Values stay on the device for ``every`` steps, so that training does not wait for each of them.

    Args:
        epoch: from 0.
        task: what the outputs mean.
        user: reference of the user's loss, for the error if it is NaN or infinite.
        every: steps between two looks at the losses.
    """

    def __init__(self, epoch: int, task: Task, user: str | None, every: int) -> None:
        self.n = 0
        self._epoch = epoch
        self._task = task
        self._counted: frozenset[str] = frozenset()
        self._user = user
        self._every = every
        self._steps = 0
        self._sums: dict[str, float] = {}
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, terms: Terms, labels: Tensor | None, n: int) -> None:
        """Add the figures of one step on ``n`` images.

        Raises:
            DivergedError: if a loss since the last look was NaN or infinite.
            UserCodeError: if that was the user's loss.
        """
        values = {"loss": terms.loss.detach()}
        values |= {name: value.detach() for name, value in terms.components.items()}
        counts: Mapping[str, Tensor] = {}
        if labels is not None:
            output = terms.output.detach()
            counts = self._task.sums(output, labels.to(output.device), training=True) or {}
        self._counted |= counts.keys()
        values |= counts
        self._waiting.append((n, values))
        self._steps += 1
        if len(self._waiting) >= self._every:
            self._look()

    def finish(self, group: Group, device: torch.device) -> None:
        """Look at the remaining losses, and sum over all processes."""
        if self._waiting:
            self._look()
        together = torch.tensor([self.n, *self._sums.values()], dtype=torch.float64, device=device)
        n, *sums = group.sum(together).tolist()
        self.n = int(n)
        self._sums = dict(zip(self._sums, sums, strict=True))

    def means(self) -> dict[str, float]:
        """``loss``, its components, and the task's metrics that add up over batches."""
        means = {name: total / self.n for name, total in self._sums.items() if name not in self._counted}
        counted = {name: torch.tensor(self._sums[name], dtype=torch.float64) for name in self._counted}
        return means | (self._task.values(counted, self.n) if counted else {})

    def _look(self) -> None:
        first = self._steps - len(self._waiting)
        names = list(self._waiting[0][1])
        # One transfer from the device for all steps and figures.
        values = torch.stack(
            [torch.stack([step[name].float() for name in names]) for _, step in self._waiting]
        )
        for offset, ((n, _), row) in enumerate(zip(self._waiting, values.tolist(), strict=True)):
            self._refuse_no_number(row[names.index("loss")], first + offset)
            self.n += n
            for name, value in zip(names, row, strict=True):
                weight = 1 if name in self._counted else n
                self._sums[name] = self._sums.get(name, 0.0) + weight * value
        self._waiting.clear()

    def _refuse_no_number(self, loss: float, step: int) -> None:
        if math.isfinite(loss):
            return
        place = f"in epoch {self._epoch + 1}, step {step + 1}"
        if self._user is not None:
            raise UserCodeError(f"the loss that {self._user} computes became {loss} {place}")
        raise DivergedError(
            f"the loss became {loss} {place}; a smaller --lr, a warm-up or --clip-norm may help"
        )
