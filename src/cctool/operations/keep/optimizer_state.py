"""The state of a resumable training, cut so that `train --resume` continues with the thinned network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from cctool.base.errors import CctoolError, PruningError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.file.payload import ResumeState
from cctool.operations.context import Context
from cctool.operations.keep.follower import Cutting, Followed, Follower
from cctool.options.train.fit import DecayScope
from cctool.pruning.cut.surgery import cut_tensor
from cctool.training.optimizers import parameter_groups
from cctool.training.resume.state import flatten, unflatten
from cctool.transforms.layers.base import swapped_layers


class OptimizerState(Follower):
    """Moments of the optimizer. Verbs that change weights in other ways than by a cut drop the state."""

    in_programs = True

    def after_cut(self, checkpoint: Checkpoint, cutting: Cutting) -> Followed:
        """Cut moments like their parameters; epoch, learning rates and random generators stay.

        The best epoch so far is forgotten: the thinned network should not have to beat the dense one. If
        moments cannot be cut, the state is dropped, and a note says why.
        """
        if checkpoint.resume is None:
            return Followed(checkpoint)
        if swapped_layers(checkpoint.model):
            return _left_out(checkpoint, "no plan says how to cut the moments of coefficients")
        try:
            resume = _cut(checkpoint.model, checkpoint.resume, cutting)
        # The user's own optimizer may keep anything in its state.
        except (CctoolError, KeyError, TypeError, ValueError, AttributeError) as error:
            text = str(error) if isinstance(error, CctoolError) else f"{type(error).__name__}: {error}"
            return _left_out(checkpoint, text)
        return Followed(replace(checkpoint, resume=resume))

    def after_new_head(self, checkpoint: Checkpoint, names: Collection[str], context: Context) -> Followed:
        """The training before had other outputs."""
        return Followed(replace(checkpoint, resume=None))


def _left_out(checkpoint: Checkpoint, why: str) -> Followed:
    note = f"the training that the file could resume is left out: {why}"
    return Followed(replace(checkpoint, resume=None), (note,))


def _cut(model: nn.Module, resume: ResumeState, cutting: Cutting) -> ResumeState:
    state = dict(resume.state)
    optimizer: Any = unflatten(state["optimizer"], resume.tensors)
    names = _names(model, optimizer["param_groups"])
    optimizer["state"] = {
        number: {key: _moment(key, value, names[number], cutting) for key, value in moments.items()}
        for number, moments in optimizer["state"].items()
    }
    gone = ("optimizer", "best")
    tensors = {name: value for name, value in resume.tensors.items() if name.partition("/")[0] not in gone}
    state |= {"optimizer": flatten(optimizer, "optimizer", tensors), "best": None}
    return ResumeState(tensors=tensors, state=state)


def _names(model: nn.Module, groups: list[Mapping[str, Any]]) -> dict[int, str]:
    """Name of each parameter by its number in the optimizer's state."""
    # The state does not say which parameters decay; the scope whose groups have the same sizes was used.
    numbers = [number for group in groups for number in group["params"]]
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    for scope in DecayScope:
        made = parameter_groups(model, 0.0, scope)
        if [len(group["params"]) for group in made] == [len(group["params"]) for group in groups]:
            ordered = [named[id(parameter)] for group in made for parameter in group["params"]]
            return dict(zip(numbers, ordered, strict=True))
    raise PruningError("its optimizer has groups of parameters of its own")


def _moment(key: str, value: Any, name: str, cutting: Cutting) -> Any:
    # Counters of steps, and moments of parameters of one element, which no cut can shorten.
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    shape = cutting.before[name].shape
    if value.shape != shape:
        raise PruningError(
            f"{key} of {name} has shape {list(value.shape)}, its parameter {list(shape)}: no plan says how "
            "to cut that"
        )
    return cut_tensor(value, cutting.plan.tensors.get(name, ()))
