"""Checks before every cut that the cut network computes what the masked one does, by running the model.

All outputs are compared by name: numbers by their largest difference, whole numbers and truth values by the
share that differs. Widths may be written into code: `x.view(-1, 512)` can even fold a wrong width into the
batch without an error. So the cut model runs at two odd batch sizes. All output shapes are compared with the
dense model's, and at the first size the numbers are compared with the masked model's. Scales and statistics
of norms are varied at random before, because gammas and betas of 0, as in a new network, would hide mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isinf

import torch
from torch import Tensor, nn

from cctool.base.detectors import before_boxes
from cctool.base.errors import PruningError
from cctool.base.outputs import as_numbers, differences, is_measured, other_inputs, varying_shapes
from cctool.graph.execution import with_tensors
from cctool.graph.ledger import Role
from cctool.graph.records import ChannelGraph, Statistic
from cctool.pruning.cut.masked_network import MaskedCalls, active_statistics, run
from cctool.pruning.cut.surgery import CutPlan, copy_with, cut_tensor, plan_cut
from cctool.pruning.select.order import Selection

BATCH_SIZES = (3, 5)
"""Odd, so that no width divides them; more than 1, which a bare `squeeze()` in user code would drop."""
TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest output of the masked network."""
SPREAD_TOLERANCE = 1e-3
"""Largest difference allowed, relative to the spread of the outputs over a batch. One wrong channel among
thousands makes about 0.01, also where a large bias makes the error relative to the outputs small."""
TIES = 1.0
"""Percent of an output's whole numbers (classes, indices) that may differ, as they flip on ties."""


@dataclass(frozen=True)
class OutputCheck:
    """Comparison of one output of the cut and the masked network.

    Attributes:
        name: of the output.
        elements: number of elements that were compared.
        different: percent of them that differ, for whole numbers and truth values; else None.
        not_compared: why nothing of it was compared; "" if it was.
    """

    name: str
    elements: int
    different: float | None = None
    not_compared: str = ""


@dataclass(frozen=True)
class Check:
    """Result of one comparison.

    Attributes:
        error: largest difference between cut and masked, relative to the largest value of its output.
        of_spread: the same relative to the spread of the masked network's output over a batch.
        precision: the dtype of the comparison.
        failure: what went wrong, "" if nothing.
        statistics: calls that the masked network computed over the kept channels only.
        outputs: every output by itself.
    """

    error: float
    of_spread: float
    precision: str
    failure: str
    statistics: tuple[Statistic, ...] = ()
    outputs: tuple[OutputCheck, ...] = ()

    @property
    def different(self) -> OutputCheck | None:
        """The output of whole numbers that differs most; None if none differs."""
        found = [output for output in self.outputs if output.different]
        return max(found, key=lambda output: output.different or 0.0, default=None)

    @property
    def too_different(self) -> bool:
        """Whether more whole numbers differ than ties explain."""
        worst = self.different
        return worst is not None and (worst.different or 0.0) > TIES


def probe_inputs(inputs: Sequence[Tensor], batch: int) -> tuple[Tensor, ...]:
    """Inputs of another batch size: normal noise if floating-point, otherwise the first sample repeated."""
    generator = torch.Generator().manual_seed(batch)

    def made(value: Tensor) -> Tensor:
        if value.ndim == 0:
            return value
        if value.is_floating_point():
            noise = torch.randn((batch, *value.shape[1:]), generator=generator)
            return noise.to(value.device, value.dtype)
        return value[:1].expand(batch, *value.shape[1:])

    return tuple(with_tensors(value, made) for value in inputs)


def varied_norms(tensors: Mapping[str, Tensor], graph: ChannelGraph) -> dict[str, Tensor]:
    """Random variations of scales, shifts, biases and running statistics, so that none is 0 or 1 any more.

    Args:
        tensors: parameters and buffers by name.
        graph: the channels that they belong to.
    """
    generator = torch.Generator().manual_seed(0)
    varied: dict[str, Tensor] = {}
    roles = {p.tensor: p.role for f in graph.families for p in f.places}
    for name, tensor in tensors.items():
        # Some networks start with a head of zeros, which would make every output equal.
        if tensor.ndim > 1 and tensor.is_floating_point() and not bool(tensor.any()):
            noise = torch.randn(tensor.shape, generator=generator)
            varied[name] = 0.1 * noise.to(tensor.device, tensor.dtype)
    for name, role in roles.items():
        if role not in _VARIED or not tensors[name].is_floating_point():
            continue
        tensor = tensors[name].detach()
        draw = torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        if role is Role.SHIFT or name.endswith("running_mean"):
            varied[name] = tensor + 0.2 * (draw - 0.5)
        elif role is Role.STATISTIC:
            varied[name] = torch.where(tensor == 0, 1, tensor) * (0.5 + draw)
        elif role is Role.SCALE:
            # Kept away from 0: in a deep network small gammas let the signal vanish, and mistakes with it.
            grown = torch.where(tensor < 0, tensor.clamp(max=-0.5), tensor.clamp(min=0.5))
            varied[name] = grown * (0.5 + draw)
        elif role is not Role.ELEMENT:
            varied[name] = torch.where(tensor == 0, 0.2 * (draw - 0.5), tensor * (0.5 + draw))
        elif float(tensor.abs().max()) < _TOO_SMALL:
            varied[name] = 0.5 + draw
    return varied


_VARIED = frozenset({Role.SCALE, Role.SHIFT, Role.STATISTIC, Role.NORM, Role.BIAS, Role.ELEMENT})
_TOO_SMALL = 1e-2  # layer scales often start below this, which hides what their blocks compute


Shapes = list[tuple[int, ...]]
Named = Mapping[str, Tensor]


def _to_meta(value: Tensor) -> Tensor:
    return value.to("meta")


def _shapes(outputs: Named) -> Shapes:
    return [tuple(value.shape) for value in outputs.values()]


def _shapes_at(outputs: Named, batch: int, other: int) -> Shapes:
    """The shapes that outputs should have at another batch size, if their first dim is the batch."""
    return [(other, *shape[1:]) if shape[:1] == (batch,) else shape for shape in _shapes(outputs)]


def _wrong_shapes(cut: Shapes, expected: Shapes) -> str:
    return f"outputs of shape {cut}, not {expected}: a width is written into code"


def _same_shapes(left: Named, right: Named, depending: Callable[[], set[str]]) -> bool:
    """Whether the shapes are equal, but for those that depend on the data; `depending` is rarely called."""
    if _shapes(left) == _shapes(right):
        return True
    if list(left) != list(right):
        return False
    return {name for name in left if left[name].shape != right[name].shape} <= depending()


def compare_outputs(masked: Named, cut: Named, depending: Callable[[], set[str]] = set) -> Check:
    """Largest difference, relative to the largest output and to the spread; or why they do not compare.

    Args:
        masked: the expected outputs by name.
        cut: those to compare.
        depending: gives the names of outputs whose shapes depend on the data; called where shapes differ.
    """
    dtype = str(next(iter(masked.values())).dtype).removeprefix("torch.") if masked else ""
    if not _same_shapes(masked, cut, depending):
        return Check(inf, inf, dtype, _wrong_shapes(_shapes(cut), _shapes(masked)))
    error = of_spread = 0.0
    outputs = []
    for name, a in masked.items():
        b = cut[name]
        outputs.append(_compared(name, a, b))
        if outputs[-1].not_compared or not is_measured(a):
            continue
        difference = float(differences(a, b).max())
        tiny = torch.finfo(a.dtype).tiny
        error = max(error, difference / max(_largest(a), tiny))
        of_spread = max(of_spread, difference / max(_spread(a), tiny))
    measured = [output for output in outputs if is_measured(masked[output.name]) and output.elements]
    if isinf(error) or (measured and all(output.not_compared for output in measured)):
        return Check(inf, inf, dtype, "outputs are not finite", outputs=tuple(outputs))
    return Check(error, of_spread, dtype, "", outputs=tuple(outputs))


def _compared(name: str, masked: Tensor, cut: Tensor) -> OutputCheck:
    if masked.shape != cut.shape:
        return OutputCheck(name, 0, not_compared="its shape depends on the data and differs")
    count = masked.numel()
    if not count:
        return OutputCheck(name, 0, not_compared="it has no elements on random inputs")
    if not is_measured(masked):
        return OutputCheck(name, count, 100 * int((masked != cut).sum()) / count)
    nothing = bool((~masked.isfinite() & ~cut.isfinite()).all())
    return OutputCheck(name, count, not_compared="it holds nothing but NaN and infinities" if nothing else "")


def _largest(value: Tensor) -> float:
    return float(as_numbers(value).nan_to_num(0, 0, 0).abs().max())


def _spread(value: Tensor) -> float:
    """Largest deviation of an output from its mean over the batch, which a constant offset does not hide."""
    if not is_measured(value) or not value.numel() or not value.ndim:
        return 0.0
    numbers = value if bool(value.isfinite().all()) else value.nan_to_num(0, 0, 0)
    return max(float((numbers - numbers.mean(dim=0)).abs().max()), _resolution(value))


def _resolution(value: Tensor) -> float:
    steps = 1e5 if value.dtype == torch.float64 else 1e3  # float32 below this is repeated in float64
    return steps * torch.finfo(value.dtype).eps * _largest(value)


def _drowned(value: Tensor) -> bool:
    """Whether an offset is so large that rounding hides the effect of the inputs."""
    counts = is_measured(value) and value.ndim > 0 and value.numel() > 0
    return counts and _spread(value) <= _resolution(value)


class CutComparison:
    """Comparisons of cut and masked networks of one model, on inputs like the given ones.

    Args:
        model: the dense model; it is run, but not changed.
        graph: its coupled channels.
        inputs: positional arguments of its forward, on its device.

    Attributes:
        statistics: calls that the last masked network computed over the kept channels, where that matters.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, inputs: Sequence[Tensor]) -> None:
        self.model, self.graph = model, graph
        self.tensors = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self.varied = varied_norms(self.tensors, graph)
        self.batches = [probe_inputs(inputs, size) for size in BATCH_SIZES]
        self.statistics: tuple[Statistic, ...] = ()

    def depending(self, batch: int) -> set[str]:
        """Names of the model's outputs whose shapes depend on the data, at the first or second batch size."""
        inputs = self.batches[batch]
        changed = zip(*(other_inputs(v) if v.is_floating_point() else [v] * 4 for v in inputs), strict=True)
        return varying_shapes([run(self.model, values) for values in changed])

    def masked_outputs(self, selection: Selection, wide: bool = False) -> dict[str, Tensor]:
        """Outputs of the masked network, with statistics over the kept channels."""
        calls = MaskedCalls(self.model, self.graph, selection, self.varied, wide)
        outputs = run(self.model, self.batches[0], calls)
        active = active_statistics(self.graph, selection)
        self.statistics = tuple(s for s in active if all(s is not other for other in calls.without_effect))
        return outputs

    def cut_network(self, plan: CutPlan, device: str | None = None) -> nn.Module:
        """The cut network; tensors that are not cut are shared, unless it is on another device."""
        tensors = {**self.tensors, **self.varied}
        if device is not None:
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        changed = tensors if device is not None else dict(self.varied)
        cut = {name: cut_tensor(tensors[name], to) for name, to in plan.tensors.items() if name in tensors}
        return copy_with(self.model, changed | cut, plan)

    def shape_failure(self, plan: CutPlan, masked: Named) -> str:
        """What is wrong with the cut network's output shapes at the second batch size, "" if nothing.

        Shapes need no numbers, so it runs on the meta device; on the real one only if that is not conclusive.
        """
        shapes = _shapes_at(masked, *BATCH_SIZES)
        try:
            meta = with_tensors(self.batches[1], _to_meta)
            if _shapes(run(self.cut_network(plan, "meta"), meta)) == shapes:
                return ""
        except Exception:  # no kernel for the meta device, or code that reads values: run it on the real one
            pass
        try:
            cut = run(self.cut_network(plan), self.batches[1])
        except Exception as error:  # code that holds widths may fail in any way
            return f"the thinned network raises {_one_line(error)}"
        if _shapes(cut) == shapes:
            return ""
        dense = run(self.model, self.batches[1])
        same = _same_shapes(dense, cut, partial(self.depending, 1))
        return "" if same else _wrong_shapes(_shapes(cut), _shapes(dense))

    def compare(self, selection: Selection, plan: CutPlan) -> Check:
        """Compare outputs in the model's precision, and in float64 if that is not conclusive."""
        try:
            expected = self.masked_outputs(selection)
        except Exception as error:  # the user's code may fail in any way
            raise does_not_run(error) from error
        try:
            cut = self.cut_network(plan)
            actual = run(cut, self.batches[0])
        except Exception as error:  # code that holds widths may fail in any way
            return Check(inf, inf, "", f"the thinned network raises {_one_line(error)}")
        outcome = compare_outputs(expected, actual, partial(self.depending, 0))
        if outcome.failure:
            return outcome
        failure = self.shape_failure(plan, expected)
        if failure:
            return Check(inf, inf, outcome.precision, failure)
        clear = not any(map(_drowned, expected.values())) and outcome.different is None
        clear = clear and not any(output.not_compared for output in outcome.outputs)
        if clear and outcome.error <= TOLERANCE and outcome.of_spread <= SPREAD_TOLERANCE:
            return outcome
        # Freed first: with float64 copies, two networks may not fit in memory.
        del cut
        return _judge(self._wide(selection, plan) or outcome)

    def _wide(self, selection: Selection, plan: CutPlan) -> Check | None:
        """The comparison in float64; None for a network whose code requires another precision."""
        try:
            expected = self.masked_outputs(selection, wide=True)
            cut = self.cut_network(plan)
            actual = run(cut, self.batches[0], MaskedCalls(cut, wide=True))
            return compare_outputs(expected, actual, partial(self.depending, 0))
        except Exception:  # a dtype written into the user's code
            return None

    def raises(self, plan: CutPlan) -> str:
        """The error of the cut network on the meta device at either batch size, "" if there is none."""
        try:
            cut = self.cut_network(plan, "meta")
            for batch in self.batches:
                run(cut, with_tensors(batch, _to_meta))
        except Exception as error:  # code that holds widths may fail in any way
            return f"the thinned network raises {_one_line(error)}"
        return ""


def check(
    model: nn.Module, graph: ChannelGraph, selection: Selection, plan: CutPlan, inputs: Sequence[Tensor]
) -> Check:
    """Compare cut and masked network in the model's precision, and in float64 if that is not conclusive.

    Raises:
        PruningError: the masked model fails at one of the batch sizes.
    """
    with before_boxes(model):
        trial = CutComparison(model, graph, inputs)
        outcome = trial.compare(selection, plan)
    return replace(outcome, statistics=trial.statistics)


def does_not_run(error: Exception) -> PruningError:
    """The error of a network whose own code fails at one of the batch sizes of a comparison."""
    sizes = " and ".join(map(str, BATCH_SIZES))
    return PruningError(f"the network does not run at batch sizes {sizes}: {_one_line(error)}")


def _judge(outcome: Check) -> Check:
    """Judge a difference; without float64 a hundred times the tolerance, as rounding adds up with depth."""
    slack = 1 if outcome.precision == "float64" else 100
    worst = outcome.different
    if worst is not None and outcome.too_different and not outcome.failure:
        return replace(outcome, failure=f"{worst.different:.1f} % of the elements of {worst.name} differ")
    if outcome.failure or (
        outcome.error <= slack * TOLERANCE and outcome.of_spread <= slack * SPREAD_TOLERANCE
    ):
        return outcome
    failure = f"cut and masked outputs differ by {outcome.of_spread:.2g} of their spread"
    return replace(outcome, failure=failure)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def blame(numbers: Sequence[int], test: Callable[[Sequence[int]], bool]) -> list[int]:
    """Find the families whose cut fails, by bisection.

    Args:
        numbers: families whose joint cut fails.
        test: whether cutting only these families is exact.
    """
    if len(numbers) == 1:
        return list(numbers)
    half = len(numbers) // 2
    guilty = [n for part in (numbers[:half], numbers[half:]) if not test(part) for n in blame(part, test)]
    if guilty:
        return guilty
    # Each half passes, together they fail: add one family after the other.
    passing = list(numbers[:half])
    for number in numbers[half:]:
        if test([*passing, number]):
            passing.append(number)
        else:
            guilty.append(number)
    return guilty


def only(selection: Selection, numbers: Sequence[int]) -> Selection:
    """The same selection for these families, with all units of the others kept."""
    chosen = set(numbers)
    kept = tuple(m if n in chosen else torch.ones_like(m) for n, m in enumerate(selection.kept))
    return Selection(kept, selection.spared)


def find_culprits(
    model: nn.Module, graph: ChannelGraph, selection: Selection, inputs: Sequence[Tensor]
) -> dict[int, str]:
    """Families that cannot be cut as selected, with what fails when each is cut alone.

    If the cut network raises an error on the meta device, bisection runs there, which is fast; otherwise it
    compares numbers.
    """
    with before_boxes(model):
        return _culprits(model, graph, selection, inputs)


def _culprits(
    model: nn.Module, graph: ChannelGraph, selection: Selection, inputs: Sequence[Tensor]
) -> dict[int, str]:
    trial = CutComparison(model, graph, inputs)
    failures: dict[tuple[int, ...], str] = {}

    def failure(numbers: Sequence[int], test: Callable[[Selection, CutPlan], str]) -> str:
        key = tuple(sorted(numbers))
        if key not in failures:
            part = only(selection, numbers)
            failures[key] = test(part, plan_cut(model, graph, part))
        return failures[key]

    def raised(part: Selection, plan: CutPlan) -> str:
        return trial.raises(plan)

    cut = [n for n, kept in enumerate(selection.kept) if not bool(kept.all())]
    by_shapes = not trial.raises(plan_cut(model, graph, only(selection, []))) and failure(cut, raised)
    test = raised if by_shapes else lambda part, plan: trial.compare(part, plan).failure
    failures.clear()  # the two tests give different failures
    guilty = blame(cut, lambda numbers: not failure(numbers, test))
    return {n: failure([n], test) or "fails together with another family" for n in guilty}
