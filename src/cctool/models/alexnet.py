"""AlexNet in its CIFAR form: 3x3 kernels and a 2x2 map before the classifier (Krizhevsky et al. 2012)."""

from torch import Tensor, nn


class AlexNet(nn.Module):
    """Five 3x3 convolutions (the first with stride 2), three max poolings, three fully connected layers.

    The classifier reads a 256x2x2 map, so the input must be 32x32. 23,272,266 parameters at 3 channels and
    10 classes, of which 21 million are in the fully connected layers. ``dropout``, in [0, 1), is applied
    before both hidden layers.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 64, kernel_size=3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 192, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 2 * 2, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, 32, 32] to logits [N, num_classes]."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]
