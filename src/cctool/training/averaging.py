"""An exponential moving average of a network's weights (Polyak and Juditsky 1992; Izmailov et al. 2018).

After each step t, from 0, with d_t = min(d, (1 + t) / (10 + t)), which forgets the first weights sooner:

    average <- average + (1 - d_t) (weights - average)

Running statistics are averaged like weights; tensors that are not floating point are those of the last step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cctool.base.errors import CorruptCheckpointError

_PREFIX = "average/"
_STEPS = f"{_PREFIX}steps"


class WeightAverage:
    """The average of a network in training, which starts with its present weights and stays on its device.

    Args:
        model: the network.
        decay: d, in (0, 1): the average is over about 1 / (1 - d) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._model = model
        self._values = {name: value.clone() for name, value in self._tensors()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._model.state_dict().items():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield name, value

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights to the average, after a step."""
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, value in self._tensors():
            # As a step towards the weights: values that never change stay the same to the last bit.
            self._values[name].lerp_(value, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange weights and average while the block runs; changes made there belong to the average."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        seen = set()
        for name, value in self._tensors():
            average = self._values[name]
            # Tied tensors have equal averages, and exchanging them twice would undo the exchange.
            if value.data_ptr() in seen:
                continue
            seen.add(value.data_ptr())
            held = value.clone()
            value.copy_(average)
            average.copy_(held)

    def state(self) -> dict[str, Tensor]:
        """What resuming needs, on the CPU, with names that begin with ``average/``."""
        tensors = {f"{_PREFIX}{name}": value.detach().cpu().clone() for name, value in self._values.items()}
        return tensors | {_STEPS: torch.tensor(self.steps)}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            CorruptCheckpointError: if a tensor is missing or has another shape.
        """
        for name, value in self._values.items():
            stored = tensors.get(f"{_PREFIX}{name}")
            if stored is None or stored.shape != value.shape:
                raise CorruptCheckpointError(f"the resume state has no average of {name} of its shape")
            value.copy_(stored)
        steps = tensors.get(_STEPS)
        if steps is None or steps.dim() or steps.is_floating_point() or int(steps) < 0:
            raise CorruptCheckpointError("the resume state does not say how many steps were averaged")
        self.steps = int(steps)


def average_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averages among the tensors of a resume state, by the weights' names."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in tensors.items()
        if name.startswith(_PREFIX) and name != _STEPS
    }
