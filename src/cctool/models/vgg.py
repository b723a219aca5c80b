"""VGG with batch norm for CIFAR (Simonyan and Zisserman 2015, arXiv 1409.1556, table 1)."""

from collections.abc import Sequence

from torch import Tensor, nn

# Columns A, D and E of the paper's table 1: output channels of each 3x3 convolution, stage by stage.
STAGES_A = ((64,), (128,), (256, 256), (512, 512), (512, 512))
STAGES_D = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
STAGES_E = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class CifarVGG(nn.Module):
    """Stages of 3x3 convolution, batch norm and ReLU, each ended by max pooling; then one linear classifier.

    Five poolings each halve the map, so the input must be at least 32x32.
    """

    def __init__(self, stages: Sequence[Sequence[int]], in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in stages:
            for width in stage:
                convolution = nn.Conv2d(channels, width, kernel_size=3, padding=1)
                layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W], H and W at least 32, to logits [N, num_classes]."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))  # type: ignore[no-any-return]
