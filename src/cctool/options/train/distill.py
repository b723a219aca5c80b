"""Options of `cctool distill` other than those of the training itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cctool.options.common import DataOptions, ModelOptions
from cctool.options.fields import Choice, Options, assemble, leaves, nested, option
from cctool.options.teacher import alpha_option, keep_storage_option, teacher_model, temperature_option
from cctool.options.train.fit import UNTRAINED, FitOptions, OptimizerName, Schedule
from cctool.options.train.run import RunOptions, refuse_small_batches
from cctool.options.train.start import StartOptions


class DistillPreset(Choice):
    """A published procedure, reproduced formula by formula."""

    LHY_HW7 = "lhy-hw7"
    DISTILLER_2018 = "distiller-2018"


@dataclass(frozen=True)
class DistillOptions(Options):
    """Options of one distillation."""

    # fmt: off
    teacher: str = option(..., "Teacher: a checkpoint or a foreign file.", panel="Teacher", reads=True)
    teacher_model: ModelOptions = teacher_model()
    temperature: float = temperature_option()
    alpha: float = alpha_option()
    fit: FitOptions = nested(FitOptions)
    data: DataOptions = nested(DataOptions)
    run: RunOptions = nested(RunOptions)
    keep_storage: bool = keep_storage_option("Output", UNTRAINED)
    start: StartOptions = nested(StartOptions, if_given=True)
    preset: DistillPreset | None = option(
        None, "Set the options of a published method; options that you give win.")
    # fmt: on

    @classmethod
    def from_given(
        cls, given: Mapping[str, Any], begun: Mapping[tuple[str, ...], Any] | None = None
    ) -> DistillOptions:
        """Make a call's options: those given, of the training it resumes, of the preset, then defaults."""
        preset = given.get("preset") or (begun or {}).get(("preset",))
        chosen = PRESETS[preset] if preset is not None else {}
        base = {leaf.path: chosen[leaf.keyword] for leaf in leaves(cls) if leaf.keyword in chosen}
        return assemble(cls, given, base | dict(begun or {}))

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_small_batches(self.data, self.run)


PRESETS: Mapping[DistillPreset, Mapping[str, Any]] = {
    # H.-Y. Lee's ML2020 homework 7: resnet18 teaches the small MobileNet on food-11.
    DistillPreset.LHY_HW7: {
        "temperature": 20.0,
        "alpha": 0.5,
        "epochs": 200,
        "optimizer": OptimizerName.ADAMW.value,
        "lr": 1e-3,
        "weight_decay": 1e-2,
        "lr_schedule": Schedule.CONSTANT,
        "batch_size": 4,
    },
    # The defaults of Distiller's knowledge-distillation policy (2018): T = 1, both weights one half.
    DistillPreset.DISTILLER_2018: {"temperature": 1.0, "alpha": 0.5},
}
"""The options that each preset sets, by name; options that are given overrule them."""
