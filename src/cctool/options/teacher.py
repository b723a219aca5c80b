"""Options of a training that follows a teacher, or that comes after a change of weights.

`distill` and the fine-tuning of `prune` and `quantize` share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cctool.options.common import ModelOptions
from cctool.options.fields import Idle, Options, between, nested, option, positive


def teacher_model() -> Any:
    """How a foreign teacher is named: ``--teacher-arch`` and its siblings."""
    changed: dict[str, dict[str, Any]] = {
        "arch": {"help": "Architecture of a foreign teacher, as in torchvision:resnet18."},
        "arguments": {"help": "Argument of the teacher's builder; may be repeated."},
        "input_shape": {"help": "Channels, height and width of the teacher's input; images are resized."},
        "mean": {"help": "Channel means to subtract from a foreign teacher's inputs."},
        "std": {"help": "Channel standard deviations to divide a foreign teacher's inputs by."},
        "trust_pickle": {"flags": ("--trust-pickle",)},
    }
    return nested(ModelOptions, prefix="teacher", without=("spec",), changed=changed, panel="Teacher")


def temperature_option() -> Any:
    """T of Hinton et al. 2015, section 2."""
    return option(4.0, "Temperature that softens both networks' outputs.", panel="Teacher", bounds=positive())


def alpha_option() -> Any:
    """The share of the loss that comes from the teacher."""
    text = "Weight of the teacher's part of the loss; the labels' weighs 1 - alpha."
    return option(0.9, text, panel="Teacher", bounds=between("[0, 1]"))


@dataclass(frozen=True)
class TeacherOptions(Options):
    """A network whose outputs fine-tuning imitates."""

    # fmt: off
    path: str = option(
        ..., "Learn from this network's outputs, too; INPUT itself is a good teacher.", "--teacher",
        metavar="CHECKPOINT", reads=True)
    model: ModelOptions = teacher_model()
    temperature: float = temperature_option()
    alpha: float = alpha_option()
    # fmt: on


def teacher_option(idle: Idle) -> Any:
    """The teacher of a fine-tuning; None learns from labels alone."""
    return nested(TeacherOptions, key="path", panel="Teacher", changed={"path": {"idle": (idle,)}})


def optimizer_option(default: str, idle: Idle, panel: str) -> Any:
    """The optimizer of a fine-tuning."""
    text = "Optimizer: sgd, adam, adamw or my.py:factory(groups, lr=...)."
    return option(default, text, panel=panel, idle=idle, runs_code=True)


def lr_option(idle: Idle, panel: str) -> Any:
    """The learning rate of a fine-tuning."""
    text, unset = "Learning rate of the fine-tuning.", "the optimizer's rate for trained networks"
    return option(None, text, panel=panel, unset=unset, bounds=positive(), idle=idle)


def freeze_norm_option(panel: str, idle: Idle | tuple[()] = ()) -> Any:
    """Batch norm that normalises by its running statistics, which then stay as they are."""
    text = "Keep batch norm's running statistics fixed and normalise by them."
    return option(False, text, panel=panel, idle=idle)


def keep_storage_option(panel: str, idle: Idle | tuple[()] = ()) -> Any:
    """Tensors that are encoded again after a training."""
    text = "Encode tensors again as INPUT stored them; metrics are measured after that."
    return option(False, text, panel=panel, idle=idle)
