"""Whether the errors of a written model are rounding, judged at every place of every output.

A place is a channel or class (`tally.by_place`). Its error is the root mean square of the differences over
all samples, its signal the standard deviation of the model's values over the samples. Both are means, so
that another draw of samples gives the same verdict; docs/architecture.md says why a fault is larger.

- `quick`: the error is at most a share of the signal, or a few ulps of the channel's largest value.
- `in_float64`: two float32 programs for the same function differ by rounding, which grows with depth and with
  badly scaled statistics. Model and file are both compared with the model in float64.
- `by_steps`: a network that rounds turns a difference in the last digit into a whole step. The file is
  compared with the network that was converted, with the file's own constants, so that nothing but float32
  is left between them; what its biases and the runtime round moves the outputs no more than a thirty-second
  of a step does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cctool.formats.rounding import (
    COARSE,
    FINE,
    MOST,
    POOL,
    Counted,
    Run,
    Shake,
    exact_runner,
    shaken_outputs,
)
from cctool.formats.tally import OutputTally, squares

TOLERANCE = 5e-5
"""Allowed error of a float32 program, as a fraction of the signal; 1e-7 to 5e-6 is usual."""

SHARE = 1e-3
"""The same where activations are rounded."""

CERTAIN = 3.29
"""Standard errors between an error and its limit: one draw in a thousand is farther off."""

ULPS = 3.0
"""Allowed error in units of the last place of the largest value of the channel."""

_ULP = 2.0**-23  # of a number: at most this share; without the jumps at powers of two

LOST = 0.5
"""Error or limit over signal, from which on a comparison says little: a quarter of the variance."""

COMPARED_INTENDED = "the network with the file's constants"

_ROUNDING = 8.0  # allowed error over the model's own in float64
_STEPS = 4.0  # allowed error over the movement of outputs
_CLEAR = 2.0  # error over limit, or limit over error, from which on no more samples are looked at
_UNSTABLE = 1 / 2  # of the samples: those are left out at which the last digit makes the most of a step
_SPARED = 1 / 4  # of the others: their errors are left out, for not every step is foreseen
_RUNTIME = 0.02  # of the signal: error of a runtime's integer kernels that is let pass


@dataclass(frozen=True)
class Limit:
    """The place of an output that comes closest to its limit.

    Attributes:
        place: its index.
        error: its root mean square error.
        limit: what is allowed there.
        over: error / limit.
        source: what the limit follows from: tolerance, ulps, float64 or steps.
        signal: the standard deviation of the network's values there.
        dull: the places that do not depend on the inputs clearly more than their limits.
        sensitive: whether some place does.
        compared: what the file was compared with.
    """

    place: int
    error: float
    limit: float
    source: str
    signal: float
    sensitive: bool
    compared: str = "the network"
    dull: tuple[int, ...] = ()

    @property
    def over(self) -> float:
        """Error / limit."""
        return self.error / self.limit if self.limit else (torch.inf if self.error else 0.0)


def floor_of(tally: OutputTally, places: int) -> Tensor:
    """A few ulps of the largest value at each place, [places]."""
    found = tally.magnitudes
    return ULPS * _ULP * (found if len(found) == places else found.amax().expand(places))


def quick(tally: OutputTally, share: float) -> Limit:
    """Error and limit over all samples, against the network in its own precision."""
    errors = tally.errors.mean(0).sqrt()
    floor = floor_of(tally, len(errors))
    found = closest(errors, torch.maximum(share * tally.signals, floor), tally, "tolerance")
    return replace(found, source="ulps") if found.limit <= float(floor[found.place]) else found


def closest(
    errors: Tensor, limits: Tensor, tally: OutputTally, source: str, compared: str = "the network"
) -> Limit:
    """The place whose error is the largest for its limit; both [places]."""
    signals = _signals(tally, len(errors))
    place = int((errors / limits.clamp(min=1e-300)).nan_to_num(0, torch.inf).argmax())
    telling = (limits <= LOST * signals) & (signals > 0)
    dull = tuple((~telling).nonzero().flatten().tolist())
    values = (float(values[place]) for values in (errors, limits, signals))
    error, limit, signal = values
    return Limit(place, error, limit, source, signal, bool(telling.any()), compared, dull)


def _signals(tally: OutputTally, places: int) -> Tensor:
    """Signals at each place; where shapes changed, that of the whole output at all of them."""
    signals = tally.signals
    return signals if len(signals) == places else torch.full((places,), tally.signal, dtype=torch.float64)


def certain(tally: OutputTally, share: float) -> bool:
    """Whether another draw of as many samples would hardly give another verdict of `quick`."""
    found = quick(tally, share)
    errors = tally.errors[:, found.place] / max(found.limit, 1e-300) ** 2
    if len(errors) < 2 or not bool(errors.isfinite().all()):
        return bool(errors.isinf().any())
    off = float(errors.std()) / len(errors) ** 0.5
    return bool(abs(float(errors.mean()) - 1) >= CERTAIN * off)


def in_float64(
    model: nn.Module, network: Run, tallies: Sequence[OutputTally], failing: Iterable[int], drawn: Drawn
) -> dict[int, Limit]:  # fmt: skip
    """Errors of failing outputs against the model in float64; a few times the model's own are allowed.

    Without float64, because a dtype is written into the network's code, the model's own error is how far it
    moves when its inputs change by an ulp.
    """
    # One sample at a time: a network whose results depend on the batch size would hide behind its own error.
    samples, found = drawn.samples, drawn.found
    expected = Counted(network, single=True)(samples)
    compared = "the network in float64"
    try:
        exact = Counted(exact_runner(model), single=True)(samples)
        own = [expected]
    except Exception:  # a dtype written into the network's code
        exact, compared = expected, "the network"
        own = list(shaken_outputs(model, network, samples, Shake(0.0, 2.0**-23)))
    limits = {}
    for i in failing:
        if exact[i].shape != expected[i].shape:
            continue
        tally, n = tallies[i], len(samples)
        errors = squares(exact[i], found[i], n).mean(0).sqrt()
        ours = torch.stack([squares(exact[i], run[i], n).mean(0).sqrt() for run in own]).amax(0)
        floor = floor_of(tally, len(errors))
        # Where the inputs hardly matter, a place's own error is one draw: the others say what is usual.
        usual = _usual(ours, floor)
        allowed = _ROUNDING * torch.maximum(ours, usual)
        allowed = torch.stack((allowed, floor, TOLERANCE * _signals(tally, len(errors)))).amax(0)
        limits[i] = closest(errors, allowed, tally, "float64", compared)
    return limits


def _usual(values: Tensor, sizes: Tensor) -> Tensor:
    """What is usual at a place of its size: the median share, so that no single place decides for others."""
    known = sizes > 0
    if not bool(known.any()):
        return torch.zeros_like(values)
    return (values[known] / sizes[known]).median() * sizes


@dataclass(frozen=True)
class References:
    """What a file is compared with where the model in its own precision cannot decide.

    Attributes:
        intended: the network that was converted, with the constants that the file has after rounding; None
            if it is the model itself.
        as_written: the file without the runtime's optimizations; None if it has none.
    """

    intended: Run | None = None
    as_written: Run | None = None


def by_steps(
    model: nn.Module, network: Run, references: References,
    tallies: Sequence[OutputTally], failing: Sequence[int], drawn: Iterable[Drawn], *, coded: bool,
) -> dict[int, Limit]:  # fmt: skip
    """Errors of failing outputs of a network that rounds; what changes of the last digit cause is allowed.

    Args:
        model: the network, with quantizers or codecs.
        network: runs it.
        references: to compare with.
        tallies: of all outputs.
        failing: indices of outputs.
        drawn: samples, more and more of them; the next ones are looked at while the verdict is not clear.
        coded: whether codecs round.
    """
    limits: dict[int, Limit] = {}
    for part in drawn:
        steps = _Steps(model, network, references, tallies, part, coded)
        found = {i: parts for i, parts in steps.parts(failing).items() if parts}
        for i, parts in found.items():
            largest = max(parts, key=lambda one: one.over)
            limits[i] = parts[-1] if largest.over <= 1 else largest
        overs = [one.over for parts in found.values() for one in parts]
        if max(overs, default=0.0) >= _CLEAR or all(over <= 1 / _CLEAR for over in overs):
            break
    return limits


@dataclass(frozen=True)
class _Steps:
    """A network that rounds, its file, and samples to judge on; the fields are those of `by_steps`."""

    model: nn.Module
    network: Run
    references: References
    tallies: Sequence[OutputTally]
    drawn: Drawn
    coded: bool

    def parts(self, failing: Sequence[int]) -> dict[int, list[Limit]]:
        """What each failing output is held to; the last one is stated where all are kept."""
        samples, found, references = self.drawn.samples, self.drawn.found, self.references
        expected = self.network(samples)
        coarse = self._moved(expected, failing, COARSE)

        def whole(i: int, left: list[Tensor]) -> Limit:
            moved = _STEPS * coarse[i].mean(1).sqrt().amax(0)
            return _pooled(self.tallies[i], left[i], found[i], len(samples), moved)

        # The whole way from the network to the file's outputs, by all that rounds on it.
        parts = {i: [whole(i, expected)] for i in failing}
        if references.intended is None:
            return parts
        written = found if references.as_written is None else references.as_written(samples)
        wanted = references.intended(samples)
        fine = self._moved(expected, failing, FINE)
        for i in failing:
            if references.as_written is not None:
                parts[i].append(whole(i, written))
            parts[i].append(_exact(self.tallies[i], wanted[i], written[i], len(samples), fine[i].amax(0)))
        return parts

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


def _pooled(tally: OutputTally, left: Tensor, right: Tensor, n: int, moved: Tensor) -> Limit:
    """Error of a whole output; biases that are rounded shift single channels by more than noise does."""
    if left.shape != right.shape:
        return _other_shape(tally)
    error = squares(left, right, n).mean().sqrt().reshape(1)
    moved_by = float(moved.square().mean().sqrt())
    allowed = max(moved_by, _RUNTIME * tally.signal, ULPS * _ULP * tally.largest)
    return closest(error, torch.full_like(error, allowed), tally, "steps")


def _exact(tally: OutputTally, left: Tensor, right: Tensor, n: int, moved: Tensor) -> Limit:
    """Error at each place, over the samples at which rounding moves it the least.

    A step is rare but large: on most samples there is none, and what is not rounding moves these, too. So the
    other half is left out, and of the rest those with the largest errors.

    Args:
        tally: of the output.
        left: of the network with the file's constants.
        right: of the file.
        n: number of samples.
        moved: largest mean square movement, [samples, places].
    """
    if left.shape != right.shape:
        return _other_shape(tally)
    errors = squares(left, right, n)
    moved = moved.expand_as(errors)
    moved, order = moved.sort(dim=0, stable=True)
    kept = len(errors) - int(_UNSTABLE * len(errors))
    moved, errors = moved[:kept], errors.gather(0, order)[:kept]
    errors = errors.sort(0).values[: kept - int(_SPARED * kept)].mean(0).sqrt()
    moved, signals = _STEPS * moved.mean(0).sqrt(), _signals(tally, errors.shape[-1])
    # A place at which no step was seen takes the share of the others.
    usual = _usual(moved, signals)
    allowed = torch.stack((SHARE * signals, moved, usual, floor_of(tally, len(errors)))).amax(0)
    return closest(errors, allowed, tally, "steps", COMPARED_INTENDED)


def _other_shape(tally: OutputTally) -> Limit:
    return Limit(0, torch.inf, 0.0, "steps", tally.signal, False)


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
        if self._first is None or self._worst is None:
            self._first = drawn.part(torch.arange(len(batch))[:POOL])
            self._worst = drawn
        else:
            if not _fit(self._worst.found, drawn.found):
                drawn = Drawn(batch, [])
                self._first, self._worst = Drawn(self._first.samples, []), Drawn(self._worst.samples, [])
            room = POOL - len(self._first.samples)
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

    def _complete(self, drawn: Drawn) -> Drawn:
        return drawn if drawn.found else Drawn(drawn.samples, self._candidate(drawn.samples))


def _fit(left: list[Tensor], right: list[Tensor]) -> bool:
    shapes = [value.shape[1:] for value in left] == [value.shape[1:] for value in right]
    return bool(left) and bool(right) and shapes
