"""Checks that a written model computes what the model computes.

Errors are measured relative to the range of the outputs over the inputs: an absolute error has no scale, and
relative to the outputs themselves, a common offset would hide errors. Two float32 programs for the same
function differ by rounding, which grows with depth and with badly scaled statistics. If the error exceeds the
tolerance, both are compared with the model in float64, from which the written one may be at most a few times
as far away as the model itself.

A network that rounds its activations (a codec of feature maps) turns a difference in the last digit into a
whole step; such steps are rare and large. Then the written model may be a few times as far from the model as
the model's outputs move when its inputs change in their sixth digit.

If quantizers round, an integer runtime rounds biases as well, to the step of the products. Then the written
model may be twice as far from the model as the model's outputs move when the inputs of each quantizer change
by up to 1/32 of its step. A sample whose class changes under that is undecided: the written model may choose
another class for it.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cctool.base.errors import ExportError
from cctool.base.networks import device_of, in_mode
from cctool.formats.records import Agreement
from cctool.quantization.export.noise import shaken

TOLERANCE = 1e-5
"""Allowed difference of two float32 programs, as a fraction of the output range; 1e-7 is usual."""

BATCH_SIZES = (1, 5)
"""Of the random inputs: one, and an odd number, so that no width written into a reshape divides it."""

_ROUNDS = 3  # random batches of each size
_ROUNDING_FACTOR = 4.0  # allowed error over the model's own, or over the movement of its outputs
_SHAKES = 8  # perturbations that the movement of outputs is measured over
_STEP_SHARE = 1 / 32  # of a quantizer's step, its largest perturbation
_SHAKEN_FACTOR = 2.0  # allowed error over the movement under such perturbations
_AGREED = 0.99  # required top-1 agreement
_UNLIKELY = 0.05  # significance level of the test for it
_SIXTH_DIGIT = 1e-5  # of the inputs' spread
_FLOAT32 = 5e-7  # of the largest output, four roundings: no float32 program can be held to less

Run = Callable[[Tensor], list[Tensor]]


def runner_of(model: nn.Module) -> Run:
    """A function that runs a model in evaluation mode and returns its output tensors, on the CPU, in order.

    TF32 is switched off while it runs: its mantissa of ten bits makes larger errors than those looked for.
    """
    device = device_of(model)

    def run(inputs: Tensor) -> list[Tensor]:
        with in_mode(model, training=False), _without_tf32():
            found = tree_leaves(model(inputs.to(device)))
        return [value.detach().cpu() for value in found if isinstance(value, Tensor)]

    return run


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    convolution, product = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolution.allow_tf32, product.allow_tf32
    convolution.allow_tf32 = product.allow_tf32 = False
    try:
        yield
    finally:
        convolution.allow_tf32, product.allow_tf32 = before


def random_batches(
    shape: tuple[int, ...], seed: int, sizes: tuple[int, ...] = BATCH_SIZES
) -> Iterator[Tensor]:
    """Standard normal inputs, three of each batch size; the same for the same seed, on every machine."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes * _ROUNDS:
        yield torch.randn((size, *shape), generator=generator)


class _Differences:
    """Errors, agreement and the range of each output over the batches so far."""

    def __init__(self) -> None:
        self.n = 0
        self.same = 0
        self.error = 0.0
        self.largest = 0.0
        self.different: list[Tensor] = []
        self._bounds: list[tuple[Tensor, Tensor]] = []

    def add(self, batch: Tensor, expected: list[Tensor], found: list[Tensor]) -> None:
        self.n += len(expected[0])
        same = _top1(expected[0]) == _top1(found[0])
        self.same += int(same.sum())
        self.different.append(batch.detach().cpu()[~same])
        bounds = []
        for left, right in zip(expected, found, strict=True):
            # Non-finite values count as equal: `_check_finite` has found them in the same places.
            left, right = left.double().nan_to_num(0, 0, 0), right.double().nan_to_num(0, 0, 0)
            self.error = max(self.error, float((left - right).abs().max()))
            self.largest = max(self.largest, float(left.abs().max()))
            bounds.append((left.amin(0), left.amax(0)))
        self._bounds = [
            (torch.minimum(low, old_low), torch.maximum(high, old_high))
            for (low, high), (old_low, old_high) in zip(bounds, self._bounds or bounds, strict=True)
        ]

    @property
    def range(self) -> float:
        return max(float((high - low).max()) for low, high in self._bounds)


def _top1(outputs: Tensor) -> Tensor:
    return outputs.flatten(1).argmax(1)


def compare(
    model: nn.Module,
    candidate: Run,
    batches: Iterable[Tensor],
    inputs: str,
    *,
    tolerance: float = TOLERANCE,
    allow_nonfinite: bool = False,
    coded: bool = False,
    quantized: bool = False,
) -> Agreement:
    """Compare a candidate's outputs with the model's.

    Args:
        model: the reference, on any device.
        candidate: gives its outputs for a batch on the CPU.
        batches: inputs [B, ...], on any device.
        inputs: description of the inputs, for the report.
        tolerance: allowed difference as a fraction of the output range.
        allow_nonfinite: whether outputs may be NaN or infinite, in the same places as the model's.
        coded: whether codecs round activations.
        quantized: whether quantizers round activations.

    Raises:
        ExportError: if shapes differ, values are not finite, or the error exceeds the tolerance.
    """
    reference = runner_of(model)
    tally, sizes, worst = _Differences(), set(), (-1.0, torch.empty(0))
    for batch in batches:
        expected, found = reference(batch), candidate(batch.detach().cpu())
        _check_shapes(expected, found, batch, inputs)
        _check_finite(expected, found, inputs, allow_nonfinite)
        before = tally.error
        tally.add(batch, expected, found)
        if tally.error > before or worst[0] < 0:
            worst = (tally.error, batch)
        sizes.add(len(batch))
    if not tally.n:
        raise ExportError(f"there are no inputs to compare on: {inputs}")
    agreement = Agreement(
        inputs=inputs,
        n=tally.n,
        batch_sizes=tuple(sorted(sizes)),
        max_abs_error=tally.error,
        output_range=tally.range,
        largest_output=tally.largest,
        top1_agreement=100 * tally.same / tally.n,
        tolerance=tolerance,
    )
    if tally.error <= tolerance * tally.range:
        return agreement
    if quantized and _is_shaken(model, candidate, worst[1]):
        undecided = _undecided(model, torch.cat(tally.different))
        return replace(agreement, judged_by_steps=True, undecided=undecided)
    if _is_rounding(model, candidate, worst[1], tally.largest):
        return replace(agreement, judged_in_float64=True)
    if coded and _is_steps(model, candidate, worst[1]):
        return replace(agreement, judged_by_steps=True)
    raise ExportError(
        f"the exported model does not compute what the model does: on {inputs} its outputs are off by up to "
        f"{tally.error:.3g}; {tolerance:.0e} of their range of {tally.range:.3g} is allowed; "
        f"top-1 agrees on {agreement.top1_agreement:.1f} % of {tally.n}"
    )


def _is_rounding(model: nn.Module, candidate: Run, batch: Tensor, largest: float) -> bool:
    """Whether the candidate is about as close to the model in float64 as the model in float32 is."""
    exact_model = copy.deepcopy(model).to("cpu", torch.float64)
    try:
        exact = runner_of(exact_model)(batch.detach().cpu().double())
    except (RuntimeError, TypeError):
        # Without a float64 reference, the error cannot be attributed to rounding.
        return False
    expected, found = runner_of(model)(batch), candidate(batch.detach().cpu())
    own, other = _distance(exact, expected), _distance(exact, found)
    return other <= max(_ROUNDING_FACTOR * own, _FLOAT32 * largest)


def _is_steps(model: nn.Module, candidate: Run, batch: Tensor) -> bool:
    """Whether the error is about as large as the effect of changing inputs in their sixth digit."""
    reference, generator = runner_of(model), torch.Generator().manual_seed(0)
    expected, found = reference(batch), candidate(batch.detach().cpu())
    plain = batch.detach().cpu()
    moved = 0.0
    for _ in range(_SHAKES):
        noise = torch.randn(plain.shape, generator=generator).to(plain.dtype)
        moved = max(moved, _rms(expected, reference(plain + _SIXTH_DIGIT * noise * plain.std())))
    return _rms(expected, found) <= _ROUNDING_FACTOR * moved


def _is_shaken(model: nn.Module, candidate: Run, batch: Tensor) -> bool:
    """Whether the error is about as large as the effect of perturbing quantizers by a fraction of a step."""
    reference, generator = runner_of(model), torch.Generator().manual_seed(0)
    expected, found = reference(batch), candidate(batch.detach().cpu())
    moved = 0.0
    for _ in range(_SHAKES):
        with shaken(model, _STEP_SHARE, generator):
            moved = max(moved, _rms(expected, reference(batch)))
    return _rms(expected, found) <= _SHAKEN_FACTOR * moved


def _undecided(model: nn.Module, samples: Tensor) -> int:
    """Number of samples for which the model's class changes when quantizers are perturbed likewise."""
    if not len(samples):
        return 0
    reference, generator = runner_of(model), torch.Generator().manual_seed(0)
    chosen = _top1(reference(samples)[0])
    changed = torch.zeros_like(chosen, dtype=torch.bool)
    for _ in range(_SHAKES):
        with shaken(model, _STEP_SHARE, generator):
            changed |= _top1(reference(samples)[0]) != chosen
    return int(changed.sum())


def require_top1(agreement: Agreement) -> None:
    """Refuse a written model whose top-1 agreement is significantly below 99 %, without undecided samples.

    It is refused if a model that agrees on 99 % of all inputs would differ on as many samples with a
    probability below 5 % (one-sided binomial test). One sample may always differ.

    Raises:
        ExportError: in that case.
    """
    different = round(agreement.n * (100 - agreement.top1_agreement) / 100) - agreement.undecided
    if different > 1 and _chance_of(different, agreement.n, 1 - _AGREED) < _UNLIKELY:
        raise ExportError(
            f"the exported model chooses another class than the model for {different} of {agreement.n} "
            f"inputs ({agreement.inputs}), {agreement.undecided} undecided ones apart: top-1 agreement "
            f"{agreement.top1_agreement:.2f} %, {100 * _AGREED:.0f} % is asked for"
        )


def _chance_of(least: int, n: int, share: float) -> float:
    """Probability of ``least`` or more successes in ``n`` trials of probability ``share``."""
    return 1 - sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(least))


def _rms(left: list[Tensor], right: list[Tensor]) -> float:
    return float(torch.cat([value.square().flatten() for value in _apart(left, right)]).mean().sqrt())


def _distance(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float(value.abs().max()) for value in _apart(left, right))


def _apart(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    """Differences in float64; 0 where a value is not finite."""
    return [(a.double() - b.double()).nan_to_num(0, 0, 0) for a, b in zip(left, right, strict=True)]


def _check_shapes(expected: list[Tensor], found: list[Tensor], batch: Tensor, inputs: str) -> None:
    left, right = [list(t.shape) for t in expected], [list(t.shape) for t in found]
    if left != right or not left:
        raise ExportError(
            f"the exported model puts out {right} for a batch of {len(batch)} ({inputs}), the model {left}"
        )


def _check_finite(expected: list[Tensor], found: list[Tensor], inputs: str, allowed: bool) -> None:
    for left, right in zip(expected, found, strict=True):
        if not left.is_floating_point():
            continue
        if not allowed and not bool(torch.isfinite(left).all()):
            raise ExportError(
                f"the model puts out NaN or infinities on {inputs}; `cctool analyze` lists weights that are "
                "not finite, --allow-nonfinite exports all the same"
            )
        if not torch.equal(torch.isfinite(left), torch.isfinite(right)):
            raise ExportError(
                f"the exported model puts out NaN or infinities where the model does not ({inputs})"
            )
