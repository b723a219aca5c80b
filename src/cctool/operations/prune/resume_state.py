"""Cutting a training along with its network, so that `train --resume` goes on with the thinned one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cctool.base.errors import CctoolError, PruningError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.file.payload import ResumeState
from cctool.options.train.fit import DecayScope
from cctool.pruning.cut.surgery import CutPlan, cut_tensor
from cctool.training.optimizers import parameter_groups
from cctool.training.resume.state import flatten, unflatten
from cctool.transforms.layers.base import swapped_layers

__all__ = ["cut_resume"]


def cut_resume(checkpoint: Checkpoint, plan: CutPlan) -> tuple[ResumeState | None, str]:
    """Cut the optimizer's moments as a plan cuts their parameters; epochs, rates and generators stay.

    The best epoch so far is forgotten: no thinned network should have to beat the dense one.

    Args:
        checkpoint: before the cut, with the state of its training.
        plan: of the cut.

    Returns:
        The state of the thinned network's training, or None and why it cannot be cut.
    """
    if checkpoint.resume is None:
        return None, ""
    if swapped_layers(checkpoint.model):
        return None, (
            "the training that the file could resume is left out: no plan says how to cut the moments of "
            "coefficients"
        )
    try:
        return _cut(checkpoint.model, checkpoint.resume, plan), ""
    # The state of an optimizer of the user's may hold anything.
    except (CctoolError, KeyError, TypeError, ValueError, AttributeError) as error:
        text = str(error) if isinstance(error, CctoolError) else f"{type(error).__name__}: {error}"
        return None, f"the training that the file could resume is left out: {text}"


def _cut(model: nn.Module, resume: ResumeState, plan: CutPlan) -> ResumeState:
    state = dict(resume.state)
    optimizer: Any = unflatten(state["optimizer"], resume.tensors)
    names = _names(model, optimizer["param_groups"])
    optimizer["state"] = {
        number: {key: _moment(key, value, names[number], model, plan) for key, value in moments.items()}
        for number, moments in optimizer["state"].items()
    }
    gone = ("optimizer", "best")
    tensors = {name: value for name, value in resume.tensors.items() if name.partition("/")[0] not in gone}
    state |= {"optimizer": flatten(optimizer, "optimizer", tensors), "best": None}
    return ResumeState(tensors=tensors, state=state)


def _names(model: nn.Module, groups: list[Mapping[str, Any]]) -> dict[int, str]:
    """Qualified name of each parameter by its number in the optimizer."""
    numbers = [number for group in groups for number in group["params"]]
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    for scope in DecayScope:
        made = parameter_groups(model, 0.0, scope)
        if [len(group["params"]) for group in made] == [len(group["params"]) for group in groups]:
            ordered = [named[id(parameter)] for group in made for parameter in group["params"]]
            return dict(zip(numbers, ordered, strict=True))
    raise PruningError("its optimizer has groups of parameters of its own")


def _moment(key: str, value: Any, name: str, model: nn.Module, plan: CutPlan) -> Any:
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    parameter = model.get_parameter(name)
    if value.shape != parameter.shape:
        raise PruningError(
            f"{key} of {name} has shape {list(value.shape)}, its parameter {list(parameter.shape)}: no plan "
            "says how to cut that"
        )
    return cut_tensor(value, plan.tensors.get(name, ()))
