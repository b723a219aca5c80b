"""What is left of the outputs' signal after a quantization, against the formula written out in numpy."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from cctool.checkpoint.checkpoint import Checkpoint, load
from cctool.checkpoint.spec import Metrics, ModelSpec, Preprocessing, Signal, Step
from cctool.cli.main import app
from cctool.operations.python.data_in_memory import in_memory
from cctool.operations.quantize import prepare
from cctool.operations.quantize.signal import signal_kept
from cctool.operations.quantize.warning import signal_and_warning
from cctool.operations.registries import tables
from cctool.options.common import DataOptions
from cctool.quantization.calibration.observers import MinMaxObserver
from procedure_toys import Listening, context

QUIET = ("--device", "cpu", "-q")


class Net(nn.Module):
    """Returns what a function makes of the inputs."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def images(count: int = 80, size: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def logits(x: Tensor) -> Tensor:
    """Five features of an image, far from zero."""
    return x.flatten(1)[:, :5] + torch.tensor([5.0, 5.0, 5.2, 5.0, 5.0])


def kept(
    before: Callable[[Tensor], Any],
    after: Callable[[Tensor], Any],
    data: Tensor | None = None,
    task: str = "classification",
    batch_size: int = 24,
    measured: tuple[tuple[Metrics, ...], tuple[Metrics, ...]] = ((), ()),
    trained: bool = False,
) -> tuple[Signal | None, tuple[str, ...]]:
    data = images() if data is None else data
    channels = data.shape[1]
    spec = ModelSpec(
        architecture="lenet",
        input_shape=tuple(data.shape[1:]),
        preprocessing=Preprocessing(mean=(0.0,) * channels, std=(1.0,) * channels),
        task=task,
    )
    first, second = (Checkpoint(Net(function), spec) for function in (before, after))
    source = in_memory({"train": data[:2], "test": data}, (), None)
    options = DataOptions(batch_size=batch_size)
    return signal_and_warning(first, second, source, options, context(), measured, trained=trained)


def ratio_db(wanted: np.ndarray, found: np.ndarray, *, centred: bool = True) -> float:
    signal = wanted - wanted.mean(0) if centred else wanted
    return float(10 * np.log10((signal**2).mean() / ((wanted - found) ** 2).mean()))


def chosen(count: int, wanted: int = 64) -> Tensor:
    return images(count)[[number * count // wanted for number in range(wanted)]]


def test_the_figures_are_those_of_the_formula() -> None:
    def rounded(x: Tensor) -> Tensor:
        return (2 * logits(x)).round() / 2

    found, warned = kept(logits, rounded)
    assert found is not None
    assert warned == ()
    looked_at = chosen(80)
    wanted, given = logits(looked_at).double().numpy(), rounded(looked_at).double().numpy()
    assert found.snr_db == pytest.approx(ratio_db(wanted, given), abs=1e-5)
    assert found.snr_db_with_mean == pytest.approx(ratio_db(wanted, given, centred=False), abs=1e-5)
    assert found.agreement == pytest.approx(100 * (wanted.argmax(1) == given.argmax(1)).mean())
    assert (found.n, found.split, found.agreement_of) == (64, "test", "top-1")


def test_constant_outputs_have_no_signal_however_near_they_are() -> None:
    mean = logits(chosen(80)).mean(0)
    found, warned = kept(logits, lambda x: mean.expand(len(x), -1))
    assert found is not None
    assert found.snr_db == pytest.approx(0, abs=1e-4)
    # Without removing the mean, a constant network would pass for a good one.
    assert found.snr_db_with_mean is not None
    assert found.snr_db_with_mean > 10
    assert len(warned) == 1
    assert "most of the signal is gone: on 64 test images the outputs have a signal-to-noise" in warned[0]


@pytest.mark.parametrize(("noise", "warns"), [(0.3, False), (0.5, False), (1.5, True), (4.0, True)])
def test_the_warning_begins_where_noise_outweighs_the_signal(noise: float, warns: bool) -> None:
    def noisy(x: Tensor) -> Tensor:
        # Other pixels of the image are as good as noise, and the same each time.
        return logits(x) + noise * x.flatten(1)[:, 5:10]

    _, warned = kept(logits, noisy)
    assert bool(warned) == warns


def test_outputs_of_another_scale_that_decide_alike_are_no_loss() -> None:
    found, warned = kept(logits, lambda x: 3 * logits(x))
    assert found is not None
    assert found.snr_db is not None
    assert found.snr_db < 0
    assert (found.agreement, warned) == (100, ())


def test_hardly_any_signal_is_a_loss_though_most_decisions_stay() -> None:
    def scaled(x: Tensor) -> Tensor:
        # Another scale, and for the first images other decisions.
        return 3 * logits(x) * torch.where(x[:, 0, 0, :1] > 1.0, -1, 1)

    found, warned = kept(logits, scaled)
    assert found is not None
    assert found.snr_db is not None
    assert found.snr_db < 1.5
    assert found.agreement is not None
    assert 60 < found.agreement < 90
    assert found.lost == ("output",)
    assert len(warned) == 1
    # A training may change the outputs as it likes.
    assert kept(logits, scaled, trained=True)[1] == ()


def shares(value: float, n: int = 360, name: str = "top1") -> tuple[Metrics, ...]:
    other = {"loss": 1.0} if name != "loss" else {}
    return (Metrics(split="test", n=n, values={**other, name: value}),)


@pytest.mark.parametrize(
    ("before", "after", "n", "warns"),
    [
        (89.72, 70.56, 360, True),
        # What 2 bits leave of a network that works.
        (91.9, 85.6, 360, False),
        # A quarter of a low value, though not ten points.
        (30.28, 20.0, 2000, True),
        (30.28, 24.0, 2000, False),
        # Chance does as much to few images.
        (90.0, 78.0, 24, False),
        (70.0, 90.0, 360, False),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_a_metric_that_fell_far_beyond_chance_warns(
    before: float, after: float, n: int, warns: bool, trained: bool
) -> None:
    # The images that are compared agree: other images may not.
    _, warned = kept(logits, logits, measured=(shares(before, n), shares(after, n)), trained=trained)
    assert bool(warned) == warns
    if warns:
        assert f"test top-1 goes from {before:.4g} to {after:.4g} % (n = {n:,})" in warned[0].replace(
            " % to", " to"
        )
        assert "signal" not in warned[0]


@pytest.mark.parametrize(
    ("before", "after", "noise", "warns"),
    [(0.1, 0.5, 0.5, True), (0.1, 0.15, 0.5, False), (1e-6, 5e-6, 0.01, False)],
)
def test_an_error_that_grew_warns_where_the_outputs_are_noisy(
    before: float, after: float, noise: float, warns: bool
) -> None:
    measured = (shares(before, name="mse"), shares(after, name="mse"))
    _, warned = kept(
        logits, lambda x: logits(x) + noise * x.flatten(1)[:, 5:10], task="regression", measured=measured
    )
    assert bool(warned) == warns


def test_both_losses_are_one_warning() -> None:
    _, warned = kept(logits, lambda x: 0 * logits(x), measured=(shares(90), shares(10)))
    assert len(warned) == 1
    assert "most of the signal is gone" in warned[0]
    assert "; test top-1 goes from 90 % to 10 % (n = 360), which is no chance; more bits" in warned[0]


def test_agreement_on_the_commonest_decision_is_none() -> None:
    # Nine of ten decisions are class 0, which a constant network shares.
    def rare(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] + torch.tensor([2.5, 0, 0])

    found, warned = kept(rare, lambda x: torch.tensor([2.5, 0, 0]).expand(len(x), -1))
    assert found is not None
    assert found.agreement is not None
    assert found.agreement == found.commonest
    assert found.agreement > 80
    assert warned


def test_every_float_output_counts_and_the_lost_one_is_named() -> None:
    def two(x: Tensor) -> Any:
        return {"boxes": 10 * x.flatten(1)[:, :8], "scores": x.flatten(1)[:, 8:10], "sizes": x.shape[0]}

    def broken(x: Tensor) -> Any:
        return {**two(x), "scores": torch.zeros(len(x), 2)}

    found, warned = kept(two, broken, task="unknown")
    assert found is not None
    # The large output hides in the pooled figure that the small one is gone.
    assert found.snr_db is not None
    assert found.snr_db > 20
    assert found.lost == ("scores",)
    assert "most of the signal of scores is gone" in warned[0]
    # Its own figure, not that of all outputs together.
    assert found.lost_db == {"scores": pytest.approx(0, abs=0.5)}
    assert "on 64 test images its values have a signal-to-noise ratio of 0." in warned[0].replace("-0.", "0.")
    assert found.agreement is None


def test_outputs_that_become_nan_are_lost_and_counted() -> None:
    def broken(x: Tensor) -> Tensor:
        found = logits(x)
        return torch.where(found > 6.5, torch.nan, found)

    found, warned = kept(logits, broken)
    assert found is not None
    assert found.nonfinite == int((logits(chosen(80)) > 6.5).sum())
    assert "are no numbers" in warned[0]


def test_outputs_without_a_fixed_shape_are_named_as_not_compared() -> None:
    def some(x: Tensor) -> Any:
        values = x.flatten(1)[:, :2]
        return {"kept": values, "chosen": values[values[:, 0] > 0]}

    found, _ = kept(some, some, task="unknown")
    assert found is not None
    assert (found.uncompared, found.snr_db) == (("chosen",), None)
    assert kept(lambda x: x.sum(), lambda x: x.sum(), task="unknown") == (None, ())


@pytest.mark.parametrize(("count", "size", "wanted"), [(7, 4, 7), (100, 4, 64), (40, 130, 32), (1, 4, 1)])
def test_fewer_images_are_said(count: int, size: int, wanted: int) -> None:
    found, warned = kept(logits, logits, images(count, size))
    assert found is not None
    assert (found.n, warned) == (wanted, ())


def test_batches_and_repetition_change_nothing() -> None:
    def noisy(x: Tensor) -> Tensor:
        return logits(x) + 0.1 * torch.randn(len(x), 5)

    # A network that draws numbers even when it is evaluated: the same ones before and after.
    found, _ = kept(noisy, noisy)
    assert found is not None
    assert found.snr_db is None
    first, second = (kept(logits, lambda x: logits(x).round(), batch_size=size)[0] for size in (3, 64))
    assert first is not None
    assert second is not None
    assert first.snr_db == pytest.approx(second.snr_db, abs=1e-9)


def test_there_is_nothing_to_compare_without_images() -> None:
    checkpoint = Checkpoint(Net(logits), ModelSpec(architecture="lenet", input_shape=(3, 4, 4)))
    assert signal_kept(checkpoint, checkpoint, None, DataOptions(), context()) is None


# -- through the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "a.pt"
    line = ("train", "--arch", "lenet", "--data", "digits", "--epochs", "4", "-o", str(path), *QUIET)
    result = CliRunner().invoke(app, list(line))
    assert result.exit_code == 0, result.stderr
    return path


def quantized(path: Path, *line: str) -> tuple[dict[str, Any], str]:
    """The product as JSON, and what was printed on stderr."""
    output = path.with_name("q.pt")
    result = CliRunner().invoke(
        app, ["quantize", str(path), *line, "--device", "cpu", "-o", str(output), "--force", "--json"]
    )
    assert result.exit_code == 0, result.stderr
    (product,) = json.loads(result.stdout)["products"]
    return product, result.stderr


METHODS = {
    "int8": ("--method", "int8"),
    "int4": ("--method", "int4"),
    "stored int4": ("--method", "int4", "--group-size", "8"),
    "fp16": ("--method", "fp16"),
    "uint8": ("--method", "uint8"),
    "codebook": ("--method", "codebook"),
    "trained codebook": ("--method", "codebook", "--epochs", "1"),
    "qat": ("--method", "qat", "--epochs", "1"),
    "lsq": ("--method", "lsq", "--epochs", "2"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_network_that_works_has_figures_and_no_warning(trained: Path, method: str) -> None:
    product, said = quantized(trained, *METHODS[method])
    found = product["report"]["signal"]
    assert found == product["step"]["signal"]
    assert found["n"] == 64
    assert found["snr_db"] > 3 or found["agreement"] > 85
    assert "signal-to-noise with the mean" in said
    assert "top-1 agreement" in said
    assert "signal is gone" not in said
    history = CliRunner().invoke(app, ["analyze", str(trained.with_name("q.pt")), "--history"]).stdout
    assert f"signal-to-noise {found['snr_db']:.1f} dB" in history


@pytest.mark.parametrize(
    "line",
    [
        ("--method", "int8"),
        ("--method", "int8", "--weight-only"),
        ("--method", "qat", "--epochs", "0"),
    ],
)
def test_a_wrong_range_of_weights_is_noticed(
    trained: Path, line: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = prepare.fit_weight

    def too_narrow(quantizer: Any, weight: Tensor, fold: Any) -> None:
        fit(quantizer, weight * 1e-3, fold)

    monkeypatch.setattr(prepare, "fit_weight", too_narrow)
    product, said = quantized(trained, *line)
    assert "warning: most of the signal is gone" in said
    assert any("most of the signal is gone" in note for note in product["step"]["notes"])
    assert product["step"]["signal"]["lost"] == ["output"]


def test_a_wrong_range_of_activations_is_noticed(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = MinMaxObserver.bounds

    def too_narrow(self: MinMaxObserver) -> Any:
        low, high = find(self)
        return low * 1e-3, high * 1e-3

    monkeypatch.setattr(MinMaxObserver, "bounds", too_narrow)
    _, said = quantized(trained, "--method", "int8")
    assert "warning: most of the signal is gone" in said


def test_what_a_training_changed_for_the_better_is_no_loss(tmp_path: Path) -> None:
    fresh = tmp_path / "a.pt"
    line = ("train", "--arch", "lenet", "--data", "digits", "--epochs", "0", "-o", str(fresh), *QUIET)
    assert CliRunner().invoke(app, list(line)).exit_code == 0
    product, said = quantized(fresh, "--method", "qat", "--epochs", "4", "--lr", "0.05")
    assert product["step"]["signal"]["snr_db"] < 3
    assert "signal is gone" not in said


def test_steps_without_a_signal_are_written_as_before() -> None:
    step = Step(verb="prune", options={}, seed=0)
    assert "signal" not in step.model_dump(mode="json")
    signal = Signal(split="test", n=64, snr_db=20.0, snr_db_with_mean=None)
    told = replace_signal(step, signal).model_dump_json()
    assert Step.model_validate_json(told).signal == signal


def replace_signal(step: Step, signal: Signal) -> Step:
    return step.model_copy(update={"signal": signal})


def test_the_network_that_came_in_is_not_changed(trained: Path) -> None:
    listening = replace(context(), reporter=Listening())
    checkpoint = load(trained, tables())
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    source = in_memory({"test": torch.randn(8, 1, 32, 32)}, (), None)
    checkpoint.model.train()
    found = signal_kept(checkpoint, checkpoint, source, DataOptions(), listening)
    assert found is not None
    assert (found.snr_db, found.snr_db_with_mean, found.agreement) == (None, None, 100)
    assert checkpoint.model.training
    assert all(torch.equal(value, before[name]) for name, value in checkpoint.model.state_dict().items())
