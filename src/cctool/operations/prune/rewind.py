"""Lottery-ticket rewinding: weights that survive a cut or a mask get their values of an earlier checkpoint.

Frankle and Carbin 2019, "The Lottery Ticket Hypothesis", arXiv 1803.03635, section 1, for the network at its
initialisation; Frankle et al. 2020, arXiv 1912.05671, section 3, for one after a few epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cctool.base.errors import CheckpointError, PruningError, SpecError, UsageError
from cctool.base.networks import nonfinite
from cctool.checkpoint.checkpoint import Checkpoint, build, open_file
from cctool.checkpoint.edits.mask import mask_buffers, zero_masked
from cctool.checkpoint.spec import ModelSpec
from cctool.models.registry import is_user_code
from cctool.operations.context import Context
from cctool.operations.keep.events import thin_copy
from cctool.pruning.cut.surgery import CutPlan, cut_tensor, named_tensors
from cctool.transforms.codec.taps import tap_buffers
from cctool.transforms.layers.base import swapped_layers
from cctool.transforms.plain import plain_model


def open_earlier(source: Checkpoint, path: str, context: Context) -> Checkpoint:
    """Open the checkpoint to rewind to, on the CPU, and check that it is an earlier state of the network.

    ``source`` is the network before the cuts of this command. A foreign file is read as a state dict of its
    architecture.

    Raises:
        CheckpointError: the file cannot be read, or its values are not finite.
        UsageError: it holds another architecture, other arguments, or a tensor of another name or shape.
    """
    opened = open_file(Path(path), trust_pickle=context.model_options.trust_pickle)
    spec = source.spec if opened.payload is None else _same(opened.payload.spec, source.spec, path)
    try:
        earlier = build(opened, spec, context.tables)
    except SpecError as error:
        if opened.payload is not None:
            raise
        raise UsageError(f"--rewind {path} is not an earlier state of this network: {error}") from error
    _refuse_misfit(source.model, earlier.model, path)
    bad = nonfinite(earlier.model)
    if bad is not None and "allow_nonfinite" not in context.given:
        raise CheckpointError(
            f"--rewind {path} holds {bad[1]:,} NaN or infinite values in {bad[0]}; --allow-nonfinite goes on"
        )
    return earlier


def _same(spec: ModelSpec, source: ModelSpec, path: str) -> ModelSpec:
    """The earlier file's spec, checked against the source's."""
    # A user's architecture is the same even if its file has moved.
    if spec.architecture != source.architecture:
        if not (is_user_code(spec.architecture) and is_user_code(source.architecture)):
            raise UsageError(
                f"--rewind {path} holds {spec.architecture}, this network is {source.architecture}: "
                "an earlier state of the same network is needed"
            )
        spec = spec.model_copy(update={"architecture": source.architecture})
    if spec.arguments != source.arguments:
        raise UsageError(
            f"--rewind {path} was built with {spec.arguments}, this network with {source.arguments}: "
            "an earlier state of the same network is needed"
        )
    return spec


def _refuse_misfit(model: nn.Module, earlier: nn.Module, path: str) -> None:
    wanted, found = _values(model), _values(earlier)
    for name in (*wanted, *found):
        shapes = [list(state[name].shape) if name in state else None for state in (wanted, found)]
        if shapes[0] != shapes[1]:
            here, there = (shape or "missing" for shape in shapes)
            raise UsageError(
                f"--rewind {path} does not fit this network before its cut: {name} is {there} there and "
                f"{here} here; rewind in the command that cuts, or to a file of the same widths"
            )


def _values(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without masks, which are not rewound, and codecs, which are calibrated again."""
    masks = mask_buffers(model) | tap_buffers(model)
    state = model.state_dict()
    return {n: value for n, value in state.items() if isinstance(value, Tensor) and n not in masks}


def rewound(checkpoint: Checkpoint, earlier: Checkpoint, plans: Sequence[CutPlan]) -> Checkpoint:
    """Give surviving weights and batch-norm statistics their earlier values, in place; masked ones stay zero.

    Args:
        checkpoint: after the cuts.
        earlier: from `open_earlier`; is not changed.
        plans: the cuts between the earlier network's widths and these, in order; empty without cuts.

    Raises:
        PruningError: a plan was made for other widths, or the plans do not lead to these.
    """
    if swapped_layers(earlier.model):
        return with_values(checkpoint, _values(_cut_again(earlier.model, plans)))
    values = _values(earlier.model)
    for plan in plans:
        values = {name: cut_tensor(value, plan.tensors.get(name, ())) for name, value in values.items()}
    return with_values(checkpoint, values)


def _cut_again(model: nn.Module, plans: Sequence[CutPlan]) -> nn.Module:
    """A copy after the same cuts, for networks with swapped layers, which cut what they store themselves."""
    for plan in plans:
        # The plan may cut masks that were set since, and that the earlier state does not have.
        present = {name for name, _ in named_tensors(plain_model(model))}
        known = {name: cuts for name, cuts in plan.tensors.items() if name in present}
        model = thin_copy(model, CutPlan(known, plan.attributes))
    return model


@torch.no_grad()
def with_values(checkpoint: Checkpoint, values: Mapping[str, Tensor]) -> Checkpoint:
    """Give tensors of a checkpoint's model new values in place, by name; masked elements stay zero.

    Stored forms of tensors that change are dropped.

    Raises:
        PruningError: a value has another shape than its tensor.
    """
    state = checkpoint.model.state_dict()
    before = {name: state[name].clone() for name in checkpoint.stored if name in values}
    for name, value in values.items():
        if state[name].shape != value.shape:
            raise PruningError(
                f"{name} cannot be set: it has shape {list(state[name].shape)}, its new value "
                f"{list(value.shape)}"
            )
        state[name].copy_(value)
    zero_masked(checkpoint.model)
    changed = {name for name, value in before.items() if not torch.equal(value, state[name])}
    stored = {name: form for name, form in checkpoint.stored.items() if name not in changed}
    return replace(checkpoint, stored=stored)
