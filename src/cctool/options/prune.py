"""What `cctool prune` can be asked: methods, scopes and the options of one run, with their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cctool.errors import UsageError
from cctool.options.common import Choice, DataOptions


class PruneMethod(Choice):
    """How units are ranked; the lowest go first."""

    SLIMMING = "slimming"
    L1 = "l1"
    L2 = "l2"
    RANDOM = "random"


class Scope(Choice):
    """Whether units compete across the whole network, or only within their family."""

    GLOBAL = "global"
    LOCAL = "local"


class StepMode(Choice):
    """Whether each step starts from the source network, or from the step before."""

    INDEPENDENT = "independent"
    PROGRESSIVE = "progressive"


class PrunePreset(Choice):
    """A published procedure, reproduced formula by formula."""

    LHY_HW7 = "lhy-hw7"


@dataclass(frozen=True)
class PruneOptions:
    """Options of one pruning.

    Attributes:
        method: how units are ranked.
        rate: fraction of the removable units that go, in [0, 1); with several steps, reached at the last one.
        scope: where units compete; None is the method's own custom, see `effective_scope`.
        round_to: kept widths are multiples of this, rounded up.
        exclude: glob patterns of parameters, modules or families that keep their width.
        only: glob patterns; where given, families that match none keep their width.
        keep: fraction of each family's width that every step keeps, truncated to whole channels: the width
            after step i is int(width * keep**i). In place of `rate`; local scope only.
        dry_run: plan and report, cut nothing.
        steps: number of steps, each with a checkpoint of its own.
        step_mode: what a step starts from.
        finetune_epochs: epochs of training after each step, each with a new optimizer.
        optimizer: of the fine-tuning: ``sgd``, ``adam``, ``adamw`` or the user's ``my.py:factory``.
        lr: learning rate of the fine-tuning; None takes the optimizer's default for trained networks.
        keep_storage: store fine-tuned tensors again as they were stored before.
        recalibrate: number of images from which batch-norm statistics are estimated again; 0 leaves them.
        preset: the published method that these options were taken from; see `preset_options`.
        data: what fine-tuning, recalibration and measuring use.
    """

    method: PruneMethod = PruneMethod.SLIMMING
    rate: float = 0.5
    scope: Scope | None = None
    round_to: int = 1
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    keep: float | None = None
    dry_run: bool = False
    steps: int = 1
    step_mode: StepMode = StepMode.INDEPENDENT
    finetune_epochs: int = 0
    optimizer: str = "adamw"
    lr: float | None = None
    keep_storage: bool = False
    recalibrate: int = 0
    preset: PrunePreset | None = None
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        problems = [
            message
            for wrong, message in (
                (not 0 <= self.rate < 1, f"rate {self.rate} is outside [0, 1): give the fraction to remove"),
                (self.round_to < 1, f"round_to {self.round_to} is below 1: 1 leaves widths as they come"),
                (self.steps < 1, f"steps {self.steps} is below 1: one step prunes once"),
                (
                    self.finetune_epochs < 0,
                    f"finetune_epochs {self.finetune_epochs} is negative: 0 skips it",
                ),
                (self.lr is not None and self.lr <= 0, f"lr {self.lr} is not positive"),
                (self.recalibrate < 0, f"recalibrate {self.recalibrate} is negative: 0 keeps the statistics"),
                (
                    self.keep is not None and not 0 < self.keep <= 1,
                    f"keep {self.keep} is outside (0, 1]: give the fraction of each width to keep",
                ),
                (
                    self.keep is not None and self.scope is Scope.GLOBAL,
                    "keep fixes the width of each family, which leaves scope global nothing to do",
                ),
            )
            if wrong
        ]
        if problems:
            raise UsageError("; ".join(problems))

    @property
    def effective_scope(self) -> Scope:
        """The scope asked for, else the custom of the method's paper.

        Slimming compares scales across the whole network (Liu et al. 2017, section 3), norms of filters
        with different fan-in do not compare, so that the others rank within a family (Li et al. 2017,
        section 3.1).
        """
        if self.scope is not None:
            return self.scope
        if self.keep is None and self.method is PruneMethod.SLIMMING:
            return Scope.GLOBAL
        return Scope.LOCAL

    def rate_at(self, step: int) -> float:
        """Fraction of the units of the network that this step starts from to remove, for step 1..steps.

        The kept fraction shrinks by the same factor at each step: 1 - (1 - rate) ** (step / steps) for
        independent steps, 1 - (1 - rate) ** (1 / steps) for progressive ones.
        """
        power = step if self.step_mode is StepMode.INDEPENDENT else 1
        return 1 - (1 - self.rate) ** (power / self.steps) if self.steps > 1 else self.rate

    def keep_at(self, step: int) -> float | None:
        """Fraction of each width to keep at this step, where `keep` sets it."""
        if self.keep is None:
            return None
        return self.keep**step if self.step_mode is StepMode.INDEPENDENT else self.keep


PRESETS: dict[PrunePreset, dict[str, Any]] = {
    # H.-Y. Lee's ML2020 homework 7: the four widest bandwidths of the MobileNet student, that is the channels
    # that enter blocks 4..7, ranked by the batch norm behind each block's depthwise convolution.
    PrunePreset.LHY_HW7: {
        "method": PruneMethod.SLIMMING,
        "scope": Scope.LOCAL,
        "keep": 0.95,
        "only": ("cnn.4.1", "cnn.5.1", "cnn.6.1", "cnn.7.1"),
        "steps": 5,
        "step_mode": StepMode.INDEPENDENT,
        "finetune_epochs": 5,
        "optimizer": "adamw",
        "lr": 1e-3,
    },
}
"""The options that each preset sets."""


def preset_options(preset: PrunePreset | None, **given: Any) -> PruneOptions:
    """Make options as a preset sets them, except for those that are given."""
    chosen = PRESETS[preset] if preset is not None else {}
    return PruneOptions(**(chosen | given), preset=preset)
