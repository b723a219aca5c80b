"""Is the cut network the masked one? Asked before every cut, on the model's own code.

Widths may be written into code: `x.view(-1, 512)` can even fold a wrong width into the batch without an
error. So the thinned model runs at two odd batch sizes, every output shape is compared with the dense
model's, and the numbers with those of the masked model. Scales and statistics of norms are varied at random
first: a fresh network's gammas of 0 and betas of 0 would hide mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cctool.graph.channels import ChannelGraph
from cctool.graph.execution import in_mode, tensors_in
from cctool.graph.ledger import Role
from cctool.pruning.selection import Selection
from cctool.pruning.surgery import CutPlan, copy_with, cut_tensor, masked_tensors, plan_cut

BATCH_SIZES = (1, 3)
TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest output of the masked network."""


@dataclass(frozen=True)
class Check:
    """Outcome of one comparison.

    Attributes:
        error: largest difference between cut and masked, relative to the largest masked output.
        precision: the dtype in which it was measured.
        failure: what went wrong, "" if nothing.
    """

    error: float
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


def _compare(masked: list[Tensor], cut: list[Tensor]) -> tuple[float, str]:
    shapes, cut_shapes = [tuple(t.shape) for t in masked], [tuple(t.shape) for t in cut]
    if shapes != cut_shapes:
        return float("inf"), f"outputs of shape {cut_shapes}, not {shapes}: a width is written into code"
    error = 0.0
    for a, b in zip(masked, cut, strict=True):
        if a.is_floating_point() and a.numel():
            scale = float(a.abs().max().clamp_min(torch.finfo(a.dtype).tiny))
            error = max(error, float((a - b).abs().max()) / scale)
    if error != error:
        return float("inf"), "outputs are not finite"
    return error, ""


def check(
    model: nn.Module, graph: ChannelGraph, selection: Selection, plan: CutPlan, inputs: Sequence[Tensor]
) -> Check:
    """Compare cut and masked network in the model's precision, and in float64 if that cannot tell."""
    tensors = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    varied = varied_norms(tensors, graph)
    try:
        outcome = _check(model, {**tensors, **varied}, varied, graph, selection, plan, inputs)
        if outcome.failure or outcome.error <= TOLERANCE:
            return outcome
        wide = {n: t.double() if t.is_floating_point() else t for n, t in {**tensors, **varied}.items()}
        wide_inputs = [value.double() if value.is_floating_point() else value for value in inputs]
        return _check(model, wide, wide, graph, selection, plan, wide_inputs)
    except Exception as error:  # the user's code may fail on other widths in any way
        text = (str(error).splitlines() or [""])[0]
        return Check(float("inf"), "", f"the thinned network raises {type(error).__name__}: {text}")


def _check(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    graph: ChannelGraph,
    selection: Selection,
    plan: CutPlan,
    inputs: Sequence[Tensor],
) -> Check:
    batches = [probe_inputs(inputs, size) for size in BATCH_SIZES]
    masked_model = copy_with(model, {**changed, **masked_tensors(tensors, graph, selection)})
    expected = [_run(masked_model, batch) for batch in batches]
    del masked_model
    cut = {name: cut_tensor(tensors[name], cuts) for name, cuts in plan.tensors.items() if name in tensors}
    cut_model = copy_with(model, {**changed, **cut}, plan)
    worst, dtype = 0.0, str(expected[0][0].dtype).removeprefix("torch.")
    for batch, outputs in zip(batches, expected, strict=True):
        error, failure = _compare(outputs, _run(cut_model, batch))
        worst = max(worst, error)
        if failure:
            return Check(worst, dtype, failure)
    limit = TOLERANCE if dtype != "float64" else TOLERANCE / 10
    if worst > limit and dtype == "float64":
        return Check(worst, dtype, f"cut and masked outputs differ by {worst:.2g} of the largest output")
    return Check(worst, dtype, "")


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
