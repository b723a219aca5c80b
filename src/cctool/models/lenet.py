"""LeNet-5 with ReLU and max pooling, for 32x32 images (LeCun et al. 1998, section II.B, as taught today)."""

from torch import Tensor, nn


class LeNet(nn.Module):
    """Three 5x5 convolutions (6, 16, 120 channels) and two fully connected layers.

    The third convolution reduces the map to 1x1, so the input must be 32x32. 61,706 parameters at one channel
    and ten classes.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, kernel_size=5),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 120, kernel_size=5),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Sequential(nn.Linear(120, 84), nn.ReLU(inplace=True), nn.Linear(84, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, 32, 32] to logits [N, num_classes]."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]
