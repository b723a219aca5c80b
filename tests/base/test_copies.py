"""Copies of networks whose attributes `copy.deepcopy` refuses."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cctool
from cctool.base.errors import ArchitectureError
from cctool.base.networks import copied


class Held:
    """An object of no module, with a tensor in a list."""

    def __init__(self, value: Tensor) -> None:
        self.values = [value]


class Signed(nn.Module):
    """Weights are a parameter's magnitude times a buffer of its signs, which is computed with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
        self.body(torch.zeros(1, 1, 32, 32))
        self.gain = nn.Parameter(torch.tensor([-2.0, 3.0, 0.5, 1.0]))
        self.register_buffer("signs", self.gain.sign())

    def forward(self, x: Tensor) -> Tensor:
        signs, y = self.get_buffer("signs"), self.body[0](x)
        y = y * (signs * self.gain.abs())[:, None, None]
        out: Tensor = self.body[1:](y)
        return out


def signed(num_classes: int = 10) -> nn.Module:
    return Signed()


def computed() -> Tensor:
    """[2, 4], not a leaf."""
    return torch.tensor([1.0, 2.0], requires_grad=True) * 2


def wrapped(place: str, value: Tensor) -> Any:
    return {
        "itself": lambda: value,
        "list": lambda: [value, 1],
        "tuple in dict": lambda: {"a": (value,)},
        "deque": lambda: deque([value]),
        "object": lambda: Held(value),
        "module in list": lambda: [_holding(value)],
    }[place]()


def _holding(value: Tensor) -> nn.Module:
    module = nn.Identity()
    module.kept = value
    return module


def unwrapped(held: Any) -> Tensor:
    while not isinstance(held, Tensor):
        if isinstance(held, dict):
            held = held["a"]
        elif isinstance(held, (list, tuple, deque)):
            held = held[0]
        else:
            held = held.values if isinstance(held, Held) else held.kept
    return held


@pytest.mark.parametrize("place", ["itself", "list", "tuple in dict", "deque", "object", "module in list"])
@pytest.mark.parametrize("lock", [False, True])
def test_computed_tensors_are_copied_wherever_they_lie(place: str, lock: bool) -> None:
    model = nn.Linear(2, 2)
    model.held = wrapped(place, computed())  # type: ignore[assignment]
    model.register_buffer("buffer", computed())
    if lock:
        # Cannot be copied and is shared; the tensors beside it are copied all the same.
        model.lock = threading.Lock()  # type: ignore[assignment]
    found = copied(model)
    copy: Any = unwrapped(found.held)
    for tensor, own in ((copy, unwrapped(model.held)), (found.get_buffer("buffer"), model.buffer)):
        assert tensor.tolist() == [2, 4]
        assert tensor.data_ptr() != own.data_ptr()
        assert tensor.is_leaf
    assert not lock or found.lock is model.lock
    assert not torch.equal(model.weight.data.fill_(7), found.get_parameter("weight"))


def test_what_a_caller_puts_in_the_place_of_a_computed_tensor_is_taken() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("buffer", computed())
    other = torch.zeros(2)
    assert copied(model, {id(model.buffer): other}).get_buffer("buffer") is other


def test_a_module_that_refuses_copies_is_named_in_one_sentence() -> None:
    class Single(nn.Module):
        def __reduce_ex__(self, protocol: Any) -> Any:
            raise ValueError("there is\n only one")

    with pytest.raises(ArchitectureError, match="cannot be copied: ValueError: there is only one"):
        copied(nn.Sequential(Single()))


def test_a_network_with_a_computed_buffer_goes_through_the_python_functions() -> None:
    digits: dict[str, Any] = {"data": "digits", "limit": 64}
    trained, _ = cctool.train(arch=f"{Path(__file__)}:signed", epochs=1, **digits)
    assert cctool.evaluate(trained, **digits).n == 64
    quantized, _ = cctool.quantize(trained, method="int8", **digits)
    again, _ = cctool.train(quantized, epochs=1, **digits)
    assert again.model.get_buffer("signs").abs().tolist() == [1, 1, 1, 1]
