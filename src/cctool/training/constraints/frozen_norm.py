"""Training that leaves the statistics of batch norm as they are."""

from __future__ import annotations

from torch import nn

__all__ = ["freeze_statistics"]


def freeze_statistics(model: nn.Module) -> None:
    """Take batch norm out of training mode: it normalises by its running statistics, and these stay.

    Its scales and shifts are trained as before. Statistics of maps with noise in them, a codec's or a coarse
    quantizer's, are those of signal and noise together; a network that is normalised by them loses signal.

    Args:
        model: in training mode; its batch norms with running statistics go to eval mode.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.eval()
