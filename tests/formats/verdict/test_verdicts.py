"""The comparison itself: what it lets pass, and what it must catch."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import ExportError
from cctool.formats.records import Agreement, ChoiceAgreement
from cctool.formats.verdict.compare import compare, random_batches, require_agreement
from cctool.formats.verdict.rounding import runner_of
from cctool.quantization.network.attach import attach
from cctool.quantization.network.placement import INPUT_PLACE
from cctool.quantization.network.points import CallPoint, activation_key
from cctool.quantization.quantizers.config import QuantizerConfig


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()


def inputs() -> Iterator[Tensor]:
    return random_batches((3, 8, 8), seed=1)


def test_the_model_agrees_with_itself() -> None:
    model = net()
    found = compare(model, runner_of(model), inputs(), "noise")
    assert (found.n, found.batch_sizes, found.max_abs_error, found.top1_agreement) == (18, (1, 5), 0.0, 100.0)
    expected = torch.cat([model(batch).detach() for batch in inputs()])
    assert found.output_range == pytest.approx(float((expected.amax(0) - expected.amin(0)).max()))


@pytest.mark.parametrize("error", [1e-3, 0.1])
def test_an_error_of_a_thousandth_of_the_range_is_caught(error: float) -> None:
    model = net()

    def candidate(batch: Tensor) -> list[Tensor]:
        return [output + error for output in runner_of(model)(batch)]

    with pytest.raises(ExportError, match=r"noise.*top-1 agrees on 100\.0 % of 18"):
        compare(model, candidate, inputs(), "noise")


def test_an_offset_shared_by_all_inputs_does_not_hide_an_error() -> None:
    model = net()
    with torch.no_grad():
        model[3].bias += 1000

    def candidate(batch: Tensor) -> list[Tensor]:
        return [output + 0.1 for output in runner_of(model)(batch)]

    with pytest.raises(ExportError, match="off by up to"):
        compare(model, candidate, inputs(), "noise")


def test_an_error_in_one_batch_size_only_is_caught() -> None:
    model = net()

    def candidate(batch: Tensor) -> list[Tensor]:
        outputs = runner_of(model)(batch)
        return [output.flip(1) for output in outputs] if len(batch) == 1 else outputs

    with pytest.raises(ExportError):
        compare(model, candidate, inputs(), "noise")


def test_other_shapes_are_caught() -> None:
    model = net()
    with pytest.raises(ExportError, match=r"puts out \[\[5, 2\]\]|puts out \[\[1, 2\]\]"):
        compare(model, lambda batch: [torch.zeros(len(batch), 2)], inputs(), "noise")


def ill_conditioned() -> nn.Module:
    """Differences of large numbers: float32 keeps some three digits of the output."""

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(64, 10)
            self.shift = nn.Parameter(torch.tensor(3e3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x.flatten(1)) + self.shift) - self.shift

    return Difference().eval()


def test_rounding_is_told_from_faults_in_float64() -> None:
    model = ill_conditioned()

    def reordered(batch: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [model.linear(batch.flatten(1))]

    found = compare(model, reordered, random_batches((1, 8, 8), seed=0), "noise")
    assert found.judged_in_float64
    assert (found.outputs[0].rms_error or 0) > found.tolerance * (found.outputs[0].signal or 1)

    def faulty(batch: Tensor) -> list[Tensor]:
        return [output + 0.1 for output in reordered(batch)]

    with pytest.raises(ExportError):
        compare(model, faulty, random_batches((1, 8, 8), seed=0), "noise")


def test_values_that_are_not_finite_need_permission_and_the_same_place() -> None:
    model = net()
    with torch.no_grad():
        model[3].bias[2] = torch.nan
    same = runner_of(model)
    with pytest.raises(ExportError, match="allow-nonfinite"):
        compare(model, same, inputs(), "noise")
    assert compare(model, same, inputs(), "noise", allow_nonfinite=True).max_abs_error == 0
    with pytest.raises(ExportError, match="where the model does not"):
        compare(
            model, lambda b: [o.roll(1, dims=1) for o in same(b)], inputs(), "noise", allow_nonfinite=True
        )


def test_nothing_is_said_about_outputs_that_are_all_nan() -> None:
    model = net()
    with torch.no_grad():
        model[3].bias[:] = torch.nan
    found = compare(model, runner_of(model), inputs(), "noise", allow_nonfinite=True)
    (output,) = found.outputs
    assert (output.max_abs_error, output.output_range, output.rms_error, output.signal) == (None,) * 4
    assert output.not_compared == "it holds nothing but NaN and infinities"
    assert (found.choices, found.top1_agreement) == (None, None)


def test_no_inputs_are_no_agreement() -> None:
    model = net()
    with pytest.raises(ExportError, match="no inputs"):
        compare(model, runner_of(model), iter(()), "an empty split")


def test_random_inputs_follow_the_seed() -> None:
    first, again, other = (torch.cat(list(random_batches((2, 2), seed))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_running_a_model_leaves_its_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
    model.train()
    before = model[0].running_mean.clone()
    runner_of(model)(torch.randn(3, 4))
    assert model.training
    assert torch.equal(model[0].running_mean, before)


@pytest.mark.cuda
def test_a_model_on_the_gpu_agrees_with_its_copy_on_the_cpu() -> None:
    model = net()
    on_cpu = runner_of(net())
    found = compare(model.cuda(), on_cpu, inputs(), "noise")
    assert found.max_abs_error <= found.tolerance * found.output_range


class Rounding(nn.Module):
    """Rounds what it passes on to tenths, as a codec does."""

    def __init__(self, shift: float = 0.0, step: float = 0.1) -> None:
        super().__init__()
        self.body, self.shift, self.step = net(), shift, step

    def forward(self, x: Tensor) -> Tensor:
        head, tail = self.body[:2], self.body[2:]
        return tail(((head(x) + self.shift) / self.step).round() * self.step)


def test_a_step_of_a_codec_is_let_pass_where_it_is_told_of() -> None:
    model, candidate = Rounding(step=0.1), runner_of(Rounding(shift=1e-5, step=0.1))
    batches = list(random_batches((3, 8, 8), seed=1, sizes=(1, 100)))
    with pytest.raises(ExportError, match="off by up to"):
        compare(model, candidate, batches, "noise")
    assert compare(model, candidate, batches, "noise", coded=True).judged_by_steps


def test_another_codec_is_caught() -> None:
    with pytest.raises(ExportError, match="off by up to"):
        compare(Rounding(), runner_of(Rounding(step=0.2)), inputs(), "noise", coded=True)


def agreeing(n: int, percent: float, *, undecided: int = 0) -> Agreement:
    choices = ChoiceAgreement("top1", "top-1", "samples", n, percent)
    return Agreement("samples", n, (n,), 0.0, 1.0, 1.0, percent, 1e-5, undecided=undecided, choices=choices)


@pytest.mark.parametrize(
    ("different", "n", "accepted"),
    [
        (0, 1, True),
        (5, 256, True),
        (6, 256, False),
        (100, 10_000, True),
        (120, 10_000, False),
        (1, 2, True),
        (2, 4, False),
    ],
)
def test_top1_is_judged_by_how_much_the_samples_tell(different: int, n: int, accepted: bool) -> None:
    found = agreeing(n, 100 * (n - different) / n)
    with contextlib.nullcontext() if accepted else pytest.raises(ExportError, match="99 % is asked for"):
        require_agreement(found)


@pytest.mark.parametrize(("undecided", "accepted"), [(4, True), (3, False)])
def test_undecided_samples_do_not_count(undecided: int, accepted: bool) -> None:
    found = agreeing(256, 100 * 247 / 256, undecided=undecided)
    with contextlib.nullcontext() if accepted else pytest.raises(ExportError, match=f"{undecided} undecided"):
        require_agreement(found)


def test_only_samples_near_a_border_between_steps_are_undecided() -> None:
    """Logits (n, 3.5) of n = round(x): 3.501 is class 0 by a hair, 3 is class 1 whatever moves it."""
    model = nn.Linear(1, 2).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0]]))
        model.bias.copy_(torch.tensor([0.0, 3.5]))
    config = QuantizerConfig(method="uniform", bits=8, signed=False, symmetric=False)
    held = attach(model, {}, {INPUT_PLACE: CallPoint(output=config)})
    held.quantizer(activation_key(INPUT_PLACE, "output")).set_range(torch.tensor(0.0), torch.tensor(255.0))  # type: ignore[union-attr]
    batch = torch.tensor([[3.501]] * 20 + [[3.0]] * 20)

    def candidate(inputs: Tensor) -> list[Tensor]:
        found = runner_of(model)(inputs)
        # One step down on a border, one step up in the middle of a step.
        found[0][0, 0], found[0][-1, 0] = 3, 4
        return found

    found = compare(model, candidate, [batch], "steps", quantized=True)
    assert found.judged_by_steps
    assert found.top1_agreement == 95.0
    assert found.undecided == 1
