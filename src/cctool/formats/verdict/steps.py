"""Verdicts on networks that round: a difference in the last digit becomes a whole step.

The file is compared with the network that was converted, with the file's own constants, so that nothing but
float32 is left between them; what its biases and the runtime round moves the outputs no more than a
thirty-second of a step does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from cctool.formats.verdict.limits import (
    COMPARED_INTENDED,
    ROUNDING,
    SHARE,
    Limit,
    closest,
    floor_of,
    largest_ulp,
    resolution,
    signals_at,
    usual,
)
from cctool.formats.verdict.own_rounding import OwnRounding, References
from cctool.formats.verdict.rare import Far
from cctool.formats.verdict.rounding import (
    COARSE,
    FINE,
    MOST,
    SMALL,
    Run,
    Shake,
    shaken_outputs,
    shaken_roundings,
)
from cctool.formats.verdict.samples import Drawn
from cctool.formats.verdict.tally import OutputTally, by_place, squares

_STEPS = 4.0  # allowed error over the movement of outputs
_CLEAR = 2.0  # error over limit, or limit over error, from which on no more samples are looked at
_UNSTABLE = 1 / 2  # of the samples: those are left out at which the last digit makes the most of a step
_SPARED = 1 / 4  # of the others: their errors are left out, for not every step is foreseen
_SPARED_NORMAL = 1.65  # root mean square of normal errors over that of their smaller three quarters
_QUIET = 0.1  # of the values at a place, which tell if no step of sums between two levels moves them
_TIES = 1.8  # allowed error over what such steps make, where there are fewer: both are draws of them
_NEAR = 1 / 64  # of the deviation of inputs: less than a step of 8 bits, and 1e5 ulps
_RUNTIME = 0.02  # of the signal: error of a runtime's integer kernels that is let pass


def by_steps(
    model: nn.Module, network: Run, file: Run, references: References,
    tallies: Sequence[OutputTally], failing: Sequence[int], drawn: Iterable[Drawn],
    *, everything: Callable[[], Drawn], coded: bool,
) -> dict[int, Limit]:  # fmt: skip
    """Errors of failing outputs of a network that rounds; what changes of the last digit cause is allowed.

    Args:
        model: the network, with quantizers or codecs.
        network: runs it.
        file: runs the file.
        references: to compare with.
        tallies: of all outputs.
        failing: indices of outputs.
        drawn: samples, more and more of them; the next ones are looked at while the verdict is not clear.
        everything: gives all samples there are to look at, those with the largest errors among them.
        coded: whether codecs round.
    """
    limits: dict[int, Limit] = {}
    allowed: dict[int, Tensor] = {}
    for part in drawn:
        steps = _Steps(model, network, file, references, tallies, part, coded)
        found = {i: parts for i, parts in steps.parts(failing, allowed).items() if parts}
        for i, parts in found.items():
            largest = max(parts, key=lambda one: one.over)
            limits[i] = parts[-1] if largest.over <= 1 else largest
        overs = [one.over for parts in found.values() for one in parts]
        if all(over <= 1 / _CLEAR for over in overs) or max(overs, default=0.0) >= _CLEAR:
            break
    kept = {i: allowed[i] for i, limit in limits.items() if limit.over <= 1 and i in allowed}
    if kept:
        limits |= _Steps(model, network, file, references, tallies, everything(), coded).rare_faults(kept)
    return limits


@dataclass(frozen=True)
class _Steps:
    """A network that rounds, its file, and samples to judge on; the fields are those of `by_steps`."""

    model: nn.Module
    network: Run
    file: Run
    references: References
    tallies: Sequence[OutputTally]
    drawn: Drawn
    coded: bool

    def parts(self, failing: Sequence[int], allowed: dict[int, Tensor]) -> dict[int, list[Limit]]:
        """What each failing output is held to; the last one is stated where all are kept.

        What each place may be off by is put into ``allowed``, by the index of the output.
        """
        samples, found, references = self.drawn.samples, self.drawn.found, self.references
        expected = self.network(samples)
        coarse = self._moved(expected, failing, COARSE)
        own: OwnRounding | None = None
        if references.intended is not None:
            wanted, fine = references.intended(samples), self._moved(expected, failing, FINE)
            own = OwnRounding(references, samples, wanted, fine)

        def whole(i: int, left: list[Tensor]) -> Limit:
            moved = _STEPS * coarse[i].mean(1).sqrt().amax(0)
            return _pooled(i, self.tallies[i], (left[i], found[i]), len(samples), moved, own)

        # The whole way from the network to the file's outputs, by all that rounds on it.
        parts = {i: [whole(i, expected)] for i in failing}
        if own is None:
            return parts
        written = found if references.as_written is None else references.as_written(samples)
        for i in failing:
            if references.as_written is not None:
                parts[i].append(whole(i, written))
            limit, allowed[i] = _by_place(i, self.tallies[i], written[i], own)
            parts[i].append(limit)
        return parts

    def rare_faults(self, allowed: dict[int, Tensor]) -> dict[int, Limit]:
        """The places of outputs at which few samples are farther off than steps explain.

        Args:
            allowed: by which each place may be off, [places], by the index of the output.
        """
        found: dict[int, Limit] = {}
        for i, limits in allowed.items():
            far = self._far(i, limits)
            fault = self._rare_fault(i, far)
            if fault is None and far is not None:
                # A step is left behind when the inputs change a little, a fault is not.
                around = _neighbours(self.drawn.samples[far.samples], self._few)
                near = replace(self, drawn=Drawn(around, []))
                fault = near._rare_fault(i, near._far(i, limits))
            found |= {} if fault is None else {i: fault}
        return found

    @property
    def _few(self) -> int:
        """Samples that are run many times; large ones take long."""
        return MOST if math.prod(self.drawn.samples.shape[-2:]) <= SMALL else MOST // 2

    @cached_property
    def _both(self) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of the network with the file's constants, and of the file."""
        samples, references = self.drawn.samples, self.references
        assert references.intended is not None
        if references.as_written is not None:
            return references.intended(samples), references.as_written(samples)
        return references.intended(samples), self.drawn.found or self.file(samples)

    def _far(self, index: int, allowed: Tensor) -> Far | None:
        """The samples at which an output is far off; None if there are none."""
        wanted, written = (outputs[index] for outputs in self._both)
        n = len(self.drawn.samples)
        if wanted.shape != written.shape or len(wanted) != n:
            return None
        far = Far(squares(wanted, written, n).sqrt(), allowed, 2 * self._few)
        return far if far.errors.shape[1] == len(allowed) and len(far.samples) else None

    def _own_rounding(self, index: int, which: Tensor) -> OwnRounding:
        """That of some of the samples at an output; others may have no row for each sample."""
        there = [one[which] if i == index else one for i, one in enumerate(self._both[0])]
        return OwnRounding(self.references, self.drawn.samples[which], there, {})

    def _rare_fault(self, index: int, far: Far | None) -> Limit | None:
        """The fault of an output that the samples which are far off show; None if steps explain them."""
        run = self.references.intended
        if far is None or run is None:
            return None
        # Float32 alone may be that far off, as where a sigmoid is near 0.
        alone = ROUNDING * self._own_rounding(index, far.samples).of(index)
        far = replace(far, allowed=torch.maximum(far.allowed, alone))
        if not len(far.samples):
            return None
        tally, samples = self.tallies[index], self.drawn.samples[far.samples]
        own = self._own_rounding(index, far.samples)
        shaken = shaken_roundings(run, samples, FINE.steps)
        fine = [squares(own.outputs[index], one[index], len(samples)) for one in shaken]
        # Some of the others, too: few samples say little of how far steps go.
        some = replace(self, drawn=Drawn(torch.cat((samples, self.drawn.samples[: self._few])), []))
        coarse = some._moved(self.network(some.drawn.samples), [index], COARSE)[index]
        if coarse.shape[2:] != fine[0].shape[1:]:
            return None
        signals, floor = signals_at(tally, len(far.allowed)), floor_of(tally, len(far.allowed))
        most = _STEPS * coarse.amax((0, 1)).sqrt()
        limits = torch.stack((usual(most, signals), _RUNTIME * signals, floor)).amax(0)

        def sides(asked: Tensor, place: int) -> Tensor | None:
            values = own.exact(index, asked)
            if values is None:
                return None
            mine = by_place(own.outputs[index], own.n)[asked, place]
            return (values[:, place] - mine).square().mean(1).sqrt()

        fault = far.fault(torch.stack(fine).sqrt(), coarse.sqrt(), limits, sides)
        if fault is None:
            return None
        place, error = fault
        limit, signal = float(far.allowed[place]), float(signals[place])
        return Limit(place, error, limit, "steps", signal, True, COMPARED_INTENDED)

    def _moved(self, expected: list[Tensor], outputs: Sequence[int], shake: Shake) -> dict[int, Tensor]:
        """Mean square movement of each output, [changes, samples, places]."""
        shake = shake if self.coded else Shake(shake.steps, 0.0)
        samples = self.drawn.samples
        moved: dict[int, list[Tensor]] = {i: [] for i in outputs}
        for shifted in shaken_outputs(self.model, self.network, samples, shake):
            for i in outputs:
                if shifted[i].shape == expected[i].shape:
                    moved[i].append(squares(expected[i], shifted[i], len(samples)))
        none = torch.zeros(1, 1, 1, dtype=torch.float64)
        return {i: torch.stack(found) if found else none for i, found in moved.items()}


def _pooled(
    index: int, tally: OutputTally, outputs: tuple[Tensor, Tensor], n: int, moved: Tensor,
    own: OwnRounding | None,
) -> Limit:  # fmt: skip
    """Error of a whole output; biases that are rounded shift single channels by more than noise does."""
    left, right = outputs
    if left.shape != right.shape:
        return _other_shape(tally)
    error = squares(left, right, n).mean().sqrt().reshape(1)
    moved_by = float(moved.square().mean().sqrt())
    allowed = torch.tensor([max(moved_by, _RUNTIME * tally.signal, largest_ulp(tally))], dtype=torch.float64)
    limit = closest(error, allowed, tally, "steps")
    if limit.over <= 1 or own is None:
        return limit
    exact = torch.maximum(allowed, ROUNDING * own.of(index).square().mean().sqrt().reshape(1))
    return closest(error, exact, tally, "float64")


def _by_place(index: int, tally: OutputTally, written: Tensor, own: OwnRounding) -> tuple[Limit, Tensor]:
    """Error at each place, of the network with the file's constants and of the file; what each may be."""
    wanted, moved = own.outputs[index], own.moved[index]
    if wanted.shape != written.shape:
        return _other_shape(tally), torch.zeros(0)
    found = squares(wanted, written, own.n)
    stable = _Stable(moved.amax(0), found.shape)
    errors, signals = stable.error(found), signals_at(tally, found.shape[-1])
    by_steps, floor = _STEPS * stable.moved, floor_of(tally, len(errors))
    # A place at which no step was seen takes the share of the others.
    least = resolution(tally, len(errors))
    allowed = torch.stack((SHARE * signals, by_steps, usual(by_steps, signals), least)).amax(0)
    limit = closest(errors, allowed, tally, "steps", COMPARED_INTENDED)
    if limit.over > 1:
        rounding = own.of(index).expand_as(floor)
        allowed = torch.maximum(allowed, ROUNDING * torch.maximum(rounding, usual(rounding, floor)))
        limit = closest(errors, allowed, tally, "float64", COMPARED_INTENDED)
    if limit.over > 1:
        errors, allowed = besides_ties(index, written, own, allowed)
        limit = closest(errors, allowed, tally, "steps", COMPARED_INTENDED)
    return limit, allowed


def besides_ties(index: int, written: Tensor, own: OwnRounding, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Error at each place, and what it may be, where sums lie halfway between two levels; both [places].

    Biases that are rounded to the steps of products put them there, and any two programs then step at others
    of them. So the error is that of the values that such steps do not move, or of all, if these are few; then
    it may be what such steps make.
    """
    errors = (by_place(own.outputs[index], own.n) - by_place(written, own.n)).abs()
    moved, usual_size = own.moved_by_ties(index)
    quiet = (moved <= allowed[:, None]).transpose(0, 1).flatten(1)
    squared = errors.square().transpose(0, 1).flatten(1)
    counts = quiet.sum(1)
    kept = (counts - (_SPARED * counts).long()).clamp(min=1)
    sums = torch.where(quiet, squared, torch.inf).sort(1).values.nan_to_num(posinf=0.0).cumsum(1)
    calm = _SPARED_NORMAL * (sums.gather(1, kept[:, None] - 1)[:, 0] / kept).sqrt()
    enough = counts >= _QUIET * quiet.shape[1]
    return (
        torch.where(enough, calm, squared.mean(1).sqrt()),
        torch.where(enough, allowed, torch.maximum(allowed, _TIES * usual_size)),
    )


def _other_shape(tally: OutputTally) -> Limit:
    return Limit(0, torch.inf, 0.0, "steps", tally.signal, False)


def _neighbours(samples: Tensor, count: int) -> Tensor:
    """So many inputs that hardly differ from the samples, from each in turn."""
    few = samples[torch.arange(count) % len(samples)]
    noise = torch.randn(few.shape, generator=torch.Generator().manual_seed(0)).to(few.dtype)
    return few + _NEAR * few.std() * noise


class _Stable:
    """The samples at which rounding moves an output the least, at each place.

    A step is rare but large: on most samples there is none, and what is not rounding moves these, too. So the
    other half is left out, and of the rest those with the largest errors.

    Args:
        moved: largest mean square movement, [samples, places].
        shape: of the errors, to which it is expanded.
    """

    def __init__(self, moved: Tensor, shape: torch.Size) -> None:
        moved, self._order = moved.expand(shape).sort(dim=0, stable=True)
        self._kept = len(moved) - int(_UNSTABLE * len(moved))
        self.moved = moved[: self._kept].mean(0).sqrt()

    def error(self, errors: Tensor) -> Tensor:
        """Root mean square of mean square errors [samples, places] over these samples, [places].

        It is that of all of them if they are normal.
        """
        errors = errors.gather(0, self._order)[: self._kept]
        spared = int(_SPARED * self._kept)
        found = errors.sort(0).values[: self._kept - spared].mean(0).sqrt()
        return _SPARED_NORMAL * found if spared else found
