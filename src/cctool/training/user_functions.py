"""The user's loss, metric and optimizer, called so that every error names the function.

Losses and metrics are called with (outputs, targets), and with the network's inputs by keyword if they have a
parameter of that name: an autoencoder has no other target.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from cctool.base import user_code
from cctool.base.errors import UserCodeError


def named_function(reference: str, named: Collection[str], option: str) -> Callable[..., Any]:
    """Load a function that the command line names.

    Raises:
        UserCodeError: if it is not named there, is not found, or is not a function.
    """
    if not user_code.looks_like_user_code(reference):
        raise UserCodeError(f"{option} {reference}: my.py:function or package.module:function is expected")
    if not user_code.is_named(reference, named):
        raise UserCodeError(
            f"{reference} is user code, which runs only when it is named: add {option} {reference}"
        )
    return user_code.load(reference)


def takes_inputs(function: Callable[..., Any]) -> bool:
    """Whether a function has a parameter ``inputs``."""
    try:
        return "inputs" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        # Built-in functions do not tell their parameters.
        return False


class _UserFunction:
    """A user's function of (outputs, targets) and perhaps inputs."""

    def __init__(self, reference: str, function: Callable[..., Any]) -> None:
        self.reference = reference
        self.takes_inputs = takes_inputs(function)
        self._function = function

    def _called(self, outputs: Any, targets: Tensor | None, inputs: Tensor | None) -> Any:
        more = {"inputs": inputs} if self.takes_inputs else {}
        return user_code.call_often(self.reference, self._function, outputs, targets, **more)


class UserLoss(_UserFunction):
    """A user's loss: (outputs, targets) -> scalar tensor.

    Raises UserCodeError if the function raises or returns something else.
    """

    def __call__(self, outputs: Any, targets: Tensor | None, inputs: Tensor | None = None) -> Tensor:
        """Loss of one batch."""
        value = self._called(outputs, targets, inputs)
        wrong = None
        if not isinstance(value, Tensor):
            wrong = f"a {type(value).__name__}; a loss is a scalar tensor that depends on the outputs"
        elif value.numel() != 1:
            wrong = f"shape {list(value.shape)}; a loss is one number: take its mean"
        elif not value.is_floating_point():
            wrong = f"{value.dtype}; a loss is a floating-point tensor"
        elif torch.is_grad_enabled() and not value.requires_grad:
            wrong = "a loss without a gradient: compute it from the outputs by torch functions"
        if wrong is not None:
            raise UserCodeError(f"{self.reference} returned {wrong}")
        return value.reshape(())  # type: ignore[no-any-return]


class UserMetric(_UserFunction):
    """A user's metric: (outputs of a whole split, targets) -> number.

    Raises UserCodeError if the function raises or returns something other than one finite number.

    Attributes:
        name: of the function.
        rising: whether larger is better, by the function's attribute ``direction`` (``max`` or ``min``).
        unit: after its values, by the function's attribute ``unit``.
    """

    def __init__(self, reference: str, function: Callable[..., Any]) -> None:
        super().__init__(reference, function)
        self.name = reference.rpartition(":")[2]
        direction = getattr(function, "direction", "max")
        if direction not in ("max", "min"):
            raise UserCodeError(f"{reference}: its direction is {direction!r}; 'max' or 'min' is allowed")
        self.rising = direction == "max"
        unit = getattr(function, "unit", "")
        if not isinstance(unit, str):
            raise UserCodeError(f"{reference}: its unit is {unit!r}; a text such as 'dB' is allowed")
        self.unit = unit

    def __call__(self, outputs: Any, targets: Tensor | None, inputs: Tensor | None = None) -> float:
        """Metric of all samples together, on the CPU."""
        value = self._called(outputs, targets, inputs)
        try:
            # Texts and truth values that `float` takes are mistakes all the same.
            if isinstance(value, (str, bytes, bytearray, bool)) or "bool" in str(getattr(value, "dtype", "")):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            whole = isinstance(value, Tensor) and value.numel() != 1
            shown = f"shape {list(value.shape)}" if whole else f"a {_kind(value)}"
            raise UserCodeError(f"{self.reference} returned {shown}; a metric is one number") from None
        if not math.isfinite(number):
            raise UserCodeError(f"{self.reference} returned {number}; a metric is a finite number")
        return number


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
