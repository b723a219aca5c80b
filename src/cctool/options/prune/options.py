"""What `cctool prune` can be asked: the options of one run, with their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cctool.base.errors import UsageError
from cctool.options.common import Choice, DataOptions
from cctool.options.prune.choices import (
    CHANNELS_ONLY,
    NEEDS_DATA,
    AttentionUnit,
    Granularity,
    Growth,
    Images,
    Normalize,
    PruneMethod,
    Reduce,
    Scope,
    StepMode,
)
from cctool.options.prune.parts import Block, Pattern, Sparsifier, SparsifyOptions, Target, TeacherOptions

__all__ = [
    "AUTO_ROUND",
    "PRESETS",
    "AttentionUnit",
    "Granularity",
    "Growth",
    "Images",
    "Normalize",
    "PruneMethod",
    "PruneOptions",
    "PrunePreset",
    "Reduce",
    "Scope",
    "StepMode",
    "preset_options",
]

AUTO_ROUND = 8
"""Multiple of channels that ``--round-to auto`` keeps: what vector units of CPUs and tensor cores like."""


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
        reduce: how the scores of a unit's several tensors become one; None is the method's own custom.
        normalize: how the scores of a family are scaled before families are compared; None is the method's
            own custom.
        granularity: what goes: whole channels physically, or single weights, blocks, kernels, rows or
            columns by a mask.
        pattern: how many of how many neighbours stay, for granularity ``nm``.
        block: rows and columns of a block, for granularity ``block``.
        mask: only mask the channels that would be cut; their weights become and stay zero.
        apply_masks: cut what earlier masks left empty, and choose nothing new.
        target: what the network may cost afterwards; in place of `rate`.
        max_drop: points of the metric on the validation split that may be lost; in place of `rate`.
        rates: path of a CSV or JSON table, family or layer -> rate; in place of `rate`.
        round_to: kept widths are multiples of this, rounded up; None is `AUTO_ROUND` where the family has
            that many channels.
        min_channels: no family is cut below so many channels.
        exclude: glob patterns of parameters, modules or families that keep their width.
        only: glob patterns; where given, families that match none keep their width.
        exact: leave widths alone over which statistics run (layer norm, attention), so that what is left
            computes exactly what the masked network does.
        attention: what goes from attention, where the network's code allows it.
        keep: fraction of each family's width that every step keeps, truncated to whole channels: the width
            after step i is int(width * keep**i). In place of `rate`; local scope only.
        steps: number of steps, each with a checkpoint of its own.
        step_mode: what a step starts from.
        growth: how the rate grows from step to step.
        finetune_epochs: epochs of training after each step, each with a new optimizer.
        optimizer: of the fine-tuning: ``sgd``, ``adam``, ``adamw`` or the user's ``my.py:factory``.
        lr: learning rate of the fine-tuning; None takes the optimizer's default for trained networks.
        rewind: path of an earlier checkpoint whose weights the surviving channels or weights get back.
        from_scratch: initialise the thinned network anew: the control that pruning has to beat.
        sparsify: training that drives units towards zero before they are cut.
        teacher: a network that is followed while fine-tuning.
        keep_storage: store fine-tuned tensors again as they were stored before.
        recalibrate: number of images from which batch-norm statistics are estimated again; 0 leaves them.
        recalibrate_images: which; None is plain, for `max_drop` whichever suits the dense network better.
        samples: number of training images that data-driven methods look at.
        plot: draw the kept widths beside the product.
        plot_file: path of that picture.
        preset: the published method that these options were taken from; see `preset_options`.
        data: what fine-tuning, recalibration and measuring use.
    """

    method: PruneMethod = PruneMethod.SLIMMING
    rate: float = 0.5
    scope: Scope | None = None
    reduce: Reduce | None = None
    normalize: Normalize | None = None
    granularity: Granularity = Granularity.CHANNEL
    pattern: Pattern | None = None
    block: Block | None = None
    mask: bool = False
    apply_masks: bool = False
    target: Target | None = None
    max_drop: float | None = None
    rates: str | None = None
    round_to: int | None = 1
    min_channels: int = 1
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    exact: bool = False
    attention: AttentionUnit = AttentionUnit.POSITIONS
    keep: float | None = None
    steps: int = 1
    step_mode: StepMode = StepMode.INDEPENDENT
    growth: Growth = Growth.EXPONENTIAL
    finetune_epochs: int = 0
    optimizer: str = "adamw"
    lr: float | None = None
    rewind: str | None = None
    from_scratch: bool = False
    sparsify: SparsifyOptions | None = None
    teacher: TeacherOptions | None = None
    keep_storage: bool = False
    recalibrate: int = 0
    recalibrate_images: Images | None = None
    samples: int = 1024
    plot: bool = field(default=False, metadata={"recorded": False})
    plot_file: str | None = field(default=None, metadata={"recorded": False})
    preset: PrunePreset | None = None
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        problems = [text for wrong, text in (*self._ranges(), *self._clashes()) if wrong]
        if problems:
            raise UsageError("; ".join(problems))

    def _ranges(self) -> tuple[tuple[bool, str], ...]:
        return (
            (not 0 <= self.rate < 1, f"rate {self.rate} is outside [0, 1): give the fraction to remove"),
            (
                self.round_to is not None and self.round_to < 1,
                f"round_to {self.round_to} is below 1: 1 leaves widths as they come",
            ),
            (self.min_channels < 1, f"min_channels {self.min_channels} is below 1: one channel always stays"),
            (self.steps < 1, f"steps {self.steps} is below 1: one step prunes once"),
            (self.finetune_epochs < 0, f"finetune_epochs {self.finetune_epochs} is negative: 0 skips it"),
            (self.lr is not None and self.lr <= 0, f"lr {self.lr} is not positive"),
            (self.recalibrate < 0, f"recalibrate {self.recalibrate} is negative: 0 keeps the statistics"),
            (self.samples < 1, f"samples {self.samples} is below 1: the method needs images to look at"),
            (
                self.max_drop is not None and not self.max_drop >= 0,
                f"max_drop {self.max_drop}: points of the metric, 0 or more, are allowed",
            ),
            (
                self.keep is not None and not 0 < self.keep <= 1,
                f"keep {self.keep} is outside (0, 1]: give the fraction of each width to keep",
            ),
        )

    def _clashes(self) -> tuple[tuple[bool, str], ...]:
        goals = {
            "--keep": self.keep is not None,
            "--target": self.target is not None,
            "--max-drop": self.max_drop is not None,
            "--rates": self.rates is not None,
            "--apply-masks": self.apply_masks,
        }
        given = [name for name, there in goals.items() if there]
        channels = self.granularity is Granularity.CHANNEL
        searched = self.target is not None or self.max_drop is not None
        weights = self.granularity is not Granularity.CHANNEL
        return (
            (
                weights and self.method in CHANNELS_ONLY,
                f"--method {self.method} ranks channels, not the parts of weights that --granularity "
                f"{self.granularity} masks: l1, l2, lamp, taylor, hessian, gradient and random do",
            ),
            (len(given) > 1, f"{' and '.join(given)} each say how much goes: give one of them"),
            (
                self.keep is not None and self.scope is Scope.GLOBAL,
                "keep fixes the width of each family, which leaves scope global nothing to do",
            ),
            (
                self.rates is not None and self.scope is Scope.GLOBAL,
                "--rates fixes the rate of each family, which leaves --scope global nothing to do",
            ),
            (
                not channels and bool(given) and given != ["--rates"],
                f"{', '.join(given)} with --granularity {self.granularity}: masks of single weights change "
                "no width; --rate and --rates say how many weights go",
            ),
            (
                not channels and self.mask,
                f"--granularity {self.granularity} masks anyway; --mask belongs to channels",
            ),
            (
                self.apply_masks and self.rewind is not None,
                "--apply-masks changes no output, and --rewind all of them: rewind in a command of its own",
            ),
            (
                self.granularity is Granularity.NM and self.rates is not None,
                "--granularity nm fixes how many weights stay, which leaves --rates nothing to do: --only "
                "and --exclude choose layers",
            ),
            (
                self.granularity is Granularity.NM and self.steps > 1,
                "--granularity nm fixes how many weights stay, which leaves --steps nothing to do",
            ),
            (
                not channels and self.sparsify is not None and self.sparsify.method is Sparsifier.GROWING,
                f"--sparsify growing pushes the channels that go, and --granularity {self.granularity} masks "
                "weights: gamma-l1 and group-lasso act on all channels",
            ),
            (self.mask and self.apply_masks, "--mask and --apply-masks are two different commands"),
            (
                self.pattern is not None and self.granularity is not Granularity.NM,
                "--pattern belongs to --granularity nm",
            ),
            (
                self.block is not None and self.granularity is not Granularity.BLOCK,
                "--block belongs to --granularity block",
            ),
            (
                searched and self.steps > 1 and self.max_drop is not None,
                "--max-drop finds one rate, with which --steps has nothing to do",
            ),
            (
                self.rewind is not None and self.from_scratch,
                "--rewind and --from-scratch both set the weights of the thinned network: give one",
            ),
        )

    @property
    def effective_scope(self) -> Scope:
        """The scope asked for, else the custom of the method's paper.

        Slimming compares scales across the whole network (Liu et al. 2017, section 3), LAMP and the
        estimates of a loss's change compare by construction; norms of filters with different fan-in do not,
        so that the others rank within a family (Li et al. 2017, section 3.1).
        """
        if self.scope is not None:
            return self.scope
        fixed = self.keep is not None or self.rates is not None
        return Scope.GLOBAL if not fixed and self.method in _GLOBAL else Scope.LOCAL

    @property
    def needs_data(self) -> bool:
        """Whether the method itself looks at images."""
        return self.method in NEEDS_DATA and not self.apply_masks

    def rate_at(self, step: int, rate: float | None = None) -> float:
        """Fraction of the units of the network that this step starts from to remove, for step 1..steps.

        Args:
            step: its number.
            rate: what is reached at the last step; None is `rate`.
        """
        full = self.rate if rate is None else rate
        reached = self.growth.at(full, step, self.steps)
        if self.step_mode is StepMode.INDEPENDENT or step == 1:
            return reached
        return 1 - (1 - reached) / (1 - self.growth.at(full, step - 1, self.steps))

    def keep_at(self, step: int) -> float | None:
        """Fraction of each width to keep at this step, where `keep` sets it."""
        if self.keep is None:
            return None
        return self.keep**step if self.step_mode is StepMode.INDEPENDENT else self.keep


_GLOBAL = frozenset({PruneMethod.SLIMMING, PruneMethod.LAMP, PruneMethod.TAYLOR, PruneMethod.HESSIAN})

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
