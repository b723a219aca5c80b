"""What rounding may do to a model's outputs: other precisions, and the model under small changes."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cctool.base.networks import device_of, in_mode
from cctool.base.outputs import named_tensors
from cctool.formats.tally import ChoiceTally
from cctool.quantization.export.noise import shaken
from cctool.quantization.export.onnx_operator import ON_GRID

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
    """

    def __init__(self, run: Run, *, single: bool = False) -> None:
        self._run, self.single, self.passes = run, single, 0

    def __call__(self, batch: Tensor) -> list[Tensor]:
        """Outputs for a batch, in order."""
        self.passes += len(batch)
        if not self.single or len(batch) == 1:
            return self._run(batch)
        parts = [self._run(batch[i : i + 1]) for i in range(len(batch))]
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

    Args:
        model: on any device.
        loosely: with sigmoids right to half a unit in the last place of 1. Runtimes compute them so,
            however small they are; those of torch in float32 are right to their own last place.
    """
    run = runner_of(copy.deepcopy(model).to("cpu", torch.float64))

    def exact(batch: Tensor) -> list[Tensor]:
        with _LooseSigmoids() if loosely else contextlib.nullcontext():
            return run(batch.detach().cpu().double())

    return exact


def exact_between_steps(model: nn.Module) -> Run:
    """As `exact_runner`, but it rounds as the model does where that is no matter of float32's own error.

    Sums that lie halfway between two levels are rounded otherwise by any other program. So what is left of
    the model's error is that of its sums and products. Sigmoids are loose.
    """
    own, exact = runner_of(model), exact_runner(model, loosely=True)

    def run(batch: Tensor) -> list[Tensor]:
        jumps = _Jumps()
        with jumps:
            own(batch)
        jumps.repeating = True
        with jumps:
            return exact(batch)

    return run


_aten, _ON_GRID = torch.ops.aten, ON_GRID.overloadpacket
_ROUNDING = {_aten.round, _aten.floor, _aten.ceil, _aten.trunc, _ON_GRID}
_ROUNDING |= {_aten.round_, _aten.floor_, _aten.ceil_, _aten.trunc_}
_SIGNS = {_aten.sign, _aten.sign_}


def _step(func: Any, args: Any) -> float:
    """Distance of two levels of an operation that rounds."""
    return float(args[1]) if func.overloadpacket is _ON_GRID else 1.0


class _Jumps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what operations put out that jump, then lets them put it out again, in the same order.

    These are the ones that round, and all that make integers or truth values of floating-point numbers. A
    number that was rounded is rounded anew where it is another one than before, by more than `FINE` allows.

    Attributes:
        repeating: whether results are those that were kept.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.repeating = False
        self._kept: list[tuple[Tensor | None, Tensor]] = []
        self._at = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        floats = any(value.is_floating_point() for value in args if isinstance(value, Tensor))
        rounds = func.overloadpacket in _ROUNDING
        before = args[0].detach().clone() if rounds else None
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if not isinstance(value, Tensor) or not floats:
                continue
            if value.is_floating_point() and not rounds and func.overloadpacket not in _SIGNS:
                continue
            if not self.repeating:
                self._kept.append((before, value.detach().clone()))
                continue
            known, kept = self._kept[self._at]
            self._at += 1
            if before is None or known is None:
                value.copy_(kept)
            else:
                near = (before - known).abs() <= FINE.steps * _step(func, args)
                value.copy_(torch.where(near, kept.to(value.dtype), value))
        return found


class _LooseSigmoids(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds noise to sigmoids, the same at every use."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factor = args[0].clone() if func.overloadpacket in (_aten.silu, _aten.silu_) else 1.0
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (_aten.sigmoid, _aten.sigmoid_, _aten.silu, _aten.silu_):
            noise = torch.rand(found.shape, generator=self._generator, dtype=found.dtype) * 2 - 1
            found.add_(noise * 2.0**-24 * factor)
        return found


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
        with _ShakenRoundings(share, generator):
            yield run(samples)


class _ShakenRoundings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds noise to numbers before they are rounded."""

    def __init__(self, share: float, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._share, self._generator = share, generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _ROUNDING:
            x = args[0]
            noise = torch.rand(x.shape, generator=self._generator, dtype=x.dtype) * 2 - 1
            noise *= self._share * _step(func, args)
            # An operation in place changes the tensor that it is given.
            args = (x.add_(noise) if func._schema.is_mutable else x + noise, *args[1:])
        return func(*args, **(kwargs or {}))


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
