"""What `cctool prune` can be asked: the options of one run, with their checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cctool.base.errors import UsageError
from cctool.options.common import DataOptions, TaskOptions, judged
from cctool.options.fields import (
    Choice,
    Idle,
    Options,
    assemble,
    at_least,
    between,
    nested,
    option,
    positive,
    section,
)
from cctool.options.prune.choices import (
    CHANNELS_ONLY,
    GLOBAL,
    NEEDS_DATA,
    AttentionUnit,
    Granularity,
    Growth,
    Images,
    Normalize,
    PruneMethod,
    Reduce,
    Scope,
    Sparsifier,
    StepMode,
)
from cctool.options.prune.patterns import Block, Pattern, parse_block, parse_pattern
from cctool.options.target import Drop, Target, parse_drop, parse_target
from cctool.options.teacher import (
    TeacherOptions,
    keep_storage_option,
    lr_option,
    optimizer_option,
    teacher_option,
)

AUTO_ROUND = 8
"""Multiple of channels that ``--round-to auto`` keeps: what vector units of CPUs and tensor cores like."""

_ranking = section("What goes first")
_amount = section("How much goes")
_shape = section("What may go")
_TRAINING = "Training before and after"
_training = section(_TRAINING)
_report = section("Report")


class PrunePreset(Choice):
    """A published procedure, reproduced formula by formula."""

    LHY_HW7 = "lhy-hw7"


@dataclass(frozen=True)
class SparsifyOptions(Options):
    """Training that drives units towards zero before they are cut."""

    # fmt: off
    method: Sparsifier = option(
        ..., "First train with a penalty that drives units towards zero.", "--sparsify")
    epochs: int = option(1, "Epochs of the sparse training.", "--sparsify-epochs", bounds=at_least(1))
    strength: float | None = option(
        None, "Weight of its penalty; for growing, the size of its increments.", "--sparsify-strength",
        unset="the method's", bounds=positive())
    lr: float | None = option(
        None, "Its learning rate.", "--sparsify-lr", unset="the optimizer's rate for trained networks",
        bounds=positive())
    # fmt: on


def _round(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--round-to {text}: a whole number from 1 on, or auto, is expected")
    return int(text)


# fmt: off
_UNTUNED = Idle(lambda asked: asked.finetune_epochs == 0,
                "nothing is fine-tuned; --finetune-epochs says for how long")
_UNTRAINED = Idle(lambda asked: asked.finetune_epochs == 0 and asked.sparsify is None,
                  "nothing is trained; --finetune-epochs says for how long")
_ONE_STEP = Idle(lambda asked: asked.steps == 1,
                 "a single step has no intermediate rates; --steps says how many there are")
_NO_CHOICE = Idle(lambda asked: asked.apply_masks, "--apply-masks cuts what is empty, and chooses nothing")
_NO_WIDTHS = Idle(lambda asked: asked.apply_masks,
                  "--apply-masks cuts what changes no output, and plans no widths")
_MASKS_ONLY = Idle(lambda asked: asked.granularity is not Granularity.CHANNEL,
                   lambda asked: f"--granularity {asked.granularity} changes no width")
# fmt: on


@dataclass(frozen=True)
class PruneOptions(Options):
    """Options of one pruning."""

    # fmt: off
    method: PruneMethod = _ranking(
        PruneMethod.SLIMMING, "How units are ranked; the lowest scores go. taylor, hessian, gradient, apoz "
        "and activation look at training images. Single weights are ranked by l1 if none is given.",
        idle=_NO_CHOICE)
    rate: float = _amount(
        0.5, "Fraction of the removable units (or weights) to remove; --steps reaches it at the last step.",
        bounds=between("[0, 1)"),
        idle=Idle(lambda asked: bool(asked.instead_of_rate), lambda asked: asked.instead_of_rate))
    scope: Scope | None = _ranking(
        None, "Rank units across the network, or within each family.",
        unset="global for slimming, lamp, taylor and hessian, else local",
        idle=(_NO_CHOICE,
              Idle(lambda asked: asked.granularity is Granularity.NM,
                   "--granularity nm chooses within each group of M")))
    reduce: Reduce | None = _ranking(
        None, "How a unit's scores in its tensors become one; first: that of the first tensor in the pass.",
        unset="the method's", idle=(_NO_CHOICE, _MASKS_ONLY))
    normalize: Normalize | None = _ranking(
        None, "What a family's scores are divided by before families are compared.", unset="the method's",
        idle=(_NO_CHOICE, _MASKS_ONLY,
              Idle(lambda asked: asked.keep is not None or asked.rates is not None,
                   "each family's width is fixed, so that families are not compared")))
    granularity: Granularity = _shape(
        Granularity.CHANNEL, "Cut channels, or mask weights: single ones, N:M, kernels, rows (filters), "
        "columns, blocks.")
    pattern: Pattern | None = _shape(
        None, "For --granularity nm: N of every M neighbouring inputs stay.", metavar="N:M", unset="2:4",
        parse=parse_pattern)
    block: Block | None = _shape(
        None, "For --granularity block: rows (outputs) and columns (inputs) of a block.",
        metavar="ROWSxCOLUMNS", unset="4x1", parse=parse_block)
    mask: bool = _shape(False, "Only mask the channels that would be cut; --apply-masks cuts them later.")
    apply_masks: bool = _amount(False, "Cut what earlier masks left empty, and nothing else.")
    target: Target | None = _amount(
        None, "What the network may cost: macs=0.5, params=30%, bytes=1.2MB, latency=0.6 (measured). Up to "
        "1 is a fraction of INPUT's cost.", metavar="QUANTITY=VALUE", parse=parse_target)
    max_drop: Drop | None = _amount(
        None, "What may be lost of the main metric on validation: points, or % of its value; finds the "
        "largest such rate.", metavar="POINTS|%", parse=parse_drop)
    rates: str | None = _amount(
        None, "Table of rates: family or layer, and its rate.", metavar="FILE.csv|.json", reads=True)
    round_to: int | None = _shape(
        1, "Round kept widths up to a multiple of this; auto: of 8 in families with that many channels.",
        metavar="N|auto", parse=_round, shown="1", bounds=at_least(1), idle=(_NO_CHOICE, _MASKS_ONLY))
    min_channels: int = _shape(
        1, "Keep at least this many channels in every family.", bounds=at_least(1),
        idle=(_NO_CHOICE, _MASKS_ONLY))
    exclude: tuple[str, ...] = _shape(
        (), "Modules, tensors or families that keep their width; may be repeated.", metavar="GLOB",
        repeated=True)
    only: tuple[str, ...] = _shape((), "Prune only these; may be repeated.", metavar="GLOB", repeated=True)
    exact: bool = _shape(
        False, "Keep widths that statistics run over (layer norm, attention), so that the cut is exact.",
        idle=(_NO_WIDTHS, _MASKS_ONLY))
    attention: AttentionUnit = _shape(
        AttentionUnit.POSITIONS, "What to cut from attention: equal positions of every head, or whole heads "
        "where the code allows.", idle=(_NO_WIDTHS, _MASKS_ONLY))
    keep: float | None = _amount(
        None, "Fraction of each width that a step keeps: int(width * keep^i) after step i.",
        bounds=between("(0, 1]"))
    steps: int = _training(
        1, "Prune in this many steps, one checkpoint each.", bounds=at_least(1), idle=_NO_CHOICE)
    step_mode: StepMode = _training(
        StepMode.INDEPENDENT, "Start each step from INPUT, or from the step before.", idle=_ONE_STEP)
    growth: Growth = _training(
        Growth.EXPONENTIAL, "How the rate grows from step to step; agp: fast at first (Zhu and Gupta 2017, "
        "equation 1).",
        idle=(_ONE_STEP,
              Idle(lambda asked: asked.keep is not None,
                   "--keep shrinks each width by the same factor at each step")))
    finetune_epochs: int = _training(
        0, "Epochs of fine-tuning after each step, with a new optimizer.", bounds=at_least(0))
    optimizer: str = optimizer_option("adamw", _UNTRAINED, _TRAINING)
    lr: float | None = lr_option(_UNTUNED, _TRAINING)
    rewind: str | None = _training(
        None, "Reset the remaining weights to those of this earlier checkpoint.", metavar="CHECKPOINT",
        reads=True)
    from_scratch: bool = _training(
        False, "Reinitialise the pruned network: the control that pruning has to beat.")
    sparsify: SparsifyOptions | None = nested(
        SparsifyOptions, key="method", panel=_TRAINING, changed={"method": {"idle": (_NO_CHOICE,)}})
    teacher: TeacherOptions | None = teacher_option(_UNTUNED)
    keep_storage: bool = keep_storage_option(_TRAINING, _UNTUNED)
    recalibrate: int = _training(
        0, "Estimate batch-norm statistics again from N training images; 0 keeps them.", metavar="N",
        bounds=at_least(0))
    recalibrate_images: Images | None = _training(
        None, "Take these images as they are, or augmented as in training, whose statistics the network "
        "learnt with.", unset="plain; for --max-drop whichever suits the dense network better",
        idle=Idle(lambda asked: asked.recalibrate == 0 and asked.max_drop is None,
                  "no statistics are estimated again; --recalibrate says from how many images"))
    samples: int = _ranking(
        1024, "Training images that data-driven methods look at.", bounds=at_least(1),
        idle=Idle(lambda asked: not asked.needs_data,
                  lambda asked: f"--method {asked.method} looks at no images"))
    plot: bool = _report(
        False, "Draw the kept widths next to the product (.widths.png).", recorded=False,
        idle=(_NO_WIDTHS, _MASKS_ONLY))
    plot_file: str | None = _report(
        None, "Draw the kept widths to this file: .png, .svg or .pdf.", metavar="PATH", recorded=False,
        idle=(_NO_WIDTHS, _MASKS_ONLY))
    preset: PrunePreset | None = option(
        None, "Set the options of a published method; options that you give win.")
    data: DataOptions = nested(DataOptions)
    judge: TaskOptions = judged()
    dry_run: bool = _report(False, "Print the plan and write no checkpoint.", recorded=False)
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Goals, granularities and trainings that exclude each other."""
        given = list(self.goals)
        channels = self.granularity is Granularity.CHANNEL
        # fmt: off
        return (
            (not channels and self.method in CHANNELS_ONLY,
             f"--method {self.method} ranks channels, not the parts of weights that --granularity "
             f"{self.granularity} masks: l1, l2, lamp, taylor, hessian, gradient and random do"),
            (len(given) > 1, f"{' and '.join(given)} each say how much goes: give one of them"),
            (self.keep is not None and self.scope is Scope.GLOBAL,
             "keep fixes the width of each family, which leaves scope global nothing to do"),
            (self.rates is not None and self.scope is Scope.GLOBAL,
             "--rates fixes the rate of each family, which leaves --scope global nothing to do"),
            (not channels and bool(given) and given != ["--rates"],
             f"{', '.join(given)} with --granularity {self.granularity}: masks of single weights change no "
             f"width; --rate and --rates say how many weights go"),
            (not channels and self.mask,
             f"--granularity {self.granularity} masks anyway; --mask belongs to channels"),
            (self.apply_masks and self.rewind is not None,
             "--apply-masks changes no output, and --rewind all of them: rewind in a command of its own"),
            (self.granularity is Granularity.NM and self.rates is not None,
             "--granularity nm fixes how many weights stay, which leaves --rates nothing to do: --only and "
             "--exclude choose layers"),
            (self.granularity is Granularity.NM and self.steps > 1,
             "--granularity nm fixes how many weights stay, which leaves --steps nothing to do"),
            (not channels and self.sparsify is not None and self.sparsify.method is Sparsifier.GROWING,
             f"--sparsify growing pushes the channels that go, and --granularity {self.granularity} masks "
             f"weights: gamma-l1 and group-lasso act on all channels"),
            (self.mask and self.apply_masks, "--mask and --apply-masks are two different commands"),
            (self.pattern is not None and self.granularity is not Granularity.NM,
             "--pattern belongs to --granularity nm"),
            (self.block is not None and self.granularity is not Granularity.BLOCK,
             "--block belongs to --granularity block"),
            (self.steps > 1 and self.max_drop is not None,
             "--max-drop finds one rate, with which --steps has nothing to do"),
            (self.rewind is not None and self.from_scratch,
             "--rewind and --from-scratch both set the weights of the thinned network: give one"),
        )
        # fmt: on

    @property
    def goals(self) -> tuple[str, ...]:
        """The options given that say how much goes, other than ``--rate``."""
        goals = {
            "--keep": self.keep is not None,
            "--target": self.target is not None,
            "--max-drop": self.max_drop is not None,
            "--rates": self.rates is not None,
            "--apply-masks": self.apply_masks,
        }
        return tuple(goal for goal, there in goals.items() if there)

    @property
    def instead_of_rate(self) -> str:
        """Why ``--rate`` would change nothing; empty where it counts."""
        goals = self.goals or (("--granularity nm",) if self.granularity is Granularity.NM else ())
        if not goals:
            return ""
        preset = (
            f"--preset {self.preset} sets --keep, which" if self.preset and goals == ("--keep",) else goals[0]
        )
        return f"{preset} takes the place of --rate: give one of them"

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> PruneOptions:
        """Make the options of a call: what is given, then the preset, then the defaults."""
        preset = given.get("preset")
        values = {**(PRESETS[preset] if preset is not None else {}), **given}
        if values.get("granularity", Granularity.CHANNEL) is not Granularity.CHANNEL:
            values.setdefault("method", PruneMethod.L1)
        return assemble(cls, values)

    @property
    def effective_scope(self) -> Scope:
        """The scope asked for, else the default of the method's paper.

        Slimming compares scales across the whole network (Liu et al. 2017, section 3), LAMP and the
        estimates of a loss's change compare by construction; norms of filters with different fan-in do not,
        so that the others rank within a family (Li et al. 2017, section 3.1).
        """
        if self.scope is not None:
            return self.scope
        fixed = self.keep is not None or self.rates is not None
        return Scope.GLOBAL if not fixed and self.method in GLOBAL else Scope.LOCAL

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


PRESETS: Mapping[PrunePreset, Mapping[str, Any]] = {
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
    }
}
"""The options that each preset sets."""
