"""Whether a written model's error is rounding: what each output of the model itself does under small changes.

A judge gets a batch and the outputs whose error exceeds the tolerance, and returns those it cannot excuse.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.networks import device_of, in_mode
from cctool.base.outputs import differences, named_tensors
from cctool.formats.tally import ChoiceTally, OutputTally
from cctool.quantization.export.noise import shaken

AGREED = 0.99
"""Required share of equal choices."""

_ROUNDING_FACTOR = 4.0  # allowed error over the model's own, or over the movement of its outputs
_SHAKES = 8  # perturbations that the movement of outputs is measured over
_STEP_SHARE = 1 / 32  # of a quantizer's step, its largest perturbation
_SHAKEN_FACTOR = 2.0  # allowed error over the movement under such perturbations
_UNLIKELY = 0.05  # significance level of the test for AGREED
_SIXTH_DIGIT = 1e-5  # of the inputs' spread
_FLOAT32 = 5e-7  # of the largest output, four roundings: no float32 program can be held to less

Run = Callable[[Tensor], list[Tensor]]
Judge = Callable[[Tensor, list[int]], list[int]]


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


def left_by(judge: Judge, failing: list[int], tallies: list[OutputTally]) -> list[int]:
    """The outputs that a judge does not let pass; it sees each batch once, with the outputs worst on it."""
    batches = {id(tallies[i].worst): tallies[i].worst for i in failing}
    return sorted(
        i
        for key, batch in batches.items()
        for i in judge(batch, [i for i in failing if id(tallies[i].worst) == key])
    )


def beyond_rounding(
    model: nn.Module, candidate: Run, largest: list[float], batch: Tensor, outputs: list[int]
) -> list[int]:
    """The outputs that are much farther from the model in float64 than the model in float32 is."""
    exact_model = copy.deepcopy(model).to("cpu", torch.float64)
    try:
        exact = runner_of(exact_model)(batch.detach().cpu().double())
    except Exception:  # a dtype written into the network's code: the error cannot be attributed to rounding
        return outputs
    expected, found = runner_of(model)(batch), candidate(batch.detach().cpu())
    left = []
    for i in outputs:
        if exact[i].shape != expected[i].shape:
            left.append(i)
            continue
        own, other = _distance(exact[i], expected[i]), _distance(exact[i], found[i])
        if other > max(_ROUNDING_FACTOR * own, _FLOAT32 * largest[i]):
            left.append(i)
    return left


def beyond_steps(model: nn.Module, candidate: Run, batch: Tensor, outputs: list[int]) -> list[int]:
    """The outputs whose error is much larger than the effect of changing inputs in their sixth digit."""
    reference, generator = runner_of(model), torch.Generator().manual_seed(0)
    expected, found = reference(batch), candidate(batch.detach().cpu())
    plain = batch.detach().cpu()
    moved = dict.fromkeys(outputs, 0.0)
    for _ in range(_SHAKES):
        noise = torch.randn(plain.shape, generator=generator).to(plain.dtype)
        shifted = reference(plain + _SIXTH_DIGIT * noise * plain.std())
        moved = {i: max(before, _rms(expected[i], shifted[i])) for i, before in moved.items()}
    return [i for i in outputs if _rms(expected[i], found[i]) > _ROUNDING_FACTOR * moved[i]]


def beyond_shakes(model: nn.Module, candidate: Run, batch: Tensor, outputs: list[int]) -> list[int]:
    """The outputs whose error is much larger than the effect of moving quantizers by a fraction of a step."""
    reference, generator = runner_of(model), torch.Generator().manual_seed(0)
    expected, found = reference(batch), candidate(batch.detach().cpu())
    moved = dict.fromkeys(outputs, 0.0)
    for _ in range(_SHAKES):
        with shaken(model, _STEP_SHARE, generator):
            shifted = reference(batch)
        moved = {i: max(before, _rms(expected[i], shifted[i])) for i, before in moved.items()}
    return [i for i in outputs if _rms(expected[i], found[i]) > _SHAKEN_FACTOR * moved[i]]


def undecided_choices(model: nn.Module, tally: ChoiceTally | None) -> int:
    """Number of differing choices that the model makes otherwise when quantizers are perturbed likewise."""
    if tally is None:
        return 0

    def changes(samples: Tensor, choose: Callable[[list[Tensor]], Tensor]) -> Tensor:
        reference, generator = runner_of(model), torch.Generator().manual_seed(0)
        chosen = choose(reference(samples))
        changed = torch.zeros_like(chosen, dtype=torch.bool)
        for _ in range(_SHAKES):
            with shaken(model, _STEP_SHARE, generator):
                changed |= choose(reference(samples)) != chosen
        return changed

    return tally.undecided(changes)


def too_many(different: int, n: int) -> bool:
    """Whether a program that chooses alike in 99 % of cases would hardly ever differ in so many of ``n``."""
    return different > 1 and _chance_of(different, n, 1 - AGREED) < _UNLIKELY


def _chance_of(least: int, n: int, share: float) -> float:
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


def _rms(left: Tensor, right: Tensor) -> float:
    if left.shape != right.shape:
        return math.inf
    apart = differences(left, right)
    return float(apart.square().mean().sqrt()) if apart.numel() else 0.0


def _distance(left: Tensor, right: Tensor) -> float:
    apart = differences(left, right)
    return float(apart.max()) if apart.numel() else 0.0
