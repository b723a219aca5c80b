"""Networks with something to fold, their edge cases, and statistics as training leaves them."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

Size = int | tuple[int, int]


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network with scales, shifts and running statistics as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def conv_bn(inputs: int, outputs: int, kernel: Size, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size, and batch norm."""
    padding = kernel // 2 if isinstance(kernel, int) else tuple(size // 2 for size in kernel)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class RepBlock(nn.Module):
    """3x3, 1x1 and identity, each with batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_bn(inputs, outputs, 3, stride, groups)
        self.pointwise = conv_bn(inputs, outputs, 1, stride, groups)
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = 0 if self.identity is None else self.identity(x)
        return torch.relu(self.dense(x) + self.pointwise(x) + identity)


class AsymmetricBlock(nn.Module):
    """3x3, 3x1 and 1x3 in parallel."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.square = conv_bn(inputs, outputs, 3, stride)
        self.tall = conv_bn(inputs, outputs, (3, 1), stride)
        self.wide = conv_bn(inputs, outputs, (1, 3), stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.square(x) + self.tall(x) + self.wide(x))


class OverBlock(nn.Module):
    """Several 3x3, a 1x1 and an identity, added in place; a batch norm behind the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.scale = conv_bn(inputs, outputs, 1, stride, groups)
        self.several = nn.ModuleList(conv_bn(inputs, outputs, 3, stride, groups) for _ in range(3))
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.after = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale(x)
        for branch in self.several:
            out += branch(x)
        if self.skip is not None:
            out = out + self.skip(x)
        return self.after(out).relu_()


def ended(*layers: nn.Module, width: int, classes: int = 10) -> nn.Sequential:
    """Layers and a classifier."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes))


def rep(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """A RepVGG."""
    blocks = RepBlock(in_channels, 8, 2), RepBlock(8, 8), RepBlock(8, 8, groups=4)
    return ended(*blocks, width=8, classes=num_classes)


def asymmetric(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """An ACNet."""
    blocks = AsymmetricBlock(in_channels, 8), AsymmetricBlock(8, 16, 2)
    return ended(*blocks, width=16, classes=num_classes)


def over(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """A MobileOne."""
    blocks = OverBlock(in_channels, 8, 2), OverBlock(8, 8, groups=8), OverBlock(8, 8)
    return ended(*blocks, width=8, classes=num_classes)


def _computed(make: Callable[[nn.Module], nn.Module], classes: int, channels: int) -> nn.Module:
    first, second, last = nn.Conv2d(channels, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(32, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        first, second, last = map(make, (first, second, last))  # type: ignore[assignment]
    layers = first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*layers, nn.Flatten(), last)


def normed(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Torch's present weight_norm."""
    return _computed(nn.utils.parametrizations.weight_norm, num_classes, in_channels)


def old_normed(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Torch's older weight_norm, a hook."""
    return _computed(nn.utils.weight_norm, num_classes, in_channels)


def spectral(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Torch's present spectral_norm."""
    return _computed(nn.utils.parametrizations.spectral_norm, num_classes, in_channels)


def old_spectral(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Torch's older spectral_norm, a hook."""
    return _computed(nn.utils.spectral_norm, num_classes, in_channels)


def orthogonal(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Torch's orthogonal weights."""
    return _computed(nn.utils.parametrizations.orthogonal, num_classes, in_channels)


def torch_pruned(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Torch's pruning, twice on each layer."""

    def pruned(layer: nn.Module) -> nn.Module:
        torch_prune.random_unstructured(layer, "weight", amount=0.3)
        torch_prune.ln_structured(layer, "weight", amount=0.25, n=2, dim=0)
        return layer

    return _computed(pruned, num_classes, in_channels)


class Symmetric(nn.Module):
    """A parametrization of the user's."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.flip(-1)) / 2


def own_parametrized(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """The user's parametrization, of weight and bias."""

    def made(layer: nn.Module) -> nn.Module:
        for name in ("weight", "bias"):
            nn.utils.parametrize.register_parametrization(layer, name, Symmetric())
        return layer

    return _computed(made, num_classes, in_channels)


def norms(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Batch norm behind and before all kinds of layers."""
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.Conv2d(in_channels, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, 2, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, 2, 1, groups=4, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(32),
        nn.Linear(32, 16, bias=False),
        nn.BatchNorm1d(16, affine=False),
        nn.ReLU(),
        nn.Linear(16, num_classes),
    )


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    made.__name__: made
    for made in (
        *(rep, asymmetric, over, normed, old_normed, spectral, old_spectral, orthogonal, torch_pruned),
        *(own_parametrized, norms),
    )
}
"""Networks of which nothing is left to fold afterwards."""


class Gated(nn.Module):
    """Takes another way for pictures with an even background, which neither noise nor constants have."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, 8, 3, 2), nn.BatchNorm2d(8)
        self.unit, self.last = conv_bn(8, 8, 3, 2), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if 0.1 < float((x == x.amin()).double().mean()) < 0.95:
            y = 8 * torch.tanh(y)
        result: Tensor = self.last(self.unit(self.norm(y).relu()).relu().mean((2, 3)))
        return result


class Custom(nn.Module):
    """Modules by name and a forward of them."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def functional_norm(self: Any, x: Tensor) -> Tensor:
    """Batch norm by the code of the module around it."""
    norm = self.norm
    return F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)
