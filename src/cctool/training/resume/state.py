"""Everything except the weights that training needs to continue bit for bit, to and from a `ResumeState`."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor
from torch.optim import Optimizer

from cctool.base.errors import CorruptCheckpointError, TrainingError
from cctool.training.processes import Together

if TYPE_CHECKING:
    from lightning_fabric import Fabric


_TENSOR, _TUPLE, _KEYS = "__tensor__", "__tuple__", "__int_keys__"


def flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> JsonValue:
    """Turn nested containers into JSON, with their tensors in ``tensors`` by names that begin with ``name``.

    Raises:
        TrainingError: for anything but containers, numbers, strings and tensors.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        items = {str(key): flatten(item, f"{name}/{key}", tensors) for key, item in value.items()}
        return {_KEYS: items} if value and all(isinstance(key, int) for key in value) else items
    if isinstance(value, (list, tuple)):
        found: JsonValue = [flatten(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: found} if isinstance(value, tuple) else found
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TrainingError(f"{name} of the training state is a {type(value).__name__}, which cannot be stored")


def unflatten(value: JsonValue, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `flatten`."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors[str(value[_TENSOR])]
    if value.keys() == {_TUPLE}:
        return tuple(unflatten(value[_TUPLE], tensors))
    keyed: Any = value.get(_KEYS)
    if value.keys() == {_KEYS}:
        return {int(key): unflatten(item, tensors) for key, item in dict(keyed).items()}
    return {key: unflatten(item, tensors) for key, item in value.items()}


def generator_states(fabric: Fabric) -> dict[str, Tensor]:
    """The states of Python's, numpy's and torch's generators, each of shape (processes, ...)."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": torch.tensor([version, *internal]),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),  # type: ignore[union-attr]
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if fabric.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(fabric.device)
    stack = Together(fabric).stack if fabric.world_size > 1 else lambda state: state[None]
    return {f"generators/{name}": stack(state) for name, state in states.items()}


def restore_generators(tensors: Mapping[str, Tensor], fabric: Fabric) -> None:
    """Set every generator of this process to its stored state.

    Raises:
        TrainingError: if another number of processes stored them.
        CorruptCheckpointError: if there are none.
    """
    found = {
        name.removeprefix("generators/"): value for name, value in tensors.items() if "generators/" in name
    }
    if not found:
        raise CorruptCheckpointError("the resume state holds no generator states")
    processes = len(found["torch"])
    if processes != fabric.world_size:
        raise TrainingError(
            f"{processes} processes trained this, now there are {fabric.world_size}: "
            "give the same --devices and --nodes"
        )
    # Cloned, because torch reads a state from the start of its storage and ignores a view's offset.
    mine = {name: value[fabric.global_rank].clone() for name, value in found.items()}
    version, *internal = mine["python"].tolist()
    has_gauss, gauss = mine["python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss if has_gauss else None))
    *keys, position, has_cached = mine["numpy"].tolist()
    cached = float(mine["numpy_gauss"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_cached, cached))
    torch.set_rng_state(mine["torch"])
    if "cuda" in mine and fabric.device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"], fabric.device)


def restore_optimizer(optimizer: Optimizer, state: JsonValue, tensors: Mapping[str, Tensor]) -> None:
    """Restore the stored state of an optimizer over the same parameters.

    Raises:
        TrainingError: if the state is another optimizer's.
    """
    try:
        optimizer.load_state_dict(unflatten(state, tensors))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise TrainingError(f"the stored optimizer state does not fit this optimizer: {error}") from None
    # The fast multi-tensor kernels need moments with the strides of their parameter.
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        moments = optimizer.state.get(parameter, {})
        for name, value in moments.items():
            same = isinstance(value, Tensor) and value.shape == parameter.shape
            if same and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
