"""Samples that references are run on: the first ones, and those with the largest errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cctool.formats.verdict.rounding import MOST, POOL, SMALL, Run


@dataclass(frozen=True)
class Drawn:
    """Samples, and what the file made of them in the batches in which they came.

    Attributes:
        samples: [N, ...], on the CPU.
        found: the file's outputs.
    """

    samples: Tensor
    found: list[Tensor]

    def part(self, which: Tensor) -> Drawn:
        """Some of the samples: indices or bool [N]."""
        return Drawn(self.samples[which], [value[which] for value in self.found])

    def joined(self, other: Drawn) -> Drawn:
        """These samples and then others."""
        both = zip(self.found, other.found, strict=True)
        return Drawn(torch.cat((self.samples, other.samples)), [torch.cat(pair) for pair in both])


class Chosen:
    """The samples that references are run on: the first ones, and those with the largest errors.

    Where an output has no row for each sample, or rows of several lengths, the file is run again.

    Args:
        candidate: runs the file.
    """

    def __init__(self, candidate: Run) -> None:
        self._candidate = candidate
        self._first: Drawn | None = None
        self._worst: Drawn | None = None
        self._errors = torch.empty(0, dtype=torch.float64)

    def add(self, batch: Tensor, errors: Tensor, found: list[Tensor]) -> None:
        """Take in a batch, the error of each sample [samples], and the file's outputs."""
        rows = all(value.dim() and len(value) == len(batch) for value in found)
        drawn = Drawn(batch, found if rows else [])
        most = POOL if math.prod(batch.shape[-2:]) <= SMALL else MOST
        if self._first is None or self._worst is None:
            self._first = drawn.part(torch.arange(len(batch))[:most])
            self._worst = drawn
        else:
            if not _fit(self._worst.found, drawn.found):
                drawn = Drawn(batch, [])
                self._first, self._worst = Drawn(self._first.samples, []), Drawn(self._worst.samples, [])
            room = most - len(self._first.samples)
            if room > 0:
                self._first = self._first.joined(drawn.part(torch.arange(len(batch))[:room]))
            self._worst = self._worst.joined(drawn)
        both = torch.cat((self._errors, errors))
        order = both.argsort(descending=True)[: MOST // 2]
        self._worst, self._errors = self._worst.part(order), both[order]

    def first(self, counts: Sequence[int]) -> Iterator[Drawn]:
        """The first samples, so many of them and then more, as far as there are any."""
        assert self._first is not None, "samples were added"
        there = len(self._first.samples)
        for count in sorted({min(count, there) for count in counts}):
            yield self._complete(self._first.part(torch.arange(count)))

    def first_and_worst(self) -> Drawn:
        """As many of the first ones as of the worst."""
        assert self._first is not None, "samples were added"
        assert self._worst is not None, "samples were added"
        half = torch.arange(len(self._first.samples))[: MOST // 2]
        return self._complete(self._first.part(half).joined(self._worst))

    def all_kept(self) -> Drawn:
        """All first ones and the worst."""
        assert self._first is not None, "samples were added"
        assert self._worst is not None, "samples were added"
        seen = [bool((self._first.samples == one).flatten(1).all(1).any()) for one in self._worst.samples]
        return self._complete(self._first.joined(self._worst.part(~torch.tensor(seen))))

    def _complete(self, drawn: Drawn) -> Drawn:
        return drawn if drawn.found else Drawn(drawn.samples, self._candidate(drawn.samples))


def _fit(left: list[Tensor], right: list[Tensor]) -> bool:
    shapes = [value.shape[1:] for value in left] == [value.shape[1:] for value in right]
    return bool(left) and bool(right) and shapes
