"""`cctool prune --target` and `--max-drop`: what is reached, and that it is what other commands measure."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from cctool.base.errors import PruningError, UsageError
from cctool.checkpoint.checkpoint import load, save
from cctool.checkpoint.spec import Metrics
from cctool.cli.main import app
from cctool.operations import pipeline
from cctool.operations.inspect import evaluate
from cctool.operations.judge.size import measure, stored_bytes
from cctool.operations.prune import goals as prune_goals
from cctool.operations.prune import run as prune
from cctool.operations.prune.goals import TargetReport
from cctool.operations.prune.report import picture_path
from cctool.operations.registries import tables
from cctool.options.common import DataOptions, RuntimeOptions, TaskOptions
from cctool.options.inspect.evaluate import EvaluateOptions, SplitName
from cctool.options.prune.choices import Growth, PruneMethod, Scope, StepMode
from cctool.options.prune.options import PruneOptions
from cctool.options.target import Quantity, Target

DIGITS = DataOptions(data="digits", limit=120)
FEW = DataOptions(data="digits", limit=32)


def cctool_(*arguments: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{' '.join(arguments)}\n{result.output}\n{result.exception}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that has learnt something."""
    path = tmp_path_factory.mktemp("goals") / "net.pt"
    build = ("--arch", "mobilenet_student", "--arg", "base=8", "--epochs", "6")
    cctool_("train", *build, "--data", "digits", "--device", "cpu", "-q", "-o", str(path))
    return path


def products(path: Path, name: str, **options: Any) -> list[Any]:
    request = pipeline.Request(
        "prune",
        str(path),
        str(path.with_name(name)),
        runtime=RuntimeOptions(device="cpu"),
        force=True,
    )
    return list(pipeline.write(prune.run, PruneOptions(**options), request))


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("quantity", [Quantity.MACS, Quantity.PARAMS, Quantity.BYTES])
def test_a_target_is_met_as_nearly_as_a_unit_allows(trained: Path, quantity: Quantity, scope: Scope) -> None:
    (product,) = products(
        trained, "t.pt", method=PruneMethod.L2, scope=scope, target=Target(quantity, 0.5), data=FEW
    )
    before, after = (measure(load(path, tables())) for path in (trained, product.path))
    counts = {
        Quantity.MACS: (before.macs, after.macs),
        Quantity.PARAMS: (before.parameters, after.parameters),
        Quantity.BYTES: (before.bytes, after.bytes),
    }
    old, new = counts[quantity]
    target = product.report.target
    assert (target.before, target.reached) == (old, new)
    assert 0.49 * old < new <= 0.5 * old == target.limit < target.above
    assert product.report.after.parameters == after.parameters
    assert f"target {quantity} {target.limit:,.0f}: reached {new:,.0f}" in product.step.notes


def test_an_absolute_target_is_a_number_not_a_fraction(trained: Path) -> None:
    (product,) = products(
        trained, "t.pt", method=PruneMethod.L1, target=Target(Quantity.PARAMS, 12000), data=FEW
    )
    assert 11_700 < product.report.after.parameters <= 12_000


def test_coarse_rounding_says_what_it_could_reach(trained: Path) -> None:
    line = f"--target macs=0.5 --round-to 8 --method l1 --force -o {trained.with_name('r.pt')}"
    result = CliRunner().invoke(app, ["prune", str(trained), *line.split()])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("target macs")]
    assert "(50.00%): reached" in line
    assert "one unit less would leave" in line


def test_what_cannot_be_reached_is_refused_with_the_most_that_goes(trained: Path) -> None:
    target = Target(Quantity.MACS, 0.5)
    with pytest.raises(PruningError, match=r"cannot be reached: .* with all gone that may go"):
        products(trained, "never.pt", method=PruneMethod.L1, target=target, min_channels=120)
    assert not trained.with_name("never.pt").exists()


def test_a_target_of_a_quantized_file_counts_stored_bytes(trained: Path) -> None:
    quantized = trained.with_name("u8.pt")
    cctool_("quantize", str(trained), "--method", "uint8", "-q", "--force", "-o", str(quantized))
    (product,) = products(
        quantized, "t.pt", method=PruneMethod.L1, target=Target(Quantity.BYTES, 0.5), data=FEW
    )
    small = load(product.path, tables())
    assert small.stored
    assert product.report.target.reached == stored_bytes(small)
    assert 0.47 < stored_bytes(small) / stored_bytes(load(quantized, tables())) <= 0.5


def test_a_target_of_a_network_with_quantizers_counts_their_bits_after_fine_tuning_too(trained: Path) -> None:
    quantized = trained.with_name("i8.pt")
    cctool_(
        *("quantize", str(trained), "--method", "int8", "--data", "digits", "--limit", "32"),
        *("--calibration", "16", "-q", "--force", "-o", str(quantized)),
    )
    target = Target(Quantity.BYTES, 0.5)
    (product,) = products(
        quantized, "t.pt", method=PruneMethod.L1, target=target, finetune_epochs=1, data=FEW
    )
    before, after = (stored_bytes(load(path, tables())) for path in (quantized, product.path))
    assert product.report.target.before == before
    assert product.report.target.reached == after
    assert 0.45 < after / before <= 0.5


@pytest.mark.parametrize("mode", list(StepMode))
def test_steps_approach_a_target_along_the_growth(trained: Path, mode: StepMode) -> None:
    target = Target(Quantity.PARAMS, 0.4)
    options = {"method": PruneMethod.L1, "steps": 2, "step_mode": mode, "target": target, "data": FEW}
    dense = measure(load(trained, tables())).parameters
    shares = {
        growth: [
            p.report.after.parameters / dense for p in products(trained, "s.pt", growth=growth, **options)
        ]
        for growth in Growth
    }
    for growth, found in shares.items():
        expected = [1 - growth.at(0.6, step, 2) for step in (1, 2)]
        assert found == pytest.approx(expected, abs=0.02), growth
        assert all(share <= limit + 1e-9 for share, limit in zip(found, expected, strict=True))


def test_a_latency_target_is_searched_on_measurements(trained: Path) -> None:
    target = Target(Quantity.LATENCY, 0.999)
    (product,) = products(trained, "l.pt", method=PruneMethod.L1, target=target, data=FEW)
    found = product.report.target
    assert found.quantity == "latency"
    assert found.reached <= found.limit
    assert {trial.removed for trial in found.trials} >= {0}


@pytest.mark.parametrize("mode", list(StepMode))
def test_a_machine_that_slows_down_between_steps_moves_no_target(mode: StepMode) -> None:
    options = PruneOptions(steps=2, step_mode=mode)
    earlier = TargetReport("latency", limit=80.0, before=100.0, reached=75.0, above=None, trials=())
    present = 300.0 if mode is StepMode.INDEPENDENT else 225.0  # three times as slow as it was
    assert prune_goals._start(present, earlier, options) == pytest.approx(300.0)
    assert prune_goals._start(75.0, replace(earlier, quantity="macs"), options) == 100.0
    assert prune_goals._start(present, None, options) == present


def accuracy(path: Path | str, split: SplitName) -> tuple[float, int]:
    request = pipeline.Request("evaluate", str(path), runtime=RuntimeOptions(device="cpu"))
    report = pipeline.read(evaluate.run, EvaluateOptions(split=split, data=DIGITS), request)
    return report.metrics.values["top1"], report.metrics.n


def test_a_budget_is_kept_on_the_validation_split(trained: Path) -> None:
    (product,) = products(
        trained, "d.pt", method=PruneMethod.L2, scope=Scope.GLOBAL, max_drop=5.0, data=DIGITS
    )
    budget = product.report.budget
    best = next(trial for trial in budget.curve if trial.rate == budget.rate)
    assert f"largest rate within 5 points of top1: {budget.rate:g}" in product.step.notes
    assert best.drop <= 5.0 < max(trial.drop for trial in budget.curve)
    assert all(trial.drop > 5.0 for trial in budget.curve if trial.rate > budget.rate)
    assert (budget.before, budget.n) == accuracy(trained, SplitName.VALIDATION)
    after = {metrics.split: (metrics.values["top1"], metrics.n) for metrics in product.step.metrics_after}
    assert after["validation"] == (best.value, budget.n)
    # both splits are what a command of its own measures
    for split in (SplitName.VALIDATION, SplitName.TEST):
        assert after[split.value] == accuracy(product.path, split)
    wider = products(trained, "e.pt", method=PruneMethod.L2, scope=Scope.GLOBAL, max_drop=20.0, data=DIGITS)
    assert wider[0].report.budget.rate > budget.rate


def by_parameters(dense: int) -> Any:
    """A stand-in for measuring: top-1 is the percentage of parameters that are left."""

    def measured(checkpoint: Any, *given: Any, split: str, **named: Any) -> Metrics:
        left = sum(parameter.numel() for parameter in checkpoint.model.parameters())
        return Metrics(split=split, n=100, values={"top1": 100 * left / dense, "loss": 1.0})

    return measured


@pytest.mark.parametrize("budget", [3.0, 40.0, 97.0])
def test_the_largest_rate_within_a_budget_is_found(
    trained: Path, monkeypatch: pytest.MonkeyPatch, budget: float
) -> None:
    dense = measure(load(trained, tables())).parameters
    stand_in = by_parameters(dense)
    monkeypatch.setattr(prune_goals, "measured", stand_in)
    monkeypatch.setattr(prune, "measured_splits", lambda c, *_: (stand_in(c, split="validation"),))
    options = {"method": PruneMethod.L1, "scope": Scope.GLOBAL, "data": FEW}
    (product,) = products(trained, "b.pt", max_drop=budget, **options)
    rate = product.report.budget.rate
    assert 100 * (1 - product.report.after.parameters / dense) <= budget
    (further,) = products(trained, "b.pt", rate=min(rate + 1 / 256, 0.999), **options)
    one_more = 100 * (1 - further.report.after.parameters / dense)
    assert one_more > budget or further.report.after.parameters == product.report.after.parameters


def test_a_budget_that_allows_nothing_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = by_parameters(measure(load(trained, tables())).parameters)
    monkeypatch.setattr(prune_goals, "measured", stand_in)
    monkeypatch.setattr(prune, "measured_splits", lambda c, *_: (stand_in(c, split="validation"),))
    with pytest.raises(PruningError, match="no unit can go within this budget"):
        products(trained, "z.pt", method=PruneMethod.L1, max_drop=0.0, data=FEW)
    assert not trained.with_name("z.pt").exists()


def test_a_budget_needs_validation_data(trained: Path) -> None:
    bare = load(trained, tables())
    path = trained.with_name("bare.pt")
    save(replace(bare, spec=bare.spec.model_copy(update={"data": None})), path, tables(), overwrite=True)
    with pytest.raises(UsageError, match="--max-drop needs data"):
        products(path, "n.pt", method=PruneMethod.L1, max_drop=1.0)


def test_a_collapse_is_said_loudly(trained: Path) -> None:
    command = ["prune", str(trained), "--method", "random", "--rate", "0.9", "--force", "--data", "digits"]
    command += ["-q", "-o", str(trained.with_name("c.pt"))]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "warning: validation top-1 fell from" in result.stderr
    assert "--recalibrate 1024" in result.stderr
    gentle = CliRunner().invoke(app, [*command[:4], "--rate", "0.01", *command[6:]])
    assert gentle.exit_code == 0, gentle.output
    assert "fell" not in gentle.stderr


def test_a_dry_run_shows_where_the_search_would_end(trained: Path) -> None:
    command = ["prune", str(trained), "--method", "l1", "--target", "macs=0.5", "--dry-run"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "MACs" in result.stdout
    assert "target macs" in result.stderr
    assert not list(trained.parent.glob("net.prune*"))


def test_a_picture_lies_beside_the_product(trained: Path) -> None:
    output = trained.with_name("pic.pt")
    cctool_("prune", str(trained), "--method", "l1", "--plot", "-q", "-o", str(output))
    assert trained.with_name("pic.widths.png").read_bytes().startswith(b"\x89PNG")
    named = trained.with_name("other.svg")
    steps = ("--steps", "2", "--plot-file", str(named))
    cctool_("prune", str(trained), "--method", "l1", *steps, "-q", "-o", str(trained.with_name("two.pt")))
    assert [trained.with_name(f"other.step{n}.svg").exists() for n in (1, 2)] == [True, True]
    assert torch.load(output, weights_only=True)["cctool"] == 1


def test_a_step_s_picture_is_named_after_its_product() -> None:
    context = cast("Any", SimpleNamespace(output=Path("folder/net.pt")))
    options = PruneOptions(plot=True)
    assert picture_path(options, context, "step1") == Path("folder/net.step1.widths.png")
    assert picture_path(options, context, "") == Path("folder/net.widths.png")


@pytest.mark.parametrize(
    ("before", "after", "n", "said"),
    [(10.28, 10.0, 360, False), (13.0, 10.0, 360, False), (14.0, 10.0, 36_000, True), (90.0, 30.0, 50, True)],
)
def test_guesses_that_scatter_are_no_collapse(
    trained: Path, before: float, after: float, n: int, said: bool
) -> None:
    warnings: list[str] = []
    reporter = SimpleNamespace(warn=warnings.append)
    old, new = (Metrics(split="test", n=n, values={"top1": value}) for value in (before, after))
    asked = SimpleNamespace(reporter=reporter, judges={}, asked=TaskOptions())
    work = SimpleNamespace(metrics=(old,), options=PruneOptions(), context=asked)
    prune._warn_of_collapse(load(trained, tables()), (new,), 0, cast("Any", work))
    assert bool(warnings) == said
