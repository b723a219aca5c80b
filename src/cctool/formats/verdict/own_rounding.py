"""What a network's own float32 makes of its outputs, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cctool.formats.verdict.rounding import FINE, MOST, Run, shaken_roundings
from cctool.formats.verdict.tally import by_place


@dataclass(frozen=True)
class References:
    """What a file is compared with where the model in its own precision cannot decide.

    Attributes:
        intended: the network that was converted, with the constants that the file has after rounding; None
            if it is the model itself.
        as_written: the file without the runtime's optimizations; None if it has none.
        exact: `intended` in float64; it may fail where a dtype is written into the network's code.
        between_steps: the same, with the steps that `intended` takes.
    """

    intended: Run | None = None
    as_written: Run | None = None
    exact: Run | None = None
    between_steps: Run | None = None


class OwnRounding:
    """What float32 makes of a network's own outputs, against float64; computed where it is asked for.

    Large terms that cancel leave few digits right, which neither a step nor the values' size shows.

    Args:
        references: the network in float64.
        samples: on the CPU.
        outputs: the network's, in its own precision.
        moved: mean square movements of an output by rounding, [trials, samples, places], by index.
    """

    def __init__(
        self, references: References, samples: Tensor, outputs: list[Tensor], moved: dict[int, Tensor]
    ) -> None:
        self._references, self._samples, self.outputs, self.moved = references, samples, outputs, moved
        self._shaken: list[list[Tensor]] | None = None
        self._found: dict[tuple[Run | None, tuple[int, ...]], list[Tensor]] = {}

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def of(self, index: int) -> Tensor:
        """Root mean square error of an output between its steps, [places] or [1]; 0 if it is not known."""
        first = torch.arange(min(self.n, MOST))
        exact = self._values(self._references.between_steps, index, first)
        if exact is None:
            return torch.zeros(1, dtype=torch.float64)
        return (exact - by_place(self.outputs[index], self.n)[first]).square().mean((0, 2)).sqrt()

    def moved_by_ties(self, index: int) -> tuple[Tensor, Tensor]:
        """How far each value of an output is moved at most by steps of sums that lie between two levels.

        Returns:
            Float64 [samples, places, values of each], and the root mean square at each place, [places].
        """
        assert self._references.intended is not None
        if self._shaken is None:
            shaken = shaken_roundings(self._references.intended, self._samples, FINE.steps)
            self._shaken = list(shaken)
        own = by_place(self.outputs[index], self.n)
        largest, squared = torch.zeros_like(own), torch.zeros_like(own[0, :, 0])
        for outputs in self._shaken:
            moved = by_place(outputs[index], self.n) - own
            largest = torch.maximum(largest, moved.abs())
            squared += moved.square().mean((0, 2)) / len(self._shaken)
        return largest, squared.sqrt()

    def exact(self, index: int, asked: Tensor) -> Tensor | None:
        """An output for some samples in float64, [asked, places, values of each]; None if it is not known."""
        return self._values(self._references.exact, index, asked)

    def _values(self, run: Run | None, index: int, asked: Tensor) -> Tensor | None:
        key = run, tuple(asked.tolist())
        if key not in self._found:
            self._found[key] = _tried(run, self._samples[asked])
        found, own = self._found[key], self.outputs[index]
        # An output that is no row for each sample cannot be compared on a few of them.
        if not found or len(own) != self.n or found[index].shape != own[asked].shape:
            return None
        return by_place(found[index], len(asked))


def _tried(run: Run | None, samples: Tensor) -> list[Tensor]:
    """Outputs; empty if they are not to be had, as where a dtype is written into the network's code."""
    try:
        return [] if run is None else run(samples)
    except Exception:
        return []
