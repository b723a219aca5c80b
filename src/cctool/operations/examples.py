"""Inputs that show how a checkpoint's network computes, where images would say no more."""

from __future__ import annotations

import torch
from torch import Tensor

from cctool.base.networks import device_of, in_mode
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.graph.execution import blaming_the_size

__all__ = ["example"]


def example(checkpoint: Checkpoint) -> tuple[Tensor, ...]:
    """Inputs that show which channels go together; the numbers serve the comparison of cut and masked.

    Raises:
        ArchitectureError: the network does not run on its own input size.
    """
    generator = torch.Generator().manual_seed(0)
    device = device_of(checkpoint.model)
    images = torch.randn(2, *checkpoint.spec.input_shape, generator=generator).to(device)
    with blaming_the_size(checkpoint.spec.input_shape), in_mode(checkpoint.model, training=False):
        checkpoint.model(images)
    return (images,)
