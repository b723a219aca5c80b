"""Options of training itself, which `train` and `distill` share: names, defaults and checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from cctool.base.errors import UsageError
from cctool.options.common import TaskOptions
from cctool.options.fields import Choice, Idle, at_least, between, positive, section
from cctool.options.teacher import freeze_norm_option


class OptimizerName(Choice):
    """Optimizers of our own table; any other name must be a reference to the user's factory."""

    SGD = "sgd"
    ADAM = "adam"
    ADAMW = "adamw"


class Schedule(Choice):
    """How the learning rate changes after the warm-up."""

    CONSTANT = "constant"
    MULTISTEP = "multistep"
    COSINE = "cosine"
    ONECYCLE = "onecycle"
    POLY = "poly"


class Warmup(Choice):
    """How the learning rate grows during the first epochs."""

    LINEAR = "linear"
    EXPONENTIAL = "exponential"


class DecayScope(Choice):
    """What weight decay acts on: every parameter, or neither biases nor those of normalisation layers."""

    ALL = "all"
    WEIGHTS = "weights"


class MetricMode(Choice):
    """Whether a larger or a smaller validation metric is better."""

    MAX = "max"
    MIN = "min"


OPTIMIZER_DEFAULTS: dict[OptimizerName, tuple[float, float]] = {
    OptimizerName.SGD: (0.1, 0.01),
    OptimizerName.ADAM: (1e-3, 3e-4),
    OptimizerName.ADAMW: (3e-3, 5e-4),
}
"""Default learning rates of each optimizer: for a fresh network, and for one that was trained before."""

_SGD_WITHOUT_NORM = 0.02
_USER_DEFAULT = (1e-3, 3e-4)
_DEFAULT_MOMENTUM = 0.9
_DEFAULT_WARMUP_EPOCHS = 5
UNTRAINED = Idle(lambda asked: asked.fit.epochs == 0, "--epochs 0 trains nothing")
"""For options of a training that is none."""
_optimizer = partial(section("Optimizer"), idle=UNTRAINED)
_rate = partial(section("Learning rate"), idle=UNTRAINED)
_LOSS = "Loss, metric and what is kept"
_loss = partial(section(_LOSS), idle=UNTRAINED)


def _milestones(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(piece) for piece in text.split(","))
    except ValueError:
        raise UsageError(f"--milestones {text}: comma-separated epochs are expected, as in 15,25") from None


def _rates() -> str:
    """The default learning rates, as help states them."""
    fresh, trained = (
        ", ".join(f"{name} {rates[index]:g}" for name, rates in OPTIMIZER_DEFAULTS.items())
        for index in (0, 1)
    )
    fresh = fresh.replace(",", f" ({_SGD_WITHOUT_NORM:g} without batch norm),", 1)
    return f"{fresh}; for trained networks {trained}"


@dataclass(frozen=True)
class FitOptions(TaskOptions):
    """How a network is trained. None means that the default depends on another option."""

    # fmt: off
    epochs: int = _optimizer(
        30, "Passes over the training split, warm-up included; 0 trains nothing.", bounds=at_least(0),
        idle=())
    optimizer: str = _optimizer(
        OptimizerName.ADAMW.value, "Optimizer: sgd, adam, adamw or my.py:factory(groups, lr=...).",
        runs_code=True)
    lr: float | None = _rate(
        None, "Learning rate that the schedule multiplies.", unset=_rates(), bounds=positive())
    momentum: float | None = _optimizer(
        None, "Momentum of sgd.", unset=f"{_DEFAULT_MOMENTUM:g}", bounds=between("[0, 1)"))
    nesterov: bool = _optimizer(False, "Nesterov momentum for sgd.")
    weight_decay: float = _optimizer(
        5e-4, "L2 penalty (sgd, adam) or decoupled decay (adamw).", bounds=at_least(0))
    decay: DecayScope = _optimizer(
        DecayScope.ALL, "Decay all parameters, or only weights (no biases, no normalisation).",
        idle=(UNTRAINED, Idle(lambda asked: asked.fit.weight_decay == 0, "--weight-decay 0 decays nothing")))
    schedule: Schedule = _rate(
        Schedule.COSINE, "How the learning rate changes after the warm-up.", "--lr-schedule", "--schedule")
    milestones: tuple[int, ...] = _rate(
        (), "multistep: epochs after the warm-up at which the rate drops.", metavar="E,E,...",
        parse=_milestones)
    lr_gamma: float | None = _rate(
        None, "multistep: factor of each drop.", unset="0.1", bounds=between("(0, 1]"))
    power: float | None = _rate(None, "poly: exponent of the decay.", unset="1", bounds=positive())
    min_lr: float = _rate(0.0, "cosine and poly: final learning rate.", bounds=at_least(0))
    onecycle_warm: float | None = _rate(
        None, "onecycle: fraction of the steps in which the rate rises.", unset="0.3",
        bounds=between("(0, 1)"))
    warmup: Warmup | None = _rate(
        None, "Raise the rate linearly, or fourfold each epoch (exponential).",
        unset="linear with --warmup-epochs, else none")
    warmup_epochs: int | None = _rate(
        None, "Epochs of warm-up, counted in --epochs.",
        unset=f"{_DEFAULT_WARMUP_EPOCHS} with --warmup, else 0", bounds=at_least(0))
    label_smoothing: float = _loss(
        0.0, "Share of the target probability spread over all classes.", bounds=between("[0, 1)"))
    clip_norm: float | None = _optimizer(
        None, "Clip gradients to this L2 norm over all parameters.", bounds=positive())
    gamma_l1: float = _loss(
        0.0, "Weight of the L1 norm of batch-norm scales in the loss (Liu et al. 2017, equation 1).",
        bounds=at_least(0))
    rate_weight: float = _loss(
        0.0, "Weight of coded feature maps' bits per value in the loss; needs codecs.",
        bounds=between("[0, inf)"))
    metric_mode: MetricMode = _loss(
        MetricMode.MAX, "Whether larger or smaller values of --metric are better.",
        idle=Idle(lambda asked: asked.fit.metric is None, "there is no --metric; a task knows its own"))
    eval_from: int = _loss(
        1, "First epoch after which to evaluate; the last one always is.", bounds=at_least(1))
    augment: bool = _loss(
        True, "Augment training images as the data set recommends.", "--augment/--no-augment")
    freeze_norm: bool = freeze_norm_option(_LOSS, UNTRAINED)
    ema: float = _loss(
        0.0, "Average the weights over about 1/(1-DECAY) steps; the average is validated and written.",
        metavar="DECAY", bounds=between("[0, 1)"))
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Options of another optimizer, schedule or loss, and warm-ups that leave no epoch."""
        known = [name.value for name in OptimizerName]
        sgd = self.optimizer == OptimizerName.SGD.value
        # fmt: off
        return (
            (any(a >= b for a, b in zip((0, *self.milestones), self.milestones, strict=False)),
             f"--milestones {','.join(map(str, self.milestones))}: growing epochs above 0 are expected"),
            (self.epochs > 0 and self.warmup_length >= self.epochs,
             f"--warmup-epochs {self.warmup_length}: fewer than the {self.epochs} epochs are allowed"),
            (self.optimizer not in known and ":" not in self.optimizer,
             f"--optimizer {self.optimizer}: {', '.join(known)} or my.py:factory is allowed"),
            (self.momentum is not None and not sgd, f"--momentum belongs to sgd, not to {self.optimizer}"),
            (self.nesterov and not sgd, f"--nesterov belongs to sgd, not to {self.optimizer}"),
            (self.nesterov and self.momentum == 0, "--nesterov needs a --momentum above 0"),
            (self.schedule is Schedule.MULTISTEP and not self.milestones,
             "--lr-schedule multistep needs --milestones, as in --milestones 15,25"),
            *(
                (
                    given and self.schedule not in allowed,
                    f"{option} belongs to --lr-schedule {' or '.join(allowed)}",
                )
                for given, option, allowed in (
                    (bool(self.milestones), "--milestones", (Schedule.MULTISTEP,)),
                    (self.lr_gamma is not None, "--lr-gamma", (Schedule.MULTISTEP,)),
                    (self.power is not None, "--power", (Schedule.POLY,)),
                    (self.min_lr > 0, "--min-lr", (Schedule.COSINE, Schedule.POLY)),
                    (self.onecycle_warm is not None, "--onecycle-warm", (Schedule.ONECYCLE,)),
                )
            ),
            (self.loss is not None and self.label_smoothing > 0,
             "--label-smoothing belongs to cross-entropy; your own --loss does its own"),
            (self.metric is None and self.metric_mode is MetricMode.MIN,
             "--metric-mode min belongs to a --metric of your own; a task knows its own"),
            (self.warmup is not None and self.warmup_epochs == 0,
             "--warmup with --warmup-epochs 0 warms nothing up: leave one of them out"),
        )
        # fmt: on

    @property
    def warmup_length(self) -> int:
        """Epochs of warm-up."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return _DEFAULT_WARMUP_EPOCHS if self.warmup is not None else 0

    def learning_rate(self, *, fresh: bool, normalised: bool = True) -> float:
        """The learning rate asked for, or the default for a network.

        Args:
            fresh: whether it was never trained before.
            normalised: whether it has batch norm; without, SGD diverges at the rate that is usual with it.
        """
        if self.lr is not None:
            return self.lr
        if self.optimizer == OptimizerName.SGD.value and fresh and not normalised:
            return _SGD_WITHOUT_NORM
        known = {name.value: rates for name, rates in OPTIMIZER_DEFAULTS.items()}
        return known.get(self.optimizer, _USER_DEFAULT)[0 if fresh else 1]

    @property
    def sgd_momentum(self) -> float:
        """Momentum of SGD."""
        return _DEFAULT_MOMENTUM if self.momentum is None else self.momentum
