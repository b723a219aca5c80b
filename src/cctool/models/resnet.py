"""Residual networks for CIFAR (He et al. 2016, arXiv 1512.03385, section 4.2): depth 6n+2, three stages.

Parameter names are those of torchvision's ResNet, so that CIFAR networks trained elsewhere can be loaded.
Three things differ from the paper: shortcuts that change the width are 1x1 convolutions (the paper's option
B, not A), the last batch norm of each block starts at zero (Goyal et al. 2017, arXiv 1706.02677, section
5.1), and the map is averaged globally, so that any input size works.

Pre-activation networks normalise before they convolve (He et al. 2016, arXiv 1603.05027, figure 1b).
"""

from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1, without bias."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv x)))) + shortcut(x))."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, channels, ceil(H / stride), ceil(W / stride)]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """A 3x3 stem and three stages of ``blocks`` blocks at ``base``, 2*``base`` and 4*``base`` channels.

    Three blocks a stage are ResNet-20: 272,474 parameters at 3 channels and 10 classes.
    """

    def __init__(self, blocks: int, in_channels: int = 3, num_classes: int = 10, base: int = 16) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, base)
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(BasicBlock, base, base, blocks, stride=1)
        self.layer2 = _stage(BasicBlock, base, 2 * base, blocks, stride=2)
        self.layer3 = _stage(BasicBlock, 2 * base, 4 * base, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * base, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            # Each block starts as its shortcut alone, which eases the start of training.
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to logits [N, num_classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class PreActBlock(nn.Module):
    """conv(relu(bn(conv(relu(bn x))))) + shortcut, whose 1x1 convolution, if any, reads relu(bn x)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        # Not in place, because an identity shortcut still needs the block's input.
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

    def __init__(self, blocks: int, in_channels: int = 3, num_classes: int = 10, base: int = 16) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, base)
        self.layer1 = _stage(PreActBlock, base, base, blocks, stride=1)
        self.layer2 = _stage(PreActBlock, base, 2 * base, blocks, stride=2)
        self.layer3 = _stage(PreActBlock, 2 * base, 4 * base, blocks, stride=2)
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


def _stage(
    block: type[BasicBlock | PreActBlock], in_channels: int, channels: int, blocks: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(blocks - 1)))
