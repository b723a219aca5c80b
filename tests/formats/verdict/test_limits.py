"""What the verdict on a written model rests on: channels, ulps, float64, steps, what cannot be verified."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import verdict_toys as toys
from cctool.base.errors import ExportError
from cctool.base.runtime import Silent
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec
from cctool.formats import pt2
from cctool.formats.converting import agreements_with
from cctool.formats.onnx.write import write_onnx
from cctool.formats.records import Agreement, ExportRequest, Samples
from cctool.formats.verdict.compare import compare, growing_batches, least_of, require_agreement
from cctool.formats.verdict.limits import quick
from cctool.formats.verdict.own_rounding import OwnRounding, References
from cctool.formats.verdict.rounding import Run, Shake, exact_between_steps, exact_runner, runner_of
from cctool.formats.verdict.steps import besides_ties
from cctool.formats.verdict.tally import OutputTally
from cctool.quantization.export.network import other_constants

SHAPE = (3, 8, 8)


class Scores(nn.Module):
    """Ten scores: an offset, and what a linear layer makes of the input."""

    def __init__(self, signal: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.signal, self.offset = nn.Linear(192, 10), signal, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.signal * self.linear(x.flatten(1)) + self.offset


def inputs(count: int = 64) -> list[Tensor]:
    return list(torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1)).split(16))


def request(model: nn.Module, path: Path, shape: tuple[int, int, int] = SHAPE) -> ExportRequest:
    return ExportRequest(
        Checkpoint(model.eval(), ModelSpec(architecture="a.py:a", input_shape=shape)), path, shape
    )


def ulp(value: float) -> float:
    return float(torch.nextafter(torch.tensor(value), torch.tensor(torch.inf)) - torch.tensor(value))


@pytest.mark.parametrize(("ulps", "accepted"), [(2, True), (40, False)])
def test_outputs_that_hardly_vary_are_judged_in_ulps(ulps: int, accepted: bool) -> None:
    model = Scores(signal=1e-7, offset=0.25)

    def candidate(batch: Tensor) -> list[Tensor]:
        signs = torch.ones(10)
        signs[::2] = -1
        return [output + ulps * ulp(0.25) * signs for output in runner_of(model)(batch)]

    if not accepted:
        with pytest.raises(ExportError, match="off by up to"):
            compare(model, candidate, inputs(), "noise")
        return
    found = compare(model, candidate, inputs(), "noise")
    # Two ulps are more than 1e-5 of the range, and less than what any float32 program may be off by.
    assert found.max_abs_error > 0.1 * found.output_range
    assert found.outputs[0].limit_from == "ulps"
    assert found.outputs[0].insensitive == "it depends on the inputs hardly more than on rounding"


def test_a_channel_of_small_values_is_judged_by_its_own_signal() -> None:
    class Mixed(Scores):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.tensor([1e3] + [1e-2] * 9)

    model = Mixed()

    def candidate(batch: Tensor) -> list[Tensor]:
        (found,) = runner_of(model)(batch)
        found[:, 4] += 5e-4
        return [found]

    with pytest.raises(ExportError, match=r"at channel 4 by 0\.0005"):
        compare(model, candidate, inputs(), "noise")


def test_a_verdict_does_not_hang_on_one_sample() -> None:
    model = Scores()

    def candidate(batch: Tensor) -> list[Tensor]:
        (found,) = runner_of(model)(batch)
        # Ten times the share of the signal that is allowed, on one sample of 256.
        found[batch[:, 0, 0, 0] == inputs(256)[3][2, 0, 0, 0]] += 10 * 5e-5 * 0.5
        return [found]

    found = compare(model, candidate, inputs(256), "noise")
    assert found.outputs[0].limit_from == "tolerance"
    assert found.max_abs_error > 1e-4


def test_inputs_are_drawn_until_the_verdict_is_certain() -> None:
    assert (least_of((3, 64, 64)), least_of((3, 65, 64))) == (256, 32)
    model = Scores()
    sizes = [len(batch) for batch in growing_batches(SHAPE, 0, free_batch=True)]
    assert sizes[:6] == [1, 5] * 3
    assert (sum(sizes[:7]), sum(sizes)) == (256, 1024)
    assert {len(batch) for batch in growing_batches(SHAPE, 0, free_batch=False)} == {1}
    same = compare(model, runner_of(model), growing_batches(SHAPE, 0, free_batch=True), "noise", least=256)
    assert same.n == 256

    def borderline(batch: Tensor) -> list[Tensor]:
        (found,) = runner_of(model)(batch)
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(len(batch)))
        return [found + 5e-5 * found.std() * noise]

    with pytest.raises(ExportError, match="off by up to"):
        compare(model, borderline, growing_batches(SHAPE, 0, free_batch=True), "noise", least=256)


def test_forward_passes_are_counted() -> None:
    model = Scores()
    found = compare(model, runner_of(model), inputs(), "noise")
    assert dict(found.forward_passes) == {"network": 64, "file": 64, "references": 0}


def test_constant_outputs_are_compared_but_never_verified(tmp_path: Path) -> None:
    written = write_onnx(request(Scores(signal=0.0, offset=1.0), tmp_path / "a.onnx"))
    assert written.verified == "compared but not verified: of output, it is the same for all of these inputs"
    again = pt2.write_pt2(request(Scores(signal=0.0, offset=1.0), tmp_path / "a.pt2"))
    assert again.verified == written.verified
    assert write_onnx(request(Scores(), tmp_path / "b.onnx")).verified == "verified"


def test_a_program_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = pt2._read_back

    def swapped(path: Path) -> object:
        run = read(path)
        return lambda batch: [value[:, [1, 0, *range(2, 10)]] for value in run(batch)]

    monkeypatch.setattr(pt2, "_read_back", swapped)
    with pytest.raises(ExportError, match="does not compute what the model does"):
        pt2.write_pt2(request(Scores(), tmp_path / "a.pt2"))
    assert not list(tmp_path.iterdir())


class Rounded(nn.Module):
    """Scores of inputs that are rounded to steps of 1/8."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.body, self.shift = Scores(), shift

    def forward(self, x: Tensor) -> Tensor:
        return self.body((8 * x + self.shift).round() / 8)


def test_a_file_is_compared_with_the_network_that_has_its_constants() -> None:
    """The file rounds other values up than the network does; what was converted rounds the same ones."""
    model, intended = Rounded(), runner_of(Rounded(0.01))
    references = References(intended, intended)
    found = compare(model, intended, inputs(), "noise", quantized=True, references=references)
    assert found.judged_by_steps
    assert found.outputs[0].compared_with == "the network with the file's constants"

    def faulty(batch: Tensor) -> list[Tensor]:
        # Less than what rounding other values moves, but of one channel alone, and always.
        return [output + 4e-3 * output.std() * (torch.arange(10) == 3) for output in intended(batch)]

    with pytest.raises(ExportError, match="at channel 3"):
        compare(model, faulty, inputs(), "noise", quantized=True, references=References(intended, faulty))


def test_one_step_in_one_draw_hides_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    model, intended = Rounded(), runner_of(Rounded(0.01))

    def shaken(model: nn.Module, run: Run, samples: Tensor, shake: Shake) -> Iterator[list[Tensor]]:
        for draw in range(8):
            (moved,) = run(samples)
            # The only step that is seen moves one sample by half of the signal.
            moved[5] += 0.3 * (draw == 2)
            yield [moved]

    monkeypatch.setattr("cctool.formats.verdict.steps.shaken_outputs", shaken)

    def faulty(batch: Tensor) -> list[Tensor]:
        return [output + 0.1 * output.std() * (torch.arange(10) == 3) for output in intended(batch)]

    def stepping(batch: Tensor) -> list[Tensor]:
        (found,) = intended(batch)
        found[::8] += 0.3
        return [found]

    references = References(intended, stepping)
    assert compare(model, intended, inputs(), "noise", quantized=True, references=references).judged_by_steps
    with pytest.raises(ExportError, match="at channel 3"):
        compare(model, intended, inputs(), "noise", quantized=True, references=References(intended, faulty))


class Cancelling(Rounded):
    """Scores that are what is left of terms ten thousand times as large, added in one order or the other."""

    def __init__(self, shift: float = 0.0, *, reverse: bool = False) -> None:
        super().__init__(shift)
        self.reverse = reverse
        terms = torch.randn(10, 32, generator=torch.Generator().manual_seed(2))
        self.register_buffer("terms", 300 * torch.cat((terms, -terms[:, torch.randperm(32)]), 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = 1e-3 * super().forward(x).unsqueeze(2) + self.terms
        total = torch.zeros_like(parts[..., 0])
        for i in reversed(range(64)) if self.reverse else range(64):
            total = total + parts[..., i]
        return total


@pytest.mark.parametrize("fault", [0.0, 0.5])
def test_large_terms_that_cancel_are_judged_in_float64_where_a_network_rounds(fault: float) -> None:
    """The file adds them in the other order: its error is that of float32, which no step explains."""
    model, intended, other = Cancelling(), Cancelling(0.01), Cancelling(0.01, reverse=True)

    def file(batch: Tensor) -> list[Tensor]:
        return [output + fault * output.std() * (torch.arange(10) == 3) for output in runner_of(other)(batch)]

    exact = exact_runner(intended), exact_between_steps(intended)
    references = References(runner_of(intended), file, *exact)
    if fault:
        with pytest.raises(ExportError, match="at channel 3"):
            compare(model, file, inputs(), "noise", quantized=True, references=references)
        return
    found = compare(model, file, inputs(), "noise", quantized=True, references=references)
    assert found.judged_in_float64
    assert found.outputs[0].compared_with == "the network with the file's constants"
    without = replace(references, between_steps=None)
    with pytest.raises(ExportError, match="at channel"):
        # Float32 alone cannot tell.
        compare(model, file, inputs(), "noise", quantized=True, references=without)


def test_float64_takes_the_steps_of_the_network_where_its_own_error_is_asked_for() -> None:
    """Halfway between two levels float64 takes the other one: that is no error of sums and products."""

    class Halfway(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tenths = (x.flatten(1)[:, :10] * 100).round() / 100
            levels = (tenths / 0.02).round() * 0.02  # an odd number of hundredths lies halfway
            return levels.cumsum(1).clamp(min=-2)

    model, batch = Halfway(), torch.cat(inputs())
    own, exact, steps = (
        run(batch)[0].double() for run in (runner_of(model), exact_runner(model), exact_between_steps(model))
    )
    assert float((own - exact).abs().max()) > 0.01
    assert float((own - steps).abs().max()) < 1e-5


class Between(nn.Module):
    """Hundredths, rounded to fiftieths, so half of them lie between two levels; or scores of these."""

    def __init__(self, nudge: float = 0.0, bias: float = 0.0, *, mixed: bool) -> None:
        super().__init__()
        self.body = Scores() if mixed else nn.Identity()
        self.nudge, self.bias, self.mixed = nudge, bias, mixed

    def forward(self, x: Tensor) -> Tensor:
        hundredths = (x * 20).round() / 100
        if not self.mixed:
            # The left half of the map has none of them.
            hundredths = torch.where(torch.arange(8) < 4, 2 * hundredths, hundredths)
        levels = ((hundredths + self.nudge + self.bias) / 0.02).round() * 0.02
        return self.body(levels)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("mixed", "bias"), [(False, 0.0), (False, 0.02), (True, 0.0), (True, 0.1)])
def test_other_steps_of_sums_between_two_levels_are_no_fault(mixed: bool, bias: float) -> None:
    """The file adds less than an ulp before it rounds; a bias that is off moves what no such step moves."""
    network, file = Between(mixed=mixed), Between(1e-7, bias, mixed=mixed)
    samples = torch.cat(inputs())
    (wanted,), (written,) = runner_of(network)(samples), runner_of(file)(samples)
    own = OwnRounding(References(runner_of(network)), samples, [wanted], {})
    errors, allowed = besides_ties(0, written, own, torch.full((wanted.shape[1],), 1e-4).double())
    assert float((wanted - written).abs().max()) > 0.01
    assert bool((errors > allowed).any()) == bool(bias)


class Switching(Rounded):
    """Scores of another layer where the first pixel is large: for one input in a hundred, or for fewer."""

    def __init__(self, shift: float = 0.0, turned: int = 0, above: float = 2.3, off: float = 0.0) -> None:
        super().__init__(shift)
        self.other, self.turned, self.above, self.off = nn.Linear(192, 10), turned, above, off

    def forward(self, x: Tensor) -> Tensor:
        rare = (x[:, 0, 0, 0] > self.above)[:, None]
        return torch.where(rare, self.off + self.other(x.flatten(1)).roll(self.turned, 1), super().forward(x))


@pytest.mark.parametrize("fault", [{}, {"turned": 1}, {"off": 0.01}], ids=["none", "large", "as steps"])
@pytest.mark.parametrize("few", [1, 2, 6])
def test_a_fault_that_few_inputs_reach_is_refused_where_a_network_rounds(
    fault: dict[str, Any], few: int
) -> None:
    # One or two of them tell by their neighbours if they are no farther off than steps.
    above = float(torch.cat(inputs(256))[:, 0, 0, 0].topk(few + 1).values[-1])
    model, intended = Switching(above=above), Switching(0.003, above=above)
    file = Switching(0.003, above=above, **fault)
    for one in (intended, file):
        one.load_state_dict(model.state_dict(), strict=False)
    references = References(
        runner_of(intended), runner_of(file), exact_runner(intended), exact_between_steps(intended)
    )
    if fault:
        with pytest.raises(ExportError, match="off by up to"):
            compare(model, runner_of(file), inputs(256), "noise", quantized=True, references=references)
    else:
        compare(model, runner_of(file), inputs(256), "noise", quantized=True, references=references)


def test_single_steps_that_no_neighbour_takes_are_no_fault() -> None:
    """The file makes another step at three inputs, where its sums are on the other side of a border."""
    model, intended = Rounded(), Rounded(0.003)
    intended.load_state_dict(model.state_dict())
    borders = torch.cat(inputs(256))[[77, 130, 180]]

    def file(batch: Tensor) -> list[Tensor]:
        steps = (batch[:, None] == borders).flatten(2).all(2).any(1)
        return [output + 0.01 * steps[:, None] for output in runner_of(intended)(batch)]

    references = References(runner_of(intended), file, exact_runner(intended), exact_between_steps(intended))
    found = compare(model, file, inputs(256), "noise", quantized=True, references=references)
    assert found.max_abs_error > 0.009


def test_the_tail_of_a_sigmoid_that_rounds_may_be_0_in_a_file() -> None:
    """Values of 1e-26 are below what a runtime's sigmoid resolves, and few of them are as large."""

    class Tail(Rounded):
        def forward(self, x: Tensor) -> Tensor:
            return (20 * super().forward(x) - 60).sigmoid()

    model, intended = Tail(), Tail(0.003)
    intended.load_state_dict(model.state_dict())

    def file(batch: Tensor) -> list[Tensor]:
        return [output.where(output > 2.0**-24, 0.0) for output in runner_of(intended)(batch)]

    references = References(runner_of(intended), file, exact_runner(intended), exact_between_steps(intended))
    found = compare(model, file, inputs(256), "noise", quantized=True, references=references)
    assert found.outputs[0].insensitive or found.outputs[0].limit_from == "float64"


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("ulps", [10, 200])
def test_outputs_that_are_the_same_for_all_inputs_may_be_ten_ulps_off(quantized: bool, ulps: int) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :4] + torch.tensor([0.1, 0.2, 0.3, 0.4])

    def file(batch: Tensor) -> list[Tensor]:
        return [(1 + ulps * 2.0**-23) * output for output in runner_of(Constant())(batch)]

    own = runner_of(Constant())
    references = References(own, file, exact_runner(Constant()), exact_between_steps(Constant()))
    given: dict[str, Any] = {"quantized": True, "references": references} if quantized else {}
    if ulps > 32:
        with pytest.raises(ExportError, match="off by up to"):
            compare(Constant(), file, inputs(), "noise", **given)
        return
    found = compare(Constant(), file, inputs(), "noise", **given)
    assert found.outputs[0].insensitive == "it is the same for all of these inputs"


def test_a_network_that_does_not_run_in_float64_is_said() -> None:
    """Nothing tells rare steps from rare faults then."""

    def refusing(batch: Tensor) -> list[Tensor]:
        raise ValueError(f"{batch.dtype} is no type\nof this network")

    model, file = Switching(), Switching(turned=1)
    file.load_state_dict(model.state_dict())
    references = References(runner_of(model), runner_of(file), refusing, refusing)
    found = compare(model, runner_of(file), inputs(256), "noise", quantized=True, references=references)
    assert found.without_float64 == "ValueError: torch.float32 is no type"
    assert "does not run in float64" in found.lines()[-1]
    references = replace(references, exact=exact_runner(model), between_steps=exact_between_steps(model))
    same = compare(model, runner_of(model), inputs(256), "noise", quantized=True, references=references)
    assert not same.without_float64
    assert not same.lines()


def test_an_output_beside_may_have_no_row_for_each_sample() -> None:
    def with_scale(run: Run) -> Run:
        return lambda batch: [*run(batch), torch.tensor(3.0)]

    class Scaled(nn.Module):
        def __init__(self, one: nn.Module) -> None:
            super().__init__()
            self.one = one

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), torch.tensor(3.0)

    model, intended, file = Switching(), Switching(0.003), Switching(0.003, 1)
    for one in (intended, file):
        one.load_state_dict(model.state_dict(), strict=False)
    exact = exact_runner(intended), exact_between_steps(intended)
    references = References(*map(with_scale, (runner_of(intended), runner_of(file), *exact)))
    with pytest.raises(ExportError, match="its output output is off by up to"):
        compare(
            Scaled(model), with_scale(runner_of(file)), inputs(256), "noise",
            quantized=True, references=references,
        )  # fmt: skip


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("fault", [0.0, 0.25])
def test_sigmoids_near_zero_are_judged_as_runtimes_compute_them(silu: bool, fault: float) -> None:
    class Seldom(Scores):
        def forward(self, x: Tensor) -> Tensor:
            scores = super().forward(x) - 9 * (torch.arange(10) == 4)
            return nn.functional.silu(scores) if silu else scores.sigmoid()

    model = Seldom()

    def candidate(batch: Tensor) -> list[Tensor]:
        (found,) = runner_of(model)(batch)
        noise = torch.rand(found.shape, generator=torch.Generator().manual_seed(len(batch))) - 0.5
        found += 2.0**-23 * noise * (9 if silu else 1)
        found[:, 4] += fault * found[:, 4].std()
        return [found]

    if fault:
        with pytest.raises(ExportError, match="at channel 4"):
            compare(model, candidate, inputs(), "noise")
    else:
        assert compare(model, candidate, inputs(), "noise").judged_in_float64


def test_samples_are_added_while_a_verdict_by_steps_is_not_clear() -> None:
    model, intended = Rounded(), runner_of(Rounded(0.003))

    def passes(error: float) -> int:
        def written(batch: Tensor) -> list[Tensor]:
            return [output + error * output.std(0) for output in intended(batch)]

        found = compare(
            model, intended, inputs(), "noise", quantized=True, references=References(intended, written)
        )
        return found.forward_passes["references"]

    # At the end both run all samples, to look for those that are far off.
    assert (passes(1e-4), passes(0.45e-3)) == (2 * (16 + 64), 2 * (16 + 32 + 64 + 64))


def test_each_channel_is_judged_in_ulps_of_its_own_values() -> None:
    class Mixed(Scores):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.tensor([1e5] + [1e-2] * 9)

    model = Mixed()

    def candidate(batch: Tensor) -> list[Tensor]:
        (found,) = runner_of(model)(batch)
        # A fifth of its signal, and less than an ulp of the first channel.
        found[:, 4] += 1e-3
        return [found]

    with pytest.raises(ExportError, match=r"at channel 4 by 0\.001"):
        compare(model, candidate, inputs(), "noise")


def test_ulps_do_not_jump_at_powers_of_two() -> None:
    limits = []
    for offset in (0.2499, 0.2501):
        model = Scores(signal=1e-7, offset=offset)
        limits.append(compare(model, runner_of(model), inputs(), "noise").outputs[0].limit or 0.0)
    assert limits[0] == pytest.approx(limits[1], rel=0.01)


def test_channels_that_could_not_be_checked_are_named(tmp_path: Path) -> None:
    model = Scores()
    with torch.no_grad():
        model.linear.weight[[2, 7]] = 0
    written = write_onnx(request(model, tmp_path / "a.onnx"))
    assert written.verified == "verified but for channels 2, 7 of output, which hardly depend on the inputs"
    assert written.agreements[0].outputs[0].unchecked == (2, 7)


class Tied(nn.Module):
    """Two scores that differ by less than an error that is let pass."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.flatten(1)[:, :1]
        return torch.cat((first, first + 1e-4 * x.flatten(1)[:, 1:2].sign()), 1)


def test_choices_that_integer_kernels_alone_change_are_no_fault_of_the_file() -> None:
    model = Tied()
    exact = runner_of(model)

    def kernels(batch: Tensor) -> list[Tensor]:
        return [output.flip(1) for output in exact(batch)]

    found = compare(model, kernels, inputs(), "noise", quantized=True, references=References(exact, exact))
    assert (found.top1_agreement, found.undecided) == (0.0, 64)
    require_agreement(found)
    found = compare(model, kernels, inputs(), "noise", quantized=True, references=References(exact, kernels))
    assert found.undecided == 0
    with pytest.raises(ExportError, match="chooses another class"):
        require_agreement(found)


def test_a_file_that_takes_one_sample_is_run_on_single_ones_wherever_it_is_a_reference() -> None:
    exact = runner_of(Tied())

    def kernels(batch: Tensor) -> list[Tensor]:
        assert len(batch) == 1
        return [output.flip(1) for output in exact(batch)]

    single = [sample for batch in inputs() for sample in batch.split(1)]
    found = compare(Tied(), kernels, single, "noise", quantized=True, references=References(exact, kernels))
    assert (found.top1_agreement, found.undecided) == (0.0, 0)


@pytest.mark.parametrize(("one_in", "taken"), [(200, 64), (10, 256)])
def test_samples_are_added_while_too_many_choices_differ(one_in: int, taken: int) -> None:
    model = Tied()

    def candidate(batch: Tensor) -> list[Tensor]:
        (found,) = runner_of(model)(batch)
        which = torch.arange(len(batch)) % one_in == one_in - 1
        found[which] = found[which].flip(1)
        return [found]

    assert compare(model, candidate, inputs(256), "noise", quantized=True, least=64).n == taken


def test_a_constant_in_place_of_rounded_outputs_is_refused() -> None:
    model = Rounded()
    mean = torch.cat([model(batch).detach() for batch in inputs()]).mean(0)
    with pytest.raises(ExportError, match="off by up to"):
        compare(
            model, lambda b: [mean.expand(len(b), -1).clone()], inputs(), "noise", quantized=True, coded=True
        )


def test_other_constants_hold_for_a_while() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = model[0].bias
    with other_constants(model, [(before.detach().clone(), torch.tensor([5.0, 6.0]))]):
        assert model[0].bias.tolist() == [5.0, 6.0]
    assert model[0].bias is before


def test_signals_leave_the_mean_out_and_follow_changing_shapes() -> None:
    tally = OutputTally("a")
    values = (
        torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5, 0])[:, None]
    )
    values += torch.arange(15.0).view(3, 5) * 100
    for part in values.split((1, 7, 32)):
        tally.add(part, part, part)
    expected = values.double().var(0, correction=0).mean(1).sqrt()
    assert torch.allclose(tally.signals, expected, atol=1e-6)
    assert quick(tally, 1e-5).over == 0
    other = torch.randn(4, 3, 6)
    tally.add(other, other, other + 1)
    assert tally.signals.shape == (1,)
    assert tally.errors.shape == (44, 1)
    everything = torch.cat((values.flatten(), other.flatten())).double()
    assert float(tally.signal) == pytest.approx(float(everything.std(correction=0)), rel=0.2)


def agreements(model: nn.Module, path: Path) -> list[Agreement]:
    return agreements_with(runner_of(model), request(model, path, toys.SHAPE), free_batch=True)


def test_how_far_the_comparison_is_can_be_seen(tmp_path: Path) -> None:
    class Recorder(Silent):
        shown: ClassVar[list[str]] = []

        def progress(self, items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
            for number, item in enumerate(items):
                self.shown.append(f"{description} {number}")
                yield item

    torch.manual_seed(0)
    asked = replace(request(toys.Classifier(), tmp_path / "a.onnx", toys.SHAPE), reporter=Recorder())
    write_onnx(asked)
    assert Recorder.shown == ["comparing a.onnx 0", "comparing a.onnx 1"]
    samples = Samples("noise", [torch.randn(32, *toys.SHAPE)])
    write_onnx(replace(asked, samples=samples, overwrite=True))
    assert len(Recorder.shown) == 5


def test_a_network_of_code_in_float32_is_judged_in_float64(tmp_path: Path) -> None:
    class Casting(toys.Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float()) * 1e-3 + 7

    torch.manual_seed(0)
    model = Casting()
    found = agreements(model, tmp_path / "a.onnx")
    assert {agreement.max_abs_error for agreement in found} == {0}
    write_onnx(request(model, tmp_path / "a.onnx", toys.SHAPE))

    def off(batch: Tensor) -> list[Tensor]:
        return [output + 1e-5 for output in runner_of(model)(batch)]

    with pytest.raises(ExportError, match="against the network in float64"):
        compare(model, off, growing_batches(toys.SHAPE, 0, free_batch=True), "noise", least=256)
