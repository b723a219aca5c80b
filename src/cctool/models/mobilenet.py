"""The small MobileNet (Howard et al. 2017, arXiv 1704.04861) that serves as a student: 256,779 parameters.

Each block normalises and activates after its depthwise convolution only; the pointwise one is linear. Module
names are ``cnn.{i}.0`` depthwise, ``.1`` batch norm, ``.3`` pointwise, and ``fc``.
"""

from torch import Tensor, nn

# Channels after each block, in units of the base; the width multiplier acts on blocks 3 to 6 only.
MULTIPLES = (1, 2, 4, 8, 16, 16, 16, 16)
SLIMMED = range(3, 7)
POOLED = range(1, 4)


class MobileNetStudent(nn.Module):
    """A 3x3 convolution and seven depthwise-separable blocks, the first three of them pooled.

    Four poolings each halve the map, so the input must be at least 16x16. ``width``, in (0, 1], multiplies
    the channels of blocks 3 to 6 (truncated).
    """

    def __init__(
        self, in_channels: int = 3, num_classes: int = 11, base: int = 16, width: float = 1.0
    ) -> None:
        super().__init__()
        widths = [base * multiple for multiple in MULTIPLES]
        for index in SLIMMED:
            widths[index] = int(widths[index] * width)
        stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU6(inplace=True),
            nn.MaxPool2d(2),
        )
        blocks = (_block(widths[i - 1], widths[i], pooled=i in POOLED) for i in range(1, len(widths)))
        self.cnn = nn.Sequential(stem, *blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W], H and W at least 16, to logits [N, num_classes]."""
        return self.fc(self.avgpool(self.cnn(x)).flatten(1))  # type: ignore[no-any-return]


def _block(in_channels: int, out_channels: int, *, pooled: bool) -> nn.Sequential:
    block = nn.Sequential(
        nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1, groups=in_channels),
        nn.BatchNorm2d(in_channels),
        nn.ReLU6(inplace=True),
        nn.Conv2d(in_channels, out_channels, kernel_size=1),
    )
    if pooled:
        block.append(nn.MaxPool2d(2))
    return block
