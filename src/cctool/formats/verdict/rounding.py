"""What rounding may do to a model's outputs: other precisions, and the model under small changes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.networks import copied, device_of, in_mode
from cctool.base.outputs import named_tensors
from cctool.formats.verdict.modes import Jumps, LooseSigmoids, Otherwise, ShakenRoundings, doubled
from cctool.formats.verdict.tally import ChoiceTally
from cctool.quantization.export.noise import shaken

AGREED = 0.99
"""Required share of equal choices."""

MOST = 16
"""Samples that references are run on."""

POOL = 16 * MOST
"""Samples of small inputs that are kept, to look for faults that few of them show."""

SMALL = 64 * 64
"""Pixels of small inputs, on which many passes take little time."""

SHAKES = 8
"""Perturbations that the movement of outputs is measured over."""

_UNLIKELY = 0.05  # significance level of the test for AGREED

Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Shake:
    """Small changes that no float32 program and no integer runtime can be held to.

    Attributes:
        steps: largest change before each quantizer rounds, as a fraction of its step.
        inputs: standard deviation of the change of inputs, as a fraction of theirs.
    """

    steps: float
    inputs: float


COARSE = Shake(1 / 32, 1e-5)
"""What an integer runtime does: it rounds biases to the step of the products, too."""

FINE = Shake(2.0**-16, 1e-6)
"""What float32 does: values of up to 255 steps are right to 1e-7 of their size before they are rounded."""


class Counted:
    """A program whose forward passes of one sample are counted.

    Args:
        run: the program.
        single: whether it gets one sample at a time.

    Attributes:
        failed: why it could not be run, the last time that it could not.
    """

    def __init__(self, run: Run, *, single: bool = False) -> None:
        self._run, self.single, self.passes, self.failed = run, single, 0, ""

    def __call__(self, batch: Tensor) -> list[Tensor]:
        """Outputs for a batch, in order."""
        self.passes += len(batch)
        try:
            if not self.single or len(batch) == 1:
                return self._run(batch)
            parts = [self._run(batch[i : i + 1]) for i in range(len(batch))]
        except Exception as error:
            self.failed = f"{type(error).__name__}: {error}".splitlines()[0]
            raise
        return [torch.cat(pieces) if pieces[0].dim() else pieces[0] for pieces in zip(*parts, strict=True)]


def runner_of(model: nn.Module) -> Run:
    """A function that runs a model in evaluation mode and returns its output tensors, on the CPU, in order.

    The order is that of `named_tensors`.

    TF32 is switched off while it runs: its mantissa of ten bits makes larger errors than those looked for.
    """

    def run(inputs: Tensor) -> list[Tensor]:
        return [value.detach().cpu() for value in named_tensors(returned(model, inputs)).values()]

    return run


def returned(model: nn.Module, inputs: Tensor) -> Any:
    """What a model returns in evaluation mode, as it returns it."""
    with in_mode(model, training=False), _without_tf32():
        return model(inputs.to(device_of(model)))


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    convolution, product = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolution.allow_tf32, product.allow_tf32
    convolution.allow_tf32 = product.allow_tf32 = False
    try:
        yield
    finally:
        convolution.allow_tf32, product.allow_tf32 = before


def exact_runner(model: nn.Module, *, loosely: bool = False) -> Run:
    """A function that runs a copy of a model in float64, on the CPU; the outputs have float64.

    Where the network's code asks for float32, it gets float64, too.

    Args:
        model: on any device.
        loosely: with sigmoids right to half a unit in the last place of 1. Runtimes compute them so,
            however small they are; those of torch in float32 are right to their own last place.
    """
    run = runner_of(copied(model).to("cpu", torch.float64))

    def loose() -> Otherwise:
        return Otherwise(LooseSigmoids())

    def exact(batch: Tensor) -> list[Tensor]:
        with _default(torch.float64), Otherwise(doubled), loose() if loosely else contextlib.nullcontext():
            return run(batch.detach().cpu().double())

    return exact


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """The type of new tensors whose type is not said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def exact_between_steps(model: nn.Module) -> Run:
    """As `exact_runner`, but it rounds as the model does where that is no matter of float32's own error.

    Sums that lie halfway between two levels are rounded otherwise by any other program. So what is left of
    the model's error is that of its sums and products. Sigmoids are loose. A number that is another one than
    before by more than `FINE` allows is rounded anew.
    """
    own, exact = runner_of(model), exact_runner(model, loosely=True)

    def run(batch: Tensor) -> list[Tensor]:
        jumps = Jumps(FINE.steps)
        with Otherwise(jumps):
            own(batch)
        jumps.repeating = True
        with Otherwise(jumps):
            return exact(batch)

    return run


def shaken_outputs(model: nn.Module, run: Run, samples: Tensor, shake: Shake) -> Iterator[list[Tensor]]:
    """Outputs of a model under `SHAKES` random changes, the same ones at every call.

    Args:
        model: whose quantizers are disturbed.
        run: runs it.
        samples: on the CPU.
        shake: the size of the changes.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(SHAKES):
        noise = torch.randn(samples.shape, generator=generator).to(samples.dtype)
        moved = samples + shake.inputs * noise * samples.std() if shake.inputs else samples
        with shaken(model, shake.steps, generator):
            yield run(moved)


def shaken_roundings(run: Run, samples: Tensor, share: float) -> Iterator[list[Tensor]]:
    """Outputs of a program under `SHAKES` random changes of whatever it rounds, the same ones at every call.

    Args:
        run: calls torch functions.
        samples: on the CPU.
        share: largest change, as a fraction of a step.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(SHAKES):
        with Otherwise(ShakenRoundings(share, generator)):
            yield run(samples)


def undecided_choices(
    tally: ChoiceTally | None,
    references: Callable[[Tensor], Iterator[list[Tensor]]],
    as_written: Run | None = None,
) -> int:
    """Number of differing choices that are no fault of the file.

    Those are the ones that the model makes otherwise under small changes, and those that the file makes as
    the model does where the runtime does not optimize it: there only the rounding of integer kernels differs.

    Args:
        tally: the choices; None counts as none.
        references: gives the model's outputs for samples first, then its outputs under each change.
        as_written: runs the file without the runtime's optimizations; None if there are none.
    """
    if tally is None:
        return 0

    def changes(samples: Tensor, choose: Callable[[list[Tensor]], Tensor]) -> Tensor:
        runs = references(samples)
        chosen = choose(next(runs))
        changed = torch.zeros_like(chosen, dtype=torch.bool)
        for outputs in runs:
            changed |= choose(outputs) != chosen
        if as_written is not None:
            changed |= choose(as_written(samples)) == chosen
        return changed

    return tally.undecided(changes, MOST)


def choices_settled(tally: ChoiceTally | None) -> bool:
    """Whether no more choices differ than may differ anyway; otherwise more samples tell."""
    return tally is None or tally.different <= tally.n * (1 - AGREED)


def too_many(different: int, n: int) -> bool:
    """Whether a program that chooses alike in 99 % of cases would hardly ever differ in so many of ``n``."""
    return different > 1 and chance_of(different, n, 1 - AGREED) < _UNLIKELY


def chance_of(least: int, n: int, share: float) -> float:
    """Probability of ``least`` or more successes in ``n`` trials of probability ``share``."""
    if least > n * share + 10 * math.sqrt(n * share) + 10:
        # Ten standard deviations; the sum below would round to no more than this.
        return 0.0
    logs = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        + k * math.log(share) + (n - k) * math.log1p(-share)
        for k in range(least)
    )  # fmt: skip
    return 1 - math.fsum(map(math.exp, logs))
