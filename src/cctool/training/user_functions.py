"""The user's loss, metric and optimizer, called so that every error names the function."""

from __future__ import annotations

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


class UserLoss:
    """A user's loss: (outputs, labels) -> scalar tensor.

    Raises UserCodeError if the function raises or returns something else.
    """

    def __init__(self, reference: str, function: Callable[..., Any]) -> None:
        self.reference = reference
        self._function = function

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        """Loss of one batch."""
        value = user_code.call_often(self.reference, self._function, outputs, labels)
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


class UserMetric:
    """A user's metric: (outputs of a whole split, labels) -> number.

    Raises UserCodeError if the function raises or returns something other than one finite number.
    """

    def __init__(self, reference: str, function: Callable[..., Any]) -> None:
        self.reference = reference
        self.name = reference.rpartition(":")[2]
        self._function = function

    def __call__(self, outputs: Tensor, labels: Tensor) -> float:
        """Metric of all samples together, on the CPU."""
        value = user_code.call_often(self.reference, self._function, outputs, labels)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            shown = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserCodeError(f"{self.reference} returned {shown}; a metric is one number") from None
        if not math.isfinite(number):
            raise UserCodeError(f"{self.reference} returned {number}; a metric is a finite number")
        return number
