"""Batch norm: statistics estimated again for changed weights, or left as they are in training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from cctool.base.errors import DataError
from cctool.base.networks import device_of, in_eval_mode
from cctool.data.serving.batches import Batch

__all__ = ["freeze_statistics", "recalibrate"]


def recalibrate(
    model: nn.Module, batches: Iterable[Batch], n: int, device: torch.device | None = None
) -> int:
    """Replace running means and variances by the average over ``n`` images.

    Batch norms alone run in train mode, so dropout and the like stay off. Each batch counts by its number
    of images, which is the cumulative average of ``momentum=None`` where batches are equal.

    Args:
        model: changed in place; modes and momenta come back as they were.
        batches: un-augmented training images (N, C, H, W), normalised; labels are not looked at.
        n: images to use, at least 1.
        device: where the network lies; None takes that of its first parameter.

    Returns:
        How many images were used; 0 if the network has no batch norm with running statistics.

    Raises:
        DataError: if there are no images.
    """
    norms = _with_statistics(model)
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
                # A single image has no variance behind a global pooling.
                if len(images) < 2 and used:
                    break
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
    """Take batch norm out of training mode: it normalises by its running statistics, and these stay.

    Its scales and shifts are trained as before. Statistics of maps with noise in them, a codec's or a coarse
    quantizer's, are those of signal and noise together; a network that is normalised by them loses signal.

    Args:
        model: in training mode; its batch norms with running statistics go to eval mode.
    """
    for norm in _with_statistics(model):
        norm.eval()


def _with_statistics(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in norms if norm.running_mean is not None]
