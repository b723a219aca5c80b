"""Batch norm: statistics estimated again for changed weights, or frozen during training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from cctool.base.errors import DataError
from cctool.base.networks import device_of, in_eval_mode
from cctool.data.serving.batches import Batch


def recalibrate(
    model: nn.Module, batches: Iterable[Batch], n: int, device: torch.device | None = None
) -> int:
    """Replace running means and variances by the average over ``n`` images.

    Only batch norms run in training mode, so dropout and the like stay off. Batches are weighted by their
    number of images, which is the cumulative average of ``momentum=None`` if all have the same size.

    Args:
        model: changed in place; modes and momenta are as before afterwards.
        batches: training images (N, C, H, W), normalised, without augmentation; labels are ignored.
        n: images to use, at least 1.
        device: the network's device; None takes that of its first parameter.

    Returns:
        Number of images used; 0 if the network has no batch norm with running statistics.

    Raises:
        DataError: if there are no images.
    """
    norms = norms_with_statistics(model)
    if not norms:
        return 0
    device = device or device_of(model)
    momenta = [norm.momentum for norm in norms]
    used = 0
    with in_eval_mode(model), torch.no_grad():
        for norm in norms:
            norm.train()
        try:
            for batch in batches:
                images = batch.images[: n - used]
                # After a global pooling, a single image has no variance.
                if len(images) < 2 and used:
                    break
                # Momentum m sets running <- running + m (batch - running); this m makes it the mean so far.
                for norm in norms:
                    norm.momentum = len(images) / (used + len(images))
                model(images.to(device))
                used += len(images)
                if used >= n:
                    break
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not used:
        raise DataError("batch-norm statistics cannot be estimated: the training split is empty")
    return used


def freeze_statistics(model: nn.Module) -> None:
    """Put the batch norms with running statistics of a network in training mode into eval mode.

    They then normalise by their running statistics, which no longer change, while scales and shifts are still
    trained. Statistics of feature maps with noise from a codec or a coarse quantizer are those of signal and
    noise together; a network that is normalised by them loses signal.
    """
    for norm in norms_with_statistics(model):
        norm.eval()


def norms_with_statistics(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Batch norms that keep running statistics."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in norms if norm.running_mean is not None]
