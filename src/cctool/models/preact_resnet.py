"""Residual networks that normalise before they convolve (He et al. 2016, arXiv 1603.05027, figure 1b)."""

from torch import Tensor, nn

from cctool.models.resnet import conv3x3

__all__ = ["CifarPreActResNet", "PreActBlock", "preact_resnet20"]


class PreActBlock(nn.Module):
    """conv(relu(bn(conv(relu(bn x))))) + shortcut; a widening shortcut reads the activated input."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        # Not in place: an identity shortcut still needs the input as it came.
        self.relu = nn.ReLU()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.downsample: nn.Conv2d | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, channels, ceil(H / stride), ceil(W / stride)]."""
        activated = self.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(activated)
        out = self.conv1(activated)
        out = self.conv2(self.relu(self.bn2(out)))
        return out + shortcut  # type: ignore[no-any-return]


class CifarPreActResNet(nn.Module):
    """A 3x3 stem, three stages of ``blocks`` pre-activation blocks, and a last batch norm."""

    def __init__(self, blocks: int, in_channels: int, num_classes: int, base: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, base)
        self.layer1 = _stage(base, base, blocks, stride=1)
        self.layer2 = _stage(base, 2 * base, blocks, stride=2)
        self.layer3 = _stage(2 * base, 4 * base, blocks, stride=2)
        self.bn = nn.BatchNorm2d(4 * base)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * base, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to logits [N, num_classes]."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))  # type: ignore[no-any-return]


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(PreActBlock(channels, channels, 1) for _ in range(blocks - 1)))


def preact_resnet20(in_channels: int = 3, num_classes: int = 10, base: int = 16) -> CifarPreActResNet:
    """Build the pre-activation ResNet-20."""
    return CifarPreActResNet(3, in_channels, num_classes, base)
