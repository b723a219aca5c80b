"""The magnitude of complex tensors."""

from __future__ import annotations

from torch import Tensor

__all__ = ["TINY", "magnitude"]

TINY = 1e-24
"""The square of 1e-12, under which |z| counts as zero; its power -3/2, met in gradients, is a float32."""


def magnitude(values: Tensor) -> Tensor:
    """|z| of complex values, whose gradient is 0 at 0 and finite everywhere; real values as they are.

    `torch.abs` gives NaN gradients for values whose square underflows.
    """
    if not values.is_complex():
        return values
    return (values.real.square() + values.imag.square() + TINY).sqrt()
