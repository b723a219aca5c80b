"""Is the cut network the masked one? Asked before every cut, on the model's own code.

Widths may be written into code: `x.view(-1, 512)` can even fold a wrong width into the batch without an
error. So the thinned model runs at two odd batch sizes, every output shape is compared with the dense
model's, and the numbers with those of the masked model. Scales and statistics of norms are varied at random
first: a fresh network's gammas of 0 and betas of 0 would hide mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isnan

import torch
from torch import Tensor, nn

from cctool.errors import PruningError
from cctool.graph.channels import ChannelGraph
from cctool.graph.execution import in_mode, tensors_in
from cctool.graph.ledger import Role
from cctool.pruning.selection import Selection
from cctool.pruning.surgery import CutPlan, copy_with, cut_tensor, masked_tensors, plan_cut

BATCH_SIZES = (3, 5)
"""Odd, so that a width cannot hide in them; more than 1, which a bare `squeeze()` in user code would drop."""
TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest output of the masked network."""
SPREAD_TOLERANCE = 1e-3
"""Largest difference allowed, relative to the spread of the outputs over a batch: one wrong channel among
thousands makes a hundredth, even where a bias dwarfs the signal and the relative error looks small."""


@dataclass(frozen=True)
class Check:
    """Outcome of one comparison.

    Attributes:
        error: largest difference between cut and masked, relative to the largest masked output.
        of_spread: the same relative to the spread of the masked network's outputs over a batch.
        precision: the dtype in which it was measured.
        failure: what went wrong, "" if nothing.
    """

    error: float
    of_spread: float
    precision: str
    failure: str


def probe_inputs(inputs: Sequence[Tensor], batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of the same kind with another batch size: normal noise, or the given whole numbers repeated."""
    generator = torch.Generator().manual_seed(seed + batch)
    made = []
    for value in inputs:
        if value.ndim == 0:
            made.append(value)
        elif value.is_floating_point():
            noise = torch.randn((batch, *value.shape[1:]), generator=generator)
            made.append(noise.to(value.device, value.dtype))
        else:
            made.append(value[:1].expand(batch, *value.shape[1:]))
    return tuple(made)


def varied_norms(tensors: Mapping[str, Tensor], graph: ChannelGraph, seed: int = 0) -> dict[str, Tensor]:
    """Random variations of gammas, betas and running statistics, so that none of them is neutral."""
    generator = torch.Generator().manual_seed(seed)
    varied: dict[str, Tensor] = {}
    roles = {p.tensor: p.role for f in graph.families for p in f.places}
    for name, tensor in tensors.items():
        # a head of zeros, as some networks start with, would make every output equal
        if tensor.ndim > 1 and tensor.is_floating_point() and not bool(tensor.any()):
            noise = torch.randn(tensor.shape, generator=generator)
            varied[name] = 0.1 * noise.to(tensor.device, tensor.dtype)
    for name, role in roles.items():
        if role not in (Role.SCALE, Role.SHIFT, Role.STATISTIC):
            continue
        tensor = tensors[name].detach()
        draw = torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        if role is Role.SHIFT or name.endswith("running_mean"):
            varied[name] = tensor + 0.2 * (draw - 0.5)
        else:
            varied[name] = torch.where(tensor == 0, 1, tensor) * (0.5 + draw)
    return varied


def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with in_mode(model, training=False):
        return [value.detach() for value in tensors_in(model(*inputs))]


def _compare(masked: list[Tensor], cut: list[Tensor], spreads: list[float]) -> tuple[float, float, str]:
    """Largest difference over the largest output and over the outputs' spread; what forbids to compare."""
    shapes, cut_shapes = [tuple(t.shape) for t in masked], [tuple(t.shape) for t in cut]
    if shapes != cut_shapes:
        return inf, inf, f"outputs of shape {cut_shapes}, not {shapes}: a width is written into code"
    error = of_spread = 0.0
    for a, b, spread in zip(masked, cut, spreads, strict=True):
        if a.is_floating_point() and a.numel():
            difference = float((a - b).abs().max())
            tiny = torch.finfo(a.dtype).tiny
            error = max(error, difference / max(float(a.abs().max()), tiny))
            of_spread = max(of_spread, difference / max(spread, tiny))
            if isnan(difference):
                return inf, inf, "outputs are not finite"
    return error, of_spread, ""


def _spread(value: Tensor) -> float:
    """How far an output is spread over the batch: a constant that dwarfs it must hide no mistake."""
    if not value.is_floating_point() or not value.numel() or not value.ndim:
        return 0.0
    resolution = 1e3 * torch.finfo(value.dtype).eps * float(value.abs().max())
    return max(float((value - value.mean(dim=0)).abs().max()), resolution)


@dataclass(frozen=True)
class _Trial:
    """One network, with norms varied, in one precision."""

    model: nn.Module
    tensors: Mapping[str, Tensor]
    changed: Mapping[str, Tensor]
    batches: Sequence[tuple[Tensor, ...]]

    def widened(self) -> _Trial:
        """The same in float64."""
        wide = {n: t.double() if t.is_floating_point() else t for n, t in self.tensors.items()}
        batches = [tuple(v.double() if v.is_floating_point() else v for v in b) for b in self.batches]
        return _Trial(self.model, wide, wide, batches)

    def masked_outputs(self, graph: ChannelGraph, selection: Selection) -> list[list[Tensor]]:
        masked = masked_tensors(self.tensors, graph, selection)
        network = copy_with(self.model, {**self.changed, **masked})
        return [_run(network, batch) for batch in self.batches]

    def compare(self, plan: CutPlan, expected: list[list[Tensor]]) -> Check:
        cut = {
            name: cut_tensor(self.tensors[name], cuts)
            for name, cuts in plan.tensors.items()
            if name in self.tensors
        }
        network = copy_with(self.model, {**self.changed, **cut}, plan)
        spreads, error, of_spread = [_spread(value) for value in expected[-1]], 0.0, 0.0
        dtype = str(expected[0][0].dtype).removeprefix("torch.")
        for batch, outputs in zip(self.batches, expected, strict=True):
            *differences, failure = _compare(outputs, _run(network, batch), spreads)
            error, of_spread = max(error, differences[0]), max(of_spread, differences[1])
            if failure:
                return Check(error, of_spread, dtype, failure)
        return Check(error, of_spread, dtype, "")


def check(
    model: nn.Module, graph: ChannelGraph, selection: Selection, plan: CutPlan, inputs: Sequence[Tensor]
) -> Check:
    """Compare cut and masked network in the model's precision, and in float64 if that cannot tell.

    Raises:
        PruningError: the model itself, merely masked, fails at one of the batch sizes.
    """
    tensors = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    varied = varied_norms(tensors, graph)
    batches = [probe_inputs(inputs, size) for size in BATCH_SIZES]
    trial = _Trial(model, {**tensors, **varied}, varied, batches)
    try:
        expected = trial.masked_outputs(graph, selection)
    except Exception as error:  # the user's code may fail in any way
        sizes = " and ".join(map(str, BATCH_SIZES))
        raise PruningError(f"the network does not run at batch sizes {sizes}: {_one_line(error)}") from error
    try:
        outcome = trial.compare(plan, expected)
    except Exception as error:  # code that holds widths may fail in any way
        return Check(inf, inf, "", f"the thinned network raises {_one_line(error)}")
    if outcome.failure or (outcome.error <= TOLERANCE and outcome.of_spread <= SPREAD_TOLERANCE):
        return outcome
    return _judge(_in_float64(trial, graph, selection, plan) or outcome)


def _in_float64(trial: _Trial, graph: ChannelGraph, selection: Selection, plan: CutPlan) -> Check | None:
    """The comparison in float64; None for a network whose code insists on another precision."""
    wide = trial.widened()
    try:
        return wide.compare(plan, wide.masked_outputs(graph, selection))
    except Exception:  # a dtype written into the user's code
        return None


def _judge(outcome: Check) -> Check:
    """Where float64 is not to be had, rounding errors of deep networks have to be let pass."""
    slack = 1 if outcome.precision == "float64" else 100
    if outcome.failure or (
        outcome.error <= slack * TOLERANCE and outcome.of_spread <= slack * SPREAD_TOLERANCE
    ):
        return outcome
    failure = f"cut and masked outputs differ by {outcome.of_spread:.2g} of their spread"
    return replace(outcome, failure=failure)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def blame(numbers: Sequence[int], test: Callable[[Sequence[int]], bool]) -> list[int]:
    """Families whose cut fails, found by bisection.

    Args:
        numbers: families whose joint cut fails.
        test: whether cutting just these families is exact.
    """
    if len(numbers) == 1:
        return list(numbers)
    half = len(numbers) // 2
    guilty = [n for part in (numbers[:half], numbers[half:]) if not test(part) for n in blame(part, test)]
    if guilty:
        return guilty
    # each half passes, together they fail: add one family after the other
    passing = list(numbers[:half])
    for number in numbers[half:]:
        if test([*passing, number]):
            passing.append(number)
        else:
            guilty.append(number)
    return guilty


def only(selection: Selection, numbers: Sequence[int]) -> Selection:
    """The same selection for some families, all units kept in the others."""
    chosen = set(numbers)
    kept = tuple(m if n in chosen else torch.ones_like(m) for n, m in enumerate(selection.kept))
    return Selection(kept, selection.spared)


def find_culprits(
    model: nn.Module, graph: ChannelGraph, selection: Selection, inputs: Sequence[Tensor]
) -> dict[int, str]:
    """Families that cannot be cut as selected, with what goes wrong when each is cut alone."""

    def outcome(numbers: Sequence[int]) -> Check:
        part = only(selection, numbers)
        return check(model, graph, part, plan_cut(model, graph, part), inputs)

    cut = [n for n, kept in enumerate(selection.kept) if not bool(kept.all())]
    guilty = blame(cut, lambda numbers: not outcome(numbers).failure)
    return {n: outcome([n]).failure or "fails together with another family" for n in guilty}
