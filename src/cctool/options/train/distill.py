"""What `cctool distill` can be asked beside the options of training."""

from __future__ import annotations

from dataclasses import dataclass, field

from cctool.base.errors import UsageError
from cctool.options.common import Choice, DataOptions, ModelOptions
from cctool.options.train.fit import FitOptions, OptimizerName, Schedule
from cctool.options.train.run import RunOptions, refuse_small_batches

__all__ = ["PRESETS", "DistillOptions", "DistillPreset"]


class DistillPreset(Choice):
    """A published procedure, reproduced formula by formula."""

    LHY_HW7 = "lhy-hw7"
    DISTILLER_2018 = "distiller-2018"


@dataclass(frozen=True)
class DistillOptions:
    """Options of one distillation.

    Attributes:
        teacher: path of the teacher's checkpoint or foreign file.
        teacher_model: how a foreign teacher is named: architecture, arguments, input size, preprocessing.
        temperature: T of the softened outputs, above 0.
        alpha: weight of the teacher in [0, 1]; the labels weigh 1 - alpha.
        fit: epochs, optimizer, schedule and so on.
        data: which data, and how much of it at a time.
        run: how this call runs and what it writes beside its product.
        keep_storage: store tensors again as the input stored them; metrics are measured after that.
        preset: a published method, which set others of these; see `PRESETS`.
    """

    teacher: str
    teacher_model: ModelOptions = field(default_factory=ModelOptions)
    temperature: float = 4.0
    alpha: float = 0.9
    fit: FitOptions = field(default_factory=FitOptions)
    data: DataOptions = field(default_factory=DataOptions)
    run: RunOptions = field(default_factory=RunOptions)
    keep_storage: bool = False
    preset: DistillPreset | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"--temperature {self.temperature}: a positive number is needed")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"--alpha {self.alpha}: [0, 1] is allowed")
        refuse_small_batches(self.data, self.run)


PRESETS: dict[DistillPreset, dict[str, object]] = {
    # H.-Y. Lee's ML2020 homework 7: resnet18 teaches the small MobileNet on food-11.
    DistillPreset.LHY_HW7: {
        "temperature": 20.0,
        "alpha": 0.5,
        "epochs": 200,
        "optimizer": OptimizerName.ADAMW.value,
        "lr": 1e-3,
        "weight_decay": 1e-2,
        "schedule": Schedule.CONSTANT,
        "batch_size": 4,
    },
    # The defaults of Distiller's knowledge-distillation policy (2018): T = 1, both weights one half.
    DistillPreset.DISTILLER_2018: {"temperature": 1.0, "alpha": 0.5},
}
"""The options that each preset sets, by name; those given beside a preset stand."""
