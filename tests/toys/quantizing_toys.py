"""Small networks with what quantizers meet: functional and shared activations, residuals, concatenations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.checkpoint.encoding import EncodedTensor
from cctool.quantization.network.attach import attach, following_values, quantizers_of
from cctool.quantization.network.calls import CallSite, flow_of
from cctool.quantization.network.placement import Way, plan_points
from cctool.quantization.network.points import CallPoint, WeightPoint
from cctool.quantization.quantizers.config import QuantizerConfig

WEIGHT = QuantizerConfig(method="uniform", bits=8, narrow=True, axis=0)
ACTIVATION = QuantizerConfig(method="uniform", bits=8, signed=False, symmetric=False)
SIZE = (2, 3, 8, 8)


class Residual(nn.Module):
    """Two convolutions with batch norm, a ReLU that is passed twice, an addition in place, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        x = self.relu(y)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Functional(nn.Module):
    """Functional ReLUs, a ReLU6, a concatenation, a convolution that is passed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        a = F.relu6(self.twice(x))
        b = self.twice(a).relu()
        return self.head(torch.cat((a, b), 1)).mean((2, 3))


class Lost(nn.Module):
    """Goes on with what a ReLU in place wrote, and drops what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x.relu_()
        return self.fc(x.mean((2, 3)))


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in evaluation mode whose batch norms do something."""
    torch.manual_seed(seed)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, *SIZE[1:], generator=torch.Generator().manual_seed(seed))


def quantized(
    model: nn.Module,
    way: Way = "all",
    weight: QuantizerConfig = WEIGHT,
    activation: QuantizerConfig = ACTIVATION,
) -> nn.Module:
    """Quantizers at all places, with the ranges of some images, in place."""
    points = plan_points(flow_of(model, (images(),)), way)
    calls: dict[CallSite, dict[str, object]] = {}
    for layer in points.layers:
        calls.setdefault(layer.place, {})["weight"] = layer.weight
    for place in points.activations:
        calls.setdefault(place.place, {})[place.slot] = activation
    weights = {
        layer.weight: WeightPoint(
            config=weight, channels=None if weight.axis is None else layer.shape[weight.axis], norm=layer.norm
        )
        for layer in points.layers
    }
    attach(model, weights, {place: CallPoint(**given) for place, given in calls.items()})
    held = quantizers_of(model)
    assert held is not None

    def follow(key: str, value: Tensor) -> None:
        quantizer = held.quantizer(key)
        if quantizer is not None:
            quantizer.initialise(value.detach())

    with torch.no_grad(), following_values(model, follow):
        model(images(8))
    return model


def codebook_indices(encoded: EncodedTensor) -> Tensor:
    """Indices of a tensor stored as ``codebook``, bit by bit, in its shape."""
    bits = max(1, (encoded.parts["table"].shape[-1] - 1).bit_length())
    count = math.prod(encoded.shape)
    stream = [byte >> place & 1 for byte in encoded.parts["indices"].tolist() for place in range(8)]
    found = [sum(stream[i * bits + j] << j for j in range(bits)) for i in range(count)]
    return torch.tensor(found).reshape(encoded.shape)
