"""DenseNet for CIFAR (Huang et al. 2017, arXiv 1608.06993, section 3): no bottleneck, no compression."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Append ``growth_rate`` new channels, conv(relu(bn x)), to the input's."""

    def __init__(self, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, growth_rate, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C + growth_rate, H, W]."""
        return torch.cat([x, self.conv(self.relu(self.norm(x)))], dim=1)


class CifarDenseNet(nn.Module):
    """Three dense blocks of ``layers`` layers at full, half and quarter size, joined by 1x1 transitions.

    Every layer adds ``growth_rate`` channels, the paper's k.
    """

    def __init__(
        self, layers: int, in_channels: int = 3, num_classes: int = 10, growth_rate: int = 12
    ) -> None:
        super().__init__()
        channels = 16
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["conv0"] = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False)
        for block in range(1, 4):
            parts[f"denseblock{block}"] = _dense_block(channels, layers, growth_rate)
            channels += layers * growth_rate
            if block < 3:
                parts[f"transition{block}"] = _transition(channels)
        parts["norm"] = nn.BatchNorm2d(channels)
        parts["relu"] = nn.ReLU(inplace=True)
        self.features = nn.Sequential(parts)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W], H and W at least 4, to logits [N, num_classes]."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))  # type: ignore[no-any-return]


def _dense_block(in_channels: int, layers: int, growth_rate: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            (f"denselayer{index + 1}", DenseLayer(in_channels + index * growth_rate, growth_rate))
            for index in range(layers)
        )
    )


def _transition(channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(channels),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(channels, channels, kernel_size=1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )
