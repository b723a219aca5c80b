"""Optimizers over a network's present parameters, and what weight decay acts on."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cctool.base import user_code
from cctool.base.errors import TrainingError, UserCodeError
from cctool.base.networks import companion_parameters
from cctool.options.train.fit import DecayScope, FitOptions, OptimizerName
from cctool.training.user_functions import named_function

__all__ = ["OPTIMIZERS", "make_optimizer", "parameter_groups"]

Groups = list[dict[str, Any]]


def _sgd(groups: Groups, lr: float, options: FitOptions) -> Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=options.sgd_momentum, nesterov=options.nesterov)


def _adam(groups: Groups, lr: float, options: FitOptions) -> Optimizer:
    return torch.optim.Adam(groups, lr=lr)


def _adamw(groups: Groups, lr: float, options: FitOptions) -> Optimizer:
    return torch.optim.AdamW(groups, lr=lr)


OPTIMIZERS: dict[OptimizerName, Callable[[Groups, float, FitOptions], Optimizer]] = {
    OptimizerName.SGD: _sgd,
    OptimizerName.ADAM: _adam,
    OptimizerName.ADAMW: _adamw,
}


def parameter_groups(model: nn.Module, weight_decay: float, scope: DecayScope) -> Groups:
    """Group trainable parameters by their weight decay, each parameter once.

    With `DecayScope.WEIGHTS`, parameters of at most one dimension (biases, normalisation) are not decayed.
    Those of companions (quantizers' steps and clipping levels) never are: a penalty of their own may be.
    """
    beside = companion_parameters(model)
    ours = {id(parameter) for parameter in beside}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    groups = _network_groups(trainable, weight_decay, scope)
    learnt = [parameter for parameter in beside if parameter.requires_grad]
    return [*groups, {"params": learnt, "weight_decay": 0.0}] if learnt else groups


def _network_groups(trainable: list[nn.Parameter], weight_decay: float, scope: DecayScope) -> Groups:
    if scope is DecayScope.ALL:
        return [{"params": trainable, "weight_decay": weight_decay}]
    weights = [parameter for parameter in trainable if parameter.dim() > 1]
    others = [parameter for parameter in trainable if parameter.dim() <= 1]
    return [
        {"params": members, "weight_decay": decay}
        for members, decay in ((weights, weight_decay), (others, 0.0))
        if members
    ]


def make_optimizer(
    model: nn.Module, lr: float, options: FitOptions, named: Collection[str] = frozenset()
) -> Optimizer:
    """Build the optimizer that ``options`` ask for.

    Args:
        model: its parameters as they are now are what is trained.
        lr: base learning rate.
        options: which optimizer, and its settings.
        named: references of user code that stand on this command line.

    Raises:
        TrainingError: if nothing in the network can be trained.
        UserCodeError: if the user's factory fails or returns something else.
    """
    groups = parameter_groups(model, options.weight_decay, options.decay)
    if not any(group["params"] for group in groups):
        raise TrainingError("the network has no trainable parameters; --epochs 0 writes it as it is")
    for name in OptimizerName:
        if options.optimizer == name.value:
            return OPTIMIZERS[name](groups, lr, options)
    factory = named_function(options.optimizer, named, "--optimizer")
    made = user_code.call(options.optimizer, factory, groups, lr=lr)
    if not isinstance(made, Optimizer):
        raise UserCodeError(
            f"{options.optimizer} returned a {type(made).__name__}; "
            "an optimizer factory takes (groups, lr=...) and returns a torch.optim.Optimizer"
        )
    owned = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    if not owned & {id(parameter) for parameter in model.parameters()}:
        raise UserCodeError(
            f"{options.optimizer} returned an optimizer that owns none of the network's parameters"
        )
    return made
