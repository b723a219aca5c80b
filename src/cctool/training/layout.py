"""In which memory format a network is trained."""

from __future__ import annotations

import torch
from torch import nn

from cctool.graph.execution import in_mode

__all__ = ["memory_format"]


def memory_format(
    model: nn.Module, device: torch.device, input_shape: tuple[int, ...] | None
) -> torch.memory_format:
    """Choose channels last wherever the network computes in it: both cuDNN and oneDNN are faster so.

    Code such as ``x.view(x.size(0), -1)`` behind a convolution asks for contiguous memory; a trial tells.

    Args:
        model: on the device; it comes back in the format that is chosen.
        device: where it is trained.
        input_shape: (C, H, W) of one input; None asks for contiguous memory.
    """
    has_convolutions = any(isinstance(module, nn.Conv2d) for module in model.modules())
    # Tensors of five dimensions (3-D convolutions) have no such layout.
    fits = all(tensor.dim() <= 4 for tensor in (*model.parameters(), *model.buffers()))
    unsafe = device.type == "cpu" and any(_overflows(module) for module in model.modules())
    if input_shape is None or not has_convolutions or not fits or unsafe:
        return torch.contiguous_format
    model.to(memory_format=torch.channels_last)
    inputs = torch.zeros(2, *input_shape, device=device).to(memory_format=torch.channels_last)
    try:
        for training in (False, True):
            with in_mode(model, training=training), torch.no_grad():
                model(inputs)
    except Exception:
        # Whatever is wrong beside the memory format is raised again by the first step of training.
        model.to(memory_format=torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def _overflows(module: nn.Module) -> bool:
    """Whether oneDNN 3.12 (torch 2.14) writes past its buffers in the backward pass in channels-last memory.

    Strided 1x1 convolutions of fewer than 8 input channels end the process so; shortcuts of thinned residual
    networks are such.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.weight.shape[1] < 8
    )
