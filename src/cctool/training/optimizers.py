"""Optimizers over a network's parameters, and which of them are decayed."""

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

Groups = list[dict[str, Any]]


OPTIMIZERS: dict[OptimizerName, Callable[[Groups, float, FitOptions], Optimizer]] = {
    OptimizerName.SGD: lambda groups, lr, options: torch.optim.SGD(
        groups, lr=lr, momentum=options.sgd_momentum, nesterov=options.nesterov
    ),
    OptimizerName.ADAM: lambda groups, lr, options: torch.optim.Adam(groups, lr=lr),
    OptimizerName.ADAMW: lambda groups, lr, options: torch.optim.AdamW(groups, lr=lr),
}


def parameter_groups(model: nn.Module, weight_decay: float, scope: DecayScope) -> Groups:
    """Group trainable parameters by their weight decay, each parameter once.

    With `DecayScope.WEIGHTS`, parameters of at most one dimension (biases, normalisation) are not decayed.
    Those of companions (quantizers' step sizes and clipping levels) never are; `ClippingDecay` may do that.
    """
    companions = companion_parameters(model)
    theirs = {id(parameter) for parameter in companions}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in theirs]
    decayed = [p for p in trainable if scope is DecayScope.ALL or p.dim() > 1]
    others = [p for p in trainable if scope is not DecayScope.ALL and p.dim() <= 1]
    learnt = [p for p in companions if p.requires_grad]
    return [
        {"params": members, "weight_decay": decay}
        for members, decay in ((decayed, weight_decay), (others, 0.0), (learnt, 0.0))
        if members
    ]


def make_optimizer(
    model: nn.Module, lr: float, options: FitOptions, named: Collection[str] = frozenset()
) -> Optimizer:
    """Build the optimizer that ``options`` ask for.

    Args:
        model: its present parameters are trained.
        lr: base learning rate.
        options: which optimizer, and its settings.
        named: references of user code that the command line names.

    Raises:
        TrainingError: if nothing in the network can be trained.
        UserCodeError: if the user's factory fails or returns something else.
    """
    groups = parameter_groups(model, options.weight_decay, options.decay)
    if not groups:
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
