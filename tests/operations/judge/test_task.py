"""Which task holds, and what is said where a network's own functions are not named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import SpecError, TrainingError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics, ModelSpec, Step
from cctool.operations.context import Context
from cctool.operations.judge.budget import budget_scale
from cctool.operations.judge.task import judge_of, with_task
from cctool.options.common import TaskOptions
from cctool.options.target import parse_drop
from cctool.options.train.fit import FitOptions, MetricMode
from procedure_toys import context


class Returning(nn.Module):
    """A network that returns what it is told to make of (N, 4) numbers."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.made = made

    def forward(self, images: Tensor) -> Any:
        return self.made(images.flatten(1)[:, :4] * self.weight)


LOGITS = Returning(lambda x: x)
MAPS = Returning(lambda x: {"out": x[:, :, None, None].expand(-1, -1, 2, 2)})
PICTURE = Returning(lambda x: x.view(-1, 1, 2, 2))
DETECTOR = Returning(lambda x: [{"boxes": row[None]} for row in x])
STEP = Step(verb="train", options={}, seed=0, versions={})


def checkpoint(model: nn.Module, *, trained: bool = False, **spec: Any) -> Checkpoint:
    made = ModelSpec(architecture="toy", input_shape=(1, 2, 2), **spec)
    return Checkpoint(model, made, history=(STEP,) if trained else ())


def where(tmp_path: Path | None = None, **asked: Any) -> Context:
    references = frozenset(value for key, value in asked.items() if key in ("loss", "metric") and value)
    return replace(context(), asked=TaskOptions(**asked), user_code=references)


def task_of(
    found: Checkpoint, of_data: str | None = None, of_network: str | None = None, **asked: Any
) -> str:
    return with_task(found, of_data, of_network, where(**asked)).spec.task


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(
        "def loss(outputs, targets, inputs):\n    return outputs.mean()\n"
        "def gain(outputs, targets):\n    return 1.0\n"
        "def error(outputs, targets):\n    return 1.0\n"
        "error.direction = 'min'\nerror.unit = 'mm'\n"
        "def odd(outputs, targets):\n    return 1.0\n"
        "odd.direction = 'up'\n"
    )


@pytest.mark.parametrize(
    ("model", "alone", "on_masks", "for_masks"),
    [
        (LOGITS, "classification", "unknown", "classification"),
        (MAPS, "unknown", "segmentation", "segmentation"),
        (PICTURE, "unknown", "unknown", "unknown"),
        (DETECTOR, "unknown", "unknown", "unknown"),
    ],
)
def test_the_data_or_the_architecture_say_the_task_if_the_outputs_suit_it(
    model: nn.Module, alone: str, on_masks: str, for_masks: str
) -> None:
    assert task_of(checkpoint(model)) == alone
    assert task_of(checkpoint(model), "segmentation") == on_masks
    assert task_of(checkpoint(model), None, "segmentation") == for_masks


def test_the_command_line_goes_before_the_record_and_that_before_the_data() -> None:
    regressing = checkpoint(LOGITS, trained=True, task="regression")
    assert task_of(regressing) == "regression"
    assert task_of(regressing, "classification", "segmentation") == "regression"
    assert task_of(regressing, task="classification") == "classification"
    assert task_of(checkpoint(LOGITS), "regression", "classification") == "regression"
    assert task_of(checkpoint(LOGITS, trained=True), "regression") == "classification"


def test_old_files_say_classification_of_everything() -> None:
    assert task_of(checkpoint(LOGITS, trained=True)) == "classification"
    assert task_of(checkpoint(PICTURE, trained=True)) == "unknown"
    assert task_of(checkpoint(MAPS, trained=True), "segmentation") == "segmentation"


@pytest.mark.usefixtures("functions")
def test_the_users_functions_make_other_outputs_custom_and_are_recorded() -> None:
    found = with_task(
        checkpoint(PICTURE), "classification", None, where(loss="my.py:loss", metric="my.py:error")
    )
    assert found.spec.task == "custom"
    assert found.spec.task_settings == {"loss": "my.py:loss", "metric": "my.py:error", "direction": "min"}
    again = with_task(found, None, None, where())
    assert again.spec == found.spec
    other = with_task(found, None, None, where(loss="moved/my.py:loss"))
    assert other.spec.task_settings["loss"] == "moved/my.py:loss"
    assert other.spec.task_settings["metric"] == "my.py:error"
    assert task_of(checkpoint(LOGITS), loss="my.py:loss") == "classification"


@pytest.mark.usefixtures("functions")
def test_a_metric_says_its_direction_and_unit() -> None:
    named = where(metric="my.py:error")
    main = judge_of(checkpoint(PICTURE, task="custom"), named).main
    assert (main.name, main.unit, main.rising) == ("error", "mm", False)
    rising = replace(
        named, asked=FitOptions(metric="my.py:gain"), user_code=frozenset({"my.py:gain"}), judges={}
    )
    assert judge_of(checkpoint(LOGITS), rising).main.rising
    falling = replace(rising, asked=FitOptions(metric="my.py:gain", metric_mode=MetricMode.MIN), judges={})
    assert not judge_of(checkpoint(LOGITS), falling).main.rising
    settings = {"metric": "elsewhere.py:gain", "direction": "min"}
    later = replace(
        named, asked=TaskOptions(metric="my.py:gain"), user_code=frozenset({"my.py:gain"}), judges={}
    )
    assert not judge_of(checkpoint(PICTURE, task="custom", task_settings=settings), later).main.rising
    with pytest.raises(Exception, match="its direction is 'up'"):
        judge_of(checkpoint(LOGITS), where(metric="my.py:odd"))


def test_what_is_missing_is_named_with_its_option() -> None:
    settings = {"loss": "ae.py:mse", "metric": "ae.py:psnr"}
    judge = judge_of(checkpoint(PICTURE, task="custom", task_settings=settings), where())
    assert not judge.measures
    with pytest.raises(
        TrainingError, match=r"taylor needs a loss: this network's loss is ae.py:mse; .*--loss ae"
    ):
        judge.require_loss("taylor")
    with pytest.raises(TrainingError, match=r"metric is ae.py:psnr; name it with --metric"):
        judge.require_measure("--max-drop")
    unknown = judge_of(checkpoint(PICTURE, task="unknown"), where())
    with pytest.raises(TrainingError, match=r"nothing says what .* outputs mean; --loss FILE.py:FN"):
        unknown.require_loss("training")


def test_tasks_that_do_not_suit_or_exist_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--task poetry: classification, .* is allowed"):
        task_of(checkpoint(LOGITS), task="poetry")
    with pytest.raises(TrainingError, match="segmentation needs logits"):
        task_of(checkpoint(LOGITS), task="segmentation")
    with pytest.raises(SpecError, match="unknown task 'poetry'"):
        judge_of(checkpoint(LOGITS, task="poetry"), where())


def test_finding_the_task_moves_no_random_numbers() -> None:
    noisy = Returning(lambda x: torch.nn.functional.dropout(x, 0.5, training=True))
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    task_of(checkpoint(noisy))
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    ("task", "name", "before", "budget", "value", "lost", "shown"),
    [
        ("classification", "top1", 80.0, "1.5", 78.0, 2.0, "-2.00 points"),
        ("classification", "top1", 80.0, "2%", 78.0, 0.025, "-2.50 %"),
        ("segmentation", "miou", 50.0, "3", 51.0, -1.0, "+1.00 points"),
        ("regression", "mse", 0.5, "2%", 0.6, 0.2, "+20.00 %"),
    ],
)
def test_a_budget_counts_in_the_metrics_unit_or_in_parts(
    task: str, name: str, before: float, budget: str, value: float, lost: float, shown: str
) -> None:
    measured = Metrics(split="validation", n=10, values={name: before})
    scale = budget_scale(checkpoint(LOGITS, task=task), parse_drop(budget), (measured,), where())
    assert scale.lost(value) == pytest.approx(lost)
    assert scale.change(scale.lost(value)) == shown


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_trial_without_a_number_loses_more_than_any_budget(task: str) -> None:
    name = {"classification": "top1", "regression": "mse"}[task]
    before = Metrics(split="validation", n=10, values={name: 0.5})
    scale = budget_scale(checkpoint(LOGITS, task=task), parse_drop("50%"), (before,), where())
    assert scale.lost(scale.value(Metrics(split="validation", n=10, values={name: float("nan")}))) == math.inf
    assert scale.lost(scale.value(before)) == 0


@pytest.mark.parametrize(("budget", "wanted"), [("1.5", "1.5 points"), ("2%", "2%"), ("99.9", "99.9 points")])
def test_a_budget_is_named_with_its_unit(budget: str, wanted: str) -> None:
    before = Metrics(split="validation", n=10, values={"top1": 80.0})
    assert budget_scale(checkpoint(LOGITS), parse_drop(budget), (before,), where()).wanted == wanted


@pytest.mark.parametrize("budget", ["100", "100%", "250%"])
def test_a_budget_is_less_than_all_of_a_percentage(budget: str) -> None:
    accuracy = Metrics(split="validation", n=10, values={"top1": 80.0})
    with pytest.raises(TrainingError, match=r"that is all of top-1; less than 100( points|%) is allowed"):
        budget_scale(checkpoint(LOGITS), parse_drop(budget), (accuracy,), where())
    error = Metrics(split="validation", n=10, values={"mse": 0.5})
    assert budget_scale(checkpoint(LOGITS, task="regression"), parse_drop("250%"), (error,), where())


def test_no_part_of_nothing_can_be_lost() -> None:
    nothing = Metrics(split="validation", n=10, values={"top1": 0.0, "mse": 0.0})
    with pytest.raises(TrainingError, match=r"--max-drop 5%: top-1 is 0, of which no part can be lost"):
        budget_scale(checkpoint(LOGITS), parse_drop("5%"), (nothing,), where())
    # An error of 0 may still rise, which no part of it allows.
    scale = budget_scale(checkpoint(LOGITS, task="regression"), parse_drop("5%"), (nothing,), where())
    assert scale.lost(0.0) == 0
    assert scale.lost(0.1) == math.inf


def test_errors_have_no_points() -> None:
    measured = Metrics(split="validation", n=10, values={"mse": 0.5})
    with pytest.raises(TrainingError, match=r"--max-drop 2: mean squared error has no unit .* --max-drop 2%"):
        budget_scale(checkpoint(LOGITS, task="regression"), parse_drop("2"), (measured,), where())
    with pytest.raises(UsageError, match="--max-drop searches on the validation split"):
        budget_scale(checkpoint(LOGITS, task="regression"), parse_drop("2%"), (), where())
