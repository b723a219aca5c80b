"""Noise of a share of a step on activations before they are rounded: how rounding amplifies small errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.networks import removing
from cctool.quantization.network.attach import quantizers_of
from cctool.quantization.quantizers.base import Quantizer
from cctool.quantization.quantizers.grid import aligned


@contextmanager
def shaken(model: nn.Module, share: float, generator: torch.Generator) -> Iterator[None]:
    """Add noise to the input of each activation's quantizer, uniform within +- ``share`` of its step.

    The generator is on the CPU.
    """
    held = quantizers_of(model)
    found = [] if held is None else [held.quantizer(key) for key in held.activation_keys]

    def moved(quantizer: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        x = args[0]
        assert isinstance(quantizer, Quantizer)
        grid = quantizer.grid()
        if grid is None:
            return (x,)
        step = aligned(grid.scale.to(x.device, x.dtype), x.dim(), grid.axis)
        noise = torch.rand(x.shape, generator=generator) * 2 - 1
        return (x + noise.to(x.device, x.dtype) * step * share,)

    handles = [quantizer.register_forward_pre_hook(moved) for quantizer in found if quantizer is not None]
    with removing(handles):
        yield
