"""Options of training itself, which `train` and `distill` share: names, defaults and checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cctool.base.errors import UsageError
from cctool.options.common import Choice

__all__ = [
    "OPTIMIZER_DEFAULTS",
    "DecayScope",
    "FitOptions",
    "MetricMode",
    "OptimizerName",
    "Schedule",
    "Warmup",
]


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
"""Learning rate where none is given: of a fresh network, and of one that was trained before."""

_SGD_WITHOUT_NORM = 0.02
_USER_DEFAULT = (1e-3, 3e-4)
_DEFAULT_MOMENTUM = 0.9
_DEFAULT_WARMUP_EPOCHS = 5


@dataclass(frozen=True)
class FitOptions:
    """How a network is trained. None means that the default depends on another option, named below.

    Attributes:
        epochs: passes over the training split, warm-up included; 0 trains nothing.
        optimizer: ``sgd``, ``adam``, ``adamw`` or the user's ``my.py:factory``.
        lr: learning rate that the schedule multiplies; default by optimizer, see `OPTIMIZER_DEFAULTS`.
        momentum: of SGD; 0.9 by default.
        nesterov: SGD with Nesterov's momentum.
        weight_decay: L2 penalty (SGD, Adam) or decoupled decay (AdamW).
        decay: what weight decay acts on.
        schedule: learning rate after the warm-up.
        milestones: epochs after the warm-up at which ``multistep`` multiplies by ``lr_gamma``.
        lr_gamma: factor of ``multistep``; 0.1 by default.
        power: exponent of ``poly``; 1 by default.
        min_lr: learning rate at which ``cosine`` and ``poly`` end.
        onecycle_warm: fraction of the steps in which ``onecycle`` rises; 0.3 by default.
        warmup: kind of warm-up; linear where only ``warmup_epochs`` is given.
        warmup_epochs: its length; 5 where only ``warmup`` is given, otherwise 0.
        label_smoothing: share of the target spread over all classes, in [0, 1).
        clip_norm: largest L2 norm of all gradients together; None clips nothing.
        gamma_l1: weight of the sum of |gamma| over batch-norm layers, added to the loss
            (Liu et al. 2017, arXiv 1708.06519, equation 1).
        rate_weight: weight of the coded feature maps' bits a value, added to the loss; needs taps.
        loss: the user's ``my.py:function(outputs, labels) -> scalar`` in place of cross-entropy.
        metric: the user's ``my.py:function(outputs, labels) -> number`` over a whole split; decides which
            epoch is best.
        metric_mode: whether larger or smaller values of ``metric`` are better.
        eval_from: first epoch (counted from 1) after which the validation split is evaluated.
        augment: whether training images are augmented as the data set recommends.
        freeze_norm: whether batch norm normalises by its running statistics, which then stay as they are.
        ema: decay of an exponential moving average of the weights, which is validated and handed out in
            place of the last weights; 0 is none.
    """

    epochs: int = 30
    optimizer: str = OptimizerName.ADAMW.value
    lr: float | None = None
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay: DecayScope = DecayScope.ALL
    schedule: Schedule = Schedule.COSINE
    milestones: tuple[int, ...] = ()
    lr_gamma: float | None = None
    power: float | None = None
    min_lr: float = 0.0
    onecycle_warm: float | None = None
    warmup: Warmup | None = None
    warmup_epochs: int | None = None
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    gamma_l1: float = 0.0
    rate_weight: float = 0.0
    loss: str | None = None
    metric: str | None = None
    metric_mode: MetricMode = field(default=MetricMode.MAX)
    eval_from: int = 1
    augment: bool = True
    freeze_norm: bool = False
    ema: float = 0.0

    def __post_init__(self) -> None:
        problems = [text for wrong, text in (*self._ranges(), *self._clashes()) if wrong]
        if problems:
            raise UsageError("; ".join(problems))

    def _ranges(self) -> tuple[tuple[bool, str], ...]:
        return (
            (self.epochs < 0, f"--epochs {self.epochs}: 0 or more is allowed"),
            (self.lr is not None and not self.lr > 0, f"--lr {self.lr}: a positive number is needed"),
            (
                self.momentum is not None and not 0 <= self.momentum < 1,
                f"--momentum {self.momentum}: [0, 1) is allowed",
            ),
            (not self.weight_decay >= 0, f"--weight-decay {self.weight_decay}: 0 or more is allowed"),
            (not self.min_lr >= 0, f"--min-lr {self.min_lr}: 0 or more is allowed"),
            (
                self.lr_gamma is not None and not 0 < self.lr_gamma <= 1,
                f"--lr-gamma {self.lr_gamma}: (0, 1] is allowed",
            ),
            (self.power is not None and not self.power > 0, f"--power {self.power}: more than 0 is needed"),
            (
                self.onecycle_warm is not None and not 0 < self.onecycle_warm < 1,
                f"--onecycle-warm {self.onecycle_warm}: (0, 1) is allowed",
            ),
            (
                any(a >= b for a, b in zip((0, *self.milestones), self.milestones, strict=False)),
                f"--milestones {','.join(map(str, self.milestones))}: growing epochs above 0 are expected",
            ),
            (
                not 0 <= self.label_smoothing < 1,
                f"--label-smoothing {self.label_smoothing}: [0, 1) is allowed",
            ),
            (
                self.clip_norm is not None and not self.clip_norm > 0,
                f"--clip-norm {self.clip_norm}: a positive number is needed",
            ),
            (not self.gamma_l1 >= 0, f"--gamma-l1 {self.gamma_l1}: 0 or more is allowed"),
            (not 0 <= self.ema < 1, f"--ema {self.ema}: 0 or more, below 1, is allowed"),
            (not 0 <= self.rate_weight < math.inf, f"--rate-weight {self.rate_weight}: 0 or more is allowed"),
            (self.eval_from < 1, f"--eval-from {self.eval_from}: epochs count from 1"),
            (
                self.warmup_epochs is not None and self.warmup_epochs < 0,
                f"--warmup-epochs {self.warmup_epochs}: 0 or more is allowed",
            ),
            (
                self.epochs > 0 and self.warmup_length >= self.epochs,
                f"--warmup-epochs {self.warmup_length}: fewer than the {self.epochs} epochs are allowed",
            ),
        )

    def _clashes(self) -> tuple[tuple[bool, str], ...]:
        known = [name.value for name in OptimizerName]
        sgd = self.optimizer == OptimizerName.SGD.value
        return (
            (
                self.optimizer not in known and ":" not in self.optimizer,
                f"--optimizer {self.optimizer}: {', '.join(known)} or my.py:factory is allowed",
            ),
            (self.momentum is not None and not sgd, f"--momentum belongs to sgd, not to {self.optimizer}"),
            (self.nesterov and not sgd, f"--nesterov belongs to sgd, not to {self.optimizer}"),
            (self.nesterov and self.momentum == 0, "--nesterov needs a --momentum above 0"),
            (
                self.schedule is Schedule.MULTISTEP and not self.milestones,
                "--schedule multistep needs --milestones, as in --milestones 15,25",
            ),
            *(
                (
                    given and self.schedule not in allowed,
                    f"{option} belongs to --schedule {' or '.join(allowed)}",
                )
                for given, option, allowed in (
                    (bool(self.milestones), "--milestones", (Schedule.MULTISTEP,)),
                    (self.lr_gamma is not None, "--lr-gamma", (Schedule.MULTISTEP,)),
                    (self.power is not None, "--power", (Schedule.POLY,)),
                    (self.min_lr > 0, "--min-lr", (Schedule.COSINE, Schedule.POLY)),
                    (self.onecycle_warm is not None, "--onecycle-warm", (Schedule.ONECYCLE,)),
                )
            ),
            (
                self.loss is not None and self.label_smoothing > 0,
                "--label-smoothing belongs to cross-entropy; your own --loss does its own",
            ),
            (
                self.metric is None and self.metric_mode is MetricMode.MIN,
                "--metric-mode min belongs to a --metric of your own; top-1 is better when larger",
            ),
            (
                self.warmup is not None and self.warmup_epochs == 0,
                "--warmup with --warmup-epochs 0 warms nothing up: leave one of them out",
            ),
        )

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
