"""Which task a network has in this command, and by which functions it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from cctool.base.errors import DataError, SpecError, TrainingError, UsageError, UserCodeError
from cctool.base.networks import device_of, in_eval_mode
from cctool.base.outputs import named_tensors
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec
from cctool.operations.context import Context
from cctool.options.common import TaskOptions
from cctool.options.train.fit import FitOptions, MetricMode
from cctool.tasks.base import LOSS, Measure, Task, main_measure
from cctool.tasks.classification import Classification
from cctool.tasks.custom import CUSTOM, UNKNOWN, Untold
from cctool.tasks.table import TASKS, measure_named, task_named
from cctool.training.user_functions import UserLoss, UserMetric, named_function

_DEFAULT = Classification().name
_SETTINGS = {"loss", "metric", "direction"}
_NOTHING = object()


@dataclass(frozen=True)
class Judge:
    """How a command judges a network.

    Attributes:
        task: what the outputs mean.
        loss: the user's, in place of the task's.
        metric: the user's, besides the task's.
        rising: whether larger values of the user's metric are better.
        recorded: references of the user's functions that the checkpoint records, by option.
    """

    task: Task
    loss: UserLoss | None = None
    metric: UserMetric | None = None
    rising: bool = True
    recorded: Mapping[str, str] = field(default_factory=dict)

    @property
    def main(self) -> Measure:
        """By which epochs, searches and budgets judge."""
        if self.metric is not None:
            return Measure(self.metric.name, self.metric.name, self.metric.unit, self.rising)
        return main_measure(self.task)

    def measure(self, name: str) -> Measure:
        """How people read the metric of a name."""
        return self.main if self.main.name == name else measure_named(name)

    @property
    def measures(self) -> bool:
        """Whether anything can be measured."""
        return self.task.has_loss or self.loss is not None or self.metric is not None

    @property
    def can_train(self) -> bool:
        """Whether there is a loss."""
        return self.task.has_loss or self.loss is not None

    @property
    def needs_targets(self) -> bool:
        """Whether something that judges looks at targets, and not at inputs alone."""
        if self.loss is None and self.task.has_loss:
            return True
        named = [function for function in (self.loss, self.metric) if function is not None]
        return not named or not all(function.takes_inputs for function in named)

    def has(self, option: str) -> bool:
        """Whether the command line names a function of the user's for ``--loss`` or ``--metric``."""
        return (self.loss if option == "--loss" else self.metric) is not None

    def training_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """The task's loss of training images; targets that no output stands for are refused.

        Raises:
            DataError: naming the target.
        """
        self.task.refuse(outputs, targets, "training")
        return self.task.loss(outputs, targets)

    def why_not(self, option: str) -> str:
        """What is missing, and how it is given: the end of a sentence.

        Args:
            option: ``--loss`` or ``--metric``.
        """
        reference = self.recorded.get(option)
        what = option.removeprefix("--")
        if reference is not None:
            return f"this network's {what} is {reference}; name it with {option} {reference}"
        return (
            f"nothing says what this network's outputs mean; {option} FILE.py:FN names a {what} of yours, "
            "--task the kind of outputs"
        )

    def require_loss(self, why: str) -> None:
        """Refuse what needs gradients if there is no loss.

        Raises:
            TrainingError: naming the recorded loss and the option.
        """
        if not self.can_train:
            raise TrainingError(f"{why} needs a loss: {self.why_not('--loss')}")

    def require_measure(self, why: str) -> Measure:
        """The main measure.

        Raises:
            TrainingError: if nothing can be measured, naming the recorded metric and the option.
        """
        if not self.measures:
            option = "--metric" if "--metric" in self.recorded or "--loss" not in self.recorded else "--loss"
            raise TrainingError(f"{why} needs a metric: {self.why_not(option)}")
        return self.main


def judge_of(checkpoint: Checkpoint, context: Context) -> Judge:
    """How this command judges a network; the user's functions are those that the command line names.

    Raises:
        SpecError: if the checkpoint has a task that this version does not know.
        UserCodeError: if a named function cannot be loaded.
    """
    key = (checkpoint.spec.task, repr(checkpoint.spec.task_settings))
    if key not in context.judges:
        context.judges[key] = _judge(checkpoint.spec, context)
    found: Judge = context.judges[key]
    return found


def _judge(spec: ModelSpec, context: Context) -> Judge:
    asked = context.asked
    task = task_named(spec.task)
    loss = (
        UserLoss(asked.loss, named_function(asked.loss, context.user_code, "--loss"))
        if asked.loss is not None
        else None
    )
    metric = (
        UserMetric(asked.metric, named_function(asked.metric, context.user_code, "--metric"))
        if asked.metric is not None
        else None
    )
    if metric is not None:
        _refuse_taken(metric, task)
    rising = metric is None or _rising(metric, context, spec.task_settings)
    if spec.task == CUSTOM and metric is not None:
        task = Untold(CUSTOM, (Measure(metric.name, metric.name, metric.unit, rising),))
    unknown = set(spec.task_settings) - (_SETTINGS if spec.task == CUSTOM else set())
    if unknown:
        raise SpecError(f"the task {spec.task} has no setting {', '.join(sorted(unknown))}")
    recorded = {
        f"--{name}": str(spec.task_settings[name])
        for name in ("loss", "metric")
        if name in spec.task_settings
    }
    return Judge(task, loss, metric, rising, recorded)


def _refuse_taken(metric: UserMetric, task: Task) -> None:
    """Refuse a metric under whose name something else is recorded, or read with a unit."""
    of_others = (measure for other in TASKS.values() for measure in other.measures if measure.unit)
    taken = next((m for m in (LOSS, *task.measures, *of_others) if m.name == metric.name), None)
    if taken is not None:
        raise UserCodeError(
            f"--metric {metric.reference}: {metric.name} is the name of a measure of cctool's own "
            f"({taken.title}); give the function another one"
        )


def _rising(metric: UserMetric, context: Context, settings: Mapping[str, JsonValue]) -> bool:
    """Whether larger values are better: as the command line, the function or an earlier training says."""
    asked = context.asked
    if isinstance(asked, FitOptions) and asked.metric_mode is MetricMode.MIN:
        return False
    if "metric_mode" in context.given:
        if not metric.rising:
            raise UsageError(
                f"--metric-mode max: the metric {metric.name} itself says that smaller values are better "
                "(its direction is min)"
            )
        return True
    # A training said so; the same function means the same later.
    same = str(settings.get("metric", "")).rpartition(":")[2] == metric.name
    return metric.rising and not (same and settings.get("direction") == "min")


def asked_of(options: Any) -> TaskOptions:
    """The options of the task among a verb's options."""
    for found in (options, getattr(options, "fit", None), getattr(options, "judge", None)):
        if isinstance(found, TaskOptions):
            return found
    return TaskOptions()


def with_task(
    checkpoint: Checkpoint, of_data: str | None, of_network: str | None, context: Context
) -> Checkpoint:
    """Record in the spec the task that holds.

    That is the one of ``--task``, else the recorded one, else the data set's, else the architecture's, if the
    outputs suit it; else outputs (N, C) mean classification, and others custom if the command line names a
    loss or a metric, or unknown.

    Args:
        checkpoint: as it was opened.
        of_data: the data set's task; None if it says none.
        of_network: the architecture's.
        context: of the command.

    Raises:
        UsageError: if ``--task`` names none.
        DataError: if the data set's task is none.
        TrainingError: if the outputs do not suit it.
    """
    asked, spec = context.asked, checkpoint.spec
    name = asked.task
    if of_data is not None and of_data not in TASKS:
        raise DataError(f"the data set says that its task is {of_data!r}; {', '.join(TASKS)} is allowed")
    if name is not None:
        if name not in TASKS:
            raise UsageError(f"--task {name}: {', '.join(TASKS)} is allowed")
        outputs = _outputs(checkpoint)
        if outputs is not _NOTHING and not TASKS[name].fits(outputs):
            # The task's own words say what it expects.
            TASKS[name].main_output(outputs)
            raise TrainingError(
                f"--task {name} does not suit what the network returns ({_shapes(outputs)}); these tasks do: "
                f"{', '.join(other for other, task in TASKS.items() if task.fits(outputs))}"
            )
    else:
        name = _found(
            checkpoint, of_data, of_network, context, named=asked.loss is not None or asked.metric is not None
        )
    settings = _settings(spec, context) if name == CUSTOM else {}
    if name == spec.task and settings == spec.task_settings:
        return checkpoint
    return replace(checkpoint, spec=spec.model_copy(update={"task": name, "task_settings": settings}))


def _found(
    checkpoint: Checkpoint, of_data: str | None, of_network: str | None, context: Context, *, named: bool
) -> str:
    spec = checkpoint.spec
    told = _told(checkpoint)
    if told and spec.task not in TASKS:
        # Which is an error where the task is asked for anything, and none where it is not.
        return spec.task
    if recorded_task(checkpoint) is not None:
        return spec.task
    wanted = [name for name in ((spec.task if told else None), of_data, of_network) if name in TASKS]
    if spec.task == UNKNOWN and not wanted and not named:
        return UNKNOWN
    outputs = _outputs(checkpoint)
    if outputs is _NOTHING:
        return spec.task
    # Outputs (N, C) are no classes on data that are for something else.
    wanted += [_DEFAULT] if of_data is None else []
    fitting = next((name for name in wanted if TASKS[name].fits(outputs)), None)
    if fitting is None and of_data in TASKS:
        context.say_once(
            f"the data are for {of_data}, which does not suit what the network returns ({_shapes(outputs)})"
        )
    return fitting or (CUSTOM if named else UNKNOWN)


def _told(checkpoint: Checkpoint) -> bool:
    spec = checkpoint.spec
    return spec.task not in (_DEFAULT, UNKNOWN) or (spec.task == _DEFAULT and bool(checkpoint.history))


def recorded_task(checkpoint: Checkpoint) -> str | None:
    """The task that a checkpoint was made for; None if it does not say, as foreign and old files."""
    spec = checkpoint.spec
    return spec.task if _told(checkpoint) and (spec.task != _DEFAULT or spec.classes is not None) else None


def _settings(spec: ModelSpec, context: Context) -> dict[str, JsonValue]:
    asked = context.asked
    settings = dict(spec.task_settings) if spec.task == CUSTOM else {}
    if asked.loss is not None:
        settings["loss"] = asked.loss
    if asked.metric is not None:
        metric = UserMetric(asked.metric, named_function(asked.metric, context.user_code, "--metric"))
        settings["metric"] = asked.metric
        settings["direction"] = "max" if _rising(metric, context, spec.task_settings) else "min"
    return settings


def _outputs(checkpoint: Checkpoint) -> Any:
    """What the network returns for two images of zeros; `_NOTHING` if it does not run on them."""
    model = checkpoint.model
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    images = torch.zeros(2, *checkpoint.spec.input_shape, device=device)
    # A network's own randomness must not move the generators that the command draws from.
    with torch.random.fork_rng(devices=devices), in_eval_mode(model), torch.no_grad():
        try:
            return model(images)
        except Exception:
            # The command that runs the network says what is wrong with it.
            return _NOTHING


def _shapes(outputs: Any) -> str:
    tensors = named_tensors(outputs).values()
    return ", ".join(f"shape {list(tensor.shape)} of {tensor.dtype}" for tensor in tensors) or "no tensor"
