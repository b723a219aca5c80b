"""The training loop, for `train`, `distill` and the fine-tuning after a cut.

It knows neither files nor commands: it minimises an `Objective`, validates by a function that it is given,
and reports to observers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from cctool.base.errors import DataError, DivergedError
from cctool.base.networks import in_mode
from cctool.base.runtime import Reporter, Silent
from cctool.checkpoint.file.payload import ResumeState
from cctool.checkpoint.spec import Metrics
from cctool.data.serving.batches import Batch
from cctool.options.train.fit import FitOptions, MetricMode
from cctool.tasks.base import LOSS, Task, main_measure
from cctool.training.averaging import WeightAverage
from cctool.training.batch_norm import freeze_statistics
from cctool.training.constraints.base import Constraint
from cctool.training.logs.table import TOTAL, weight_sparsity
from cctool.training.loop.tally import Tally
from cctool.training.lr_schedules import multiplier
from cctool.training.objectives import Objective, Terms, gamma_penalty
from cctool.training.optimizers import make_optimizer
from cctool.training.processes import group_of
from cctool.training.resume.progress import Best, EpochRow, Progress, capture, restore

if TYPE_CHECKING:
    from lightning_fabric import Fabric


# Steps between two looks at the losses. A look waits for the device, which costs nothing on the CPU.
_LOOK_EVERY = {"cpu": 1, "cuda": 50}


class EpochBatches(Protocol):
    """This process's batches of one epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Training:
    """What is trained, on what and how.

    Attributes:
        model: changed in place; on the fabric's device when training ends.
        batches: epoch, from 0 -> this process's augmented training batches, the same number each epoch.
        options: epochs, optimizer, schedule and so on.
        objective: what is minimised.
        lr: base learning rate.
        fabric: device, precision and the processes that train together.
        validate: measures the network, not wrapped by Fabric; called by all processes. None keeps the last
            epoch as the best.
        user_code: references that the command line names.
        reporter: takes messages and progress.
        observers: called by the first process after each epoch with its row and the network.
        save: called by the first process after each epoch with the network and what resuming needs; the
            network then holds its own weights, not their average.
        resume: what an earlier `save` was given; the network must have the weights saved with it.
        stop_after: number of epochs after which this call stops.
        input_shape: (C, H, W) of one input; if given, and if the network runs in it, memory is channels last.
        constraints: what training must respect apart from the objective.
        judged_by: name of the validation metric by which the best epoch is chosen, and whether larger values
            are better; None takes the user's, else the main one of the objective's task.
    """

    model: nn.Module
    batches: Callable[[int], EpochBatches]
    options: FitOptions
    objective: Objective
    lr: float
    fabric: Fabric
    validate: Callable[[nn.Module], Metrics] | None = None
    user_code: Collection[str] = frozenset()
    reporter: Reporter = field(default_factory=Silent)
    observers: Sequence[Callable[[EpochRow, nn.Module], None]] = ()
    save: Callable[[nn.Module, ResumeState, Progress], None] | None = None
    resume: ResumeState | None = None
    stop_after: int | None = None
    input_shape: tuple[int, ...] | None = None
    constraints: Sequence[Constraint] = ()
    judged_by: tuple[str, bool] | None = None


@dataclass(frozen=True)
class FitResult:
    """How training went.

    Attributes:
        rows: one per epoch, including those of resumed runs.
        best: the best epoch by the validation metric, else the last; None if no epoch was trained.
        completed: whether all epochs are done.
    """

    rows: tuple[EpochRow, ...]
    best: Best | None
    completed: bool


def fit(training: Training) -> FitResult:
    """Train a network, which then holds the weights of the best epoch, or of the last if stopped early.

    Raises:
        DivergedError: if the loss or the weights become NaN or infinite; names the epoch.
        UserCodeError: if a user's function fails.
    """
    if training.options.epochs == 0:
        return FitResult((), None, completed=True)
    loop = _Loop(training)
    first = loop.progress.epoch
    while loop.progress.epoch < training.options.epochs:
        if training.stop_after is not None and loop.progress.epoch - first >= training.stop_after:
            break
        loop.run_epoch()
    completed, best = loop.progress.epoch >= training.options.epochs, loop.progress.best
    if completed and best is not None:
        training.model.load_state_dict(best.weights)
    training.model.to(memory_format=torch.contiguous_format)
    return FitResult(tuple(loop.progress.rows), best, completed)


class _Loop:
    """The state of one training run; ``bare`` is the network, ``model`` Fabric's wrapper of it."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.options = training.options
        self.fabric = training.fabric
        self.bare = training.model
        self.bare.to(self.fabric.device)
        self.layout = _memory_format(self.bare, self.fabric.device, training.input_shape)
        self.bare.to(memory_format=self.layout)
        self.bare.train()
        plain = make_optimizer(self.bare, training.lr, self.options, training.user_code)
        # A user's factory may give groups different rates; the schedule scales each from its own.
        for group in plain.param_groups:
            group["initial_lr"] = group["lr"]
        self.model, self.optimizer = self.fabric.setup(self.bare, plain, move_to_device=False)
        self.penalty = gamma_penalty(self.bare, self.options.gamma_l1)
        self.progress = Progress()
        if training.resume is not None:
            self.progress = restore(training.resume, self.bare.state_dict(), plain, self.fabric)
        self.average = WeightAverage(self.bare, self.options.ema) if self.options.ema else None
        if self.average is not None and training.resume is not None:
            self.average.restore(training.resume.tensors)
        self.steps = len(training.batches(0))
        if not self.steps:
            raise DataError("the training split has fewer images than there are processes")

    def run_epoch(self) -> None:
        epoch = self.progress.epoch
        started = time.perf_counter()
        tally, lr = self._train(epoch)
        seconds = time.perf_counter() - started
        self._refuse_broken_weights(epoch)
        with nullcontext() if self.average is None else self.average.in_place():
            metrics = self._validate(epoch)
            row = EpochRow(
                epoch=epoch + 1,
                lr=lr,
                batch_ms=1000 * seconds / self.steps,
                seconds=seconds,
                n=tally.n,
                train=tally.means(),
                validation=dict(metrics.values) if metrics else {},
                validation_n=metrics.n if metrics else 0,
                sparsity=weight_sparsity(self.bare)[TOTAL],
            )
            row = self._compared(row, metrics)
        self._record(row)

    def _train(self, epoch: int) -> tuple[Tally, float]:
        self.bare.train()
        if self.options.freeze_norm:
            freeze_statistics(self.bare)
        for constraint in self.training.constraints:
            constraint.epoch(epoch)
        objective = self.training.objective
        tally = Tally(epoch, objective.task, objective.user, _LOOK_EVERY[self.fabric.device.type])
        title = f"epoch {epoch + 1}/{self.options.epochs}"
        lr = 0.0
        batches = self.training.reporter.progress(self.training.batches(epoch), title, total=self.steps)
        for step, batch in enumerate(batches):
            if batch.labels is None and objective.needs_targets:
                raise DataError("the training split has no labels")
            lr = self._set_learning_rate(epoch * self.steps + step)
            terms = self._step(batch.images, batch.labels)
            tally.add(terms, batch.labels, len(batch.images))
        tally.finish(group_of(self.fabric), self.fabric.device)
        return tally, lr

    def _set_learning_rate(self, step: int) -> float:
        floor = self.options.min_lr / self.training.lr
        factor = multiplier(step, self.steps, self.options, floor)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return float(self.optimizer.param_groups[0]["lr"])

    def _step(self, images: Tensor, labels: Tensor | None) -> Terms:
        images = images.to(self.fabric.device, memory_format=self.layout, non_blocking=True)
        if labels is not None:
            labels = labels.to(self.fabric.device, non_blocking=True)
        terms = self.training.objective(self.model, images, labels)
        for name, extra in self._penalties():
            components = dict(terms.components) or {"loss_without_penalty": terms.loss}
            terms = Terms(terms.loss + extra, terms.output, components | {name: extra})
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(terms.loss)
        for constraint in self.training.constraints:
            constraint.gradients()
        if self.options.clip_norm is not None:
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.options.clip_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        with torch.no_grad():
            for constraint in self.training.constraints:
                constraint.weights()
        if self.average is not None:
            self.average.update()
        return terms

    def _penalties(self) -> Iterator[tuple[str, Tensor]]:
        if self.penalty is not None:
            yield "gamma_l1", self.penalty()
        for constraint in self.training.constraints:
            extra = constraint.penalty()
            if extra is not None:
                yield constraint.name, extra

    def _refuse_broken_weights(self, epoch: int) -> None:
        for name, value in self.bare.state_dict().items():
            if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                raise DivergedError(
                    f"{name} became NaN or infinite in epoch {epoch + 1}; "
                    "a smaller --lr or --clip-norm may help"
                )

    def _validate(self, epoch: int) -> Metrics | None:
        last = epoch + 1 == self.options.epochs
        if self.training.validate is None or (epoch + 1 < self.options.eval_from and not last):
            return None
        if self.fabric.world_size > 1:
            # Running statistics differ between processes; those of the first are measured and saved.
            for buffer in self.bare.buffers():
                torch.distributed.broadcast(buffer, src=0)
        return self.training.validate(self.bare)

    def _compared(self, row: EpochRow, metrics: Metrics | None) -> EpochRow:
        """The row; if its epoch is the best so far, it is marked so and the network's weights are kept."""
        self.progress.epoch = row.epoch
        if not self._is_better(metrics):
            return row
        self.progress.best = Best(row.epoch, metrics, _copy_of_state(self.bare))
        return replace(row, best=True)

    def _record(self, row: EpochRow) -> None:
        progress = self.progress
        progress.rows.append(row)
        if self.training.save is not None:
            state = capture(progress, self.optimizer, self.fabric, self.average)
            if self.fabric.is_global_zero:
                self.training.save(self.bare, state, progress)
        if self.fabric.is_global_zero:
            for observer in self.training.observers:
                observer(row, self.bare)

    def _is_better(self, metrics: Metrics | None) -> bool:
        if self.training.validate is None:
            return self.progress.epoch == self.options.epochs
        if metrics is None:
            return False
        best = self.progress.best
        if best is None or best.metrics is None:
            return True
        new, old = metrics.values, best.metrics.values
        name, rising = self.training.judged_by or _judged_by(self.options, self.training.objective.task)
        # Outputs that do not suit the task have no such metric; the loss is compared instead.
        if name not in new:
            name, rising = LOSS.name, LOSS.rising
        if name not in new or name not in old:
            return True
        return new[name] > old[name] if rising else new[name] < old[name]


def _judged_by(options: FitOptions, task: Task) -> tuple[str, bool]:
    if options.metric is not None:
        return options.metric.rpartition(":")[2], options.metric_mode is MetricMode.MAX
    main = main_measure(task)
    return main.name, main.rising


def _memory_format(
    model: nn.Module, device: torch.device, input_shape: tuple[int, ...] | None
) -> torch.memory_format:
    """Channels last if the network runs in it, because both cuDNN and oneDNN are faster then.

    Code such as ``x.view(x.size(0), -1)`` after a convolution needs contiguous memory; a trial run shows it.
    """
    has_convolutions = any(isinstance(module, nn.Conv2d) for module in model.modules())
    # Tensors of five dimensions (3-D convolutions) have no channels-last format.
    fits = all(tensor.dim() <= 4 for tensor in (*model.parameters(), *model.buffers()))
    if input_shape is None or not has_convolutions or not fits or _corrupts_memory(model, device):
        return torch.contiguous_format
    model.to(memory_format=torch.channels_last)
    inputs = torch.zeros(2, *input_shape, device=device).to(memory_format=torch.channels_last)
    try:
        for training in (False, True):
            with in_mode(model, training=training), torch.no_grad():
                model(inputs)
    except Exception:
        # An error of another cause is raised again by the first step of training.
        model.to(memory_format=torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def _corrupts_memory(model: nn.Module, device: torch.device) -> bool:
    """Whether training channels last would crash the process.

    The gradient of a strided 1x1 convolution with fewer than 8 input channels then writes past its memory
    (torch 2.14.1 with oneDNN 3.12 on x86 CPUs); thinned residual networks have such convolutions.
    """
    return device.type == "cpu" and any(
        isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.in_channels // module.groups < 8
        for module in model.modules()
    )


def _copy_of_state(model: nn.Module) -> dict[str, Any]:
    return {
        name: value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        if isinstance(value, Tensor)
        else value
        for name, value in model.state_dict().items()
    }
