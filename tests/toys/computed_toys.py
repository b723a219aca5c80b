"""Networks whose layers take weights that are no parameters: computed on the way to the call, or buffers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.operations.keep.calibrate import calibration_images
from procedure_toys import DIGITS, context, digits

CLASSES = 10
DATA = replace(DIGITS, limit=128, batch_size=64)


class Centred(nn.Conv2d):
    """Each filter without its mean, over its deviation: values far above those of the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        deviation, mean = torch.std_mean(flat, 1, keepdim=True)
        return self._conv_forward(x, ((flat - mean) / (deviation + 1e-4)).view_as(self.weight), self.bias)


class ByBatchNorm(nn.Conv2d):
    """The same by a batch norm of the weight, in training mode in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.view(1, len(self.weight), -1)
        found = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-4)
        return self._conv_forward(x, found.view_as(self.weight), self.bias)


class Gained(nn.Linear):
    """A parameter of deviation 1 and a gain that makes it small."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.in_features, self.bias)


class Summed(nn.Module):
    """A kernel of 3x3 and one of 1x1 that are one before the call; its bias is a sum, too."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(inputs, outputs, 3), nn.Conv2d(inputs, outputs, 1)
        nn.init.normal_(self.point.weight)
        nn.init.normal_(self.point.bias)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.wide.weight + F.pad(self.point.weight, (1, 1, 1, 1))
        return F.conv2d(x, kernel, self.wide.bias + self.point.bias, 2, 1)


class Sliced(nn.Module):
    """Two calls that take the halves of one parameter, and one that takes all of it, turned around."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(outputs, inputs, 3, 3) / 3)
        with torch.no_grad():
            self.bank[: outputs // 2].mul_(0.02)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.bank.chunk(2)
        halves = torch.cat((F.conv2d(x, 40 * first, None, 2, 1), F.conv2d(x, second, None, 2, 1)), 1)
        return halves + F.conv2d(x, self.bank.flip(3), None, 2, 1)


class BothWays(nn.Module):
    """One parameter that a call takes as it is, and another call a thousand times smaller."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, 2, 1) + 1000 * F.conv2d(x, self.weight / 1000, None, 2, 1).abs()


class Viewed(nn.Linear):
    """A linear layer's parameter as a kernel of 1x1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class Blurred(nn.Module):
    """A fixed kernel in a buffer, all of whose values are small."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(row, row).expand(channels, 1, 3, 3).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.get_buffer("kernel")
        return F.conv2d(x, kernel, None, 2, 1, groups=len(kernel))


class Routed(nn.Module):
    """A mixture of kernels that the input chooses."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, outputs * inputs * 9) / 5)
        self.gate = nn.Linear(inputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        count, inputs = x.shape[:2]
        mixed = self.gate(x.mean((2, 3))).sigmoid() @ self.experts
        kernels = mixed.view(-1, inputs, 3, 3)
        y = F.conv2d(x.reshape(1, count * inputs, *x.shape[2:]), kernels, None, 2, 1, groups=count)
        return y.view(count, -1, *y.shape[2:])


class PerSample(nn.Module):
    """One kernel, repeated for each sample of the batch, each of which is a group."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs, 3, 3) / 5)

    def forward(self, x: Tensor) -> Tensor:
        count, inputs = x.shape[:2]
        kernels = (self.kernel[None] * 1.5).expand(count, -1, -1, -1, -1).reshape(-1, inputs, 3, 3)
        y = F.conv2d(x.reshape(1, count * inputs, *x.shape[2:]), kernels, None, 2, 1, groups=count)
        return y.view(count, -1, *y.shape[2:])


class ByBatch(nn.Conv2d):
    """A weight that is divided by the number of samples."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / len(x), self.bias)


class ParameterByBatch(nn.Module):
    """Two parameters, one of which is for batches of two."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(torch.randn(outputs, inputs, 3, 3) / 5 for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernels[int(len(x) == 2)], None, 2, 1)


class Generated(nn.Module):
    """A kernel that a small network makes of learnt numbers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(outputs, 4))
        self.makers = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, inputs * 9))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.makers(self.codes).view(len(self.codes), -1, 3, 3), None, 2, 1)


class Remembering(Centred):
    """Keeps its computed weight in evaluation mode."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, 2, 1)
        self.kept: Tensor | None = None

    def train(self, mode: bool = True) -> Remembering:
        self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or self.training:
            flat = self.weight.flatten(1)
            made = ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view_as(self.weight)
            if self.training:
                return self._conv_forward(x, made, self.bias)
            self.kept = made.detach()
        return self._conv_forward(x, self.kept, self.bias)


class Noisy(nn.Conv2d):
    """A weight with random numbers in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight + 0.1 * torch.randn_like(self.weight), self.bias)


class Counting(nn.Conv2d):
    """A weight that grows with the number of passes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, 2, 1)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        passes = self.get_buffer("passes")
        passes.add_(1)
        return self._conv_forward(x, self.weight * (1 + passes / 10), self.bias)


class Chosen(nn.Module):
    """Two convolutions of which the input's mean chooses one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.options = nn.ModuleList(nn.Conv2d(inputs, outputs, 3, 2, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.options[int(x.mean() > 1e6)](x)


class ByCount(nn.Module):
    """A branch for two images, such as a network is traced with, and another for more."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.options = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 1))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.options[int(len(x) == 2)](x)


class Fused(Summed):
    """Two convolutions in training, one of their summed kernels in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.wide(F.pad(x, (1, 1, 1, 1)))[..., ::2, ::2] + self.point(x)[..., ::2, ::2]
        return super().forward(x)


def _hooked(layer: nn.Module, hook: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hook(layer)


def _network(middle: nn.Module, last: nn.Module | None = None) -> nn.Sequential:
    """``middle`` takes 6 channels of 8x8 and puts out 8 of 4x4."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 4, 1), nn.ReLU(), middle, nn.ReLU(), nn.Flatten(), last or nn.Linear(128, CLASSES)
    )


def _conv() -> nn.Conv2d:
    return nn.Conv2d(6, 8, 3, 2, 1)


def centred(num_classes: int = CLASSES) -> nn.Module:
    return _network(Centred(6, 8, 3, 2, 1))


def centred_and_normed(num_classes: int = CLASSES) -> nn.Module:
    return _network(nn.Sequential(Centred(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)))


def by_batch_norm(num_classes: int = CLASSES) -> nn.Module:
    return _network(ByBatchNorm(6, 8, 3, 2, 1))


def gained(num_classes: int = CLASSES) -> nn.Module:
    return _network(_conv(), Gained(128, CLASSES))


def weight_norm(num_classes: int = CLASSES) -> nn.Module:
    norm = parametrizations.weight_norm
    return _network(norm(_conv()), norm(nn.Linear(128, CLASSES)))


def old_weight_norm(num_classes: int = CLASSES) -> nn.Module:
    return _network(_hooked(_conv(), nn.utils.weight_norm))


def spectral_norm(num_classes: int = CLASSES) -> nn.Module:
    return _network(parametrizations.spectral_norm(_conv()))


def old_spectral_norm(num_classes: int = CLASSES) -> nn.Module:
    return _network(_hooked(_conv(), nn.utils.spectral_norm))


def transposed(num_classes: int = CLASSES) -> nn.Module:
    layer = parametrizations.weight_norm(nn.ConvTranspose2d(6, 8, 3, 1, 1))
    return _network(nn.Sequential(layer, nn.AvgPool2d(2)))


class _Rows(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2)).view(len(x), 8, 4, 4)


def one_dimensional(num_classes: int = CLASSES) -> nn.Module:
    return _network(_Rows(parametrizations.weight_norm(nn.Conv1d(6, 8, 4, 4))))


class _Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.flip(-1)) / 2


def symmetric(num_classes: int = CLASSES) -> nn.Module:
    layer = _conv()
    parametrize.register_parametrization(layer, "weight", _Symmetric())
    return _network(layer)


def torch_pruned(num_classes: int = CLASSES) -> nn.Module:
    return _network(torch_prune.l1_unstructured(_conv(), "weight", amount=0.4))


def summed(num_classes: int = CLASSES) -> nn.Module:
    return _network(nn.Sequential(Summed(6, 8), nn.BatchNorm2d(8)))


def sliced(num_classes: int = CLASSES) -> nn.Module:
    return _network(Sliced(6, 8))


def both_ways(num_classes: int = CLASSES) -> nn.Module:
    return _network(BothWays(6, 8))


def viewed(num_classes: int = CLASSES) -> nn.Module:
    return _network(nn.Sequential(Viewed(6, 8), nn.MaxPool2d(2)))


def blurred(num_classes: int = CLASSES) -> nn.Module:
    return _network(nn.Sequential(Blurred(6), nn.Conv2d(6, 8, 1)))


def routed(num_classes: int = CLASSES) -> nn.Module:
    return _network(Routed(6, 8))


def per_sample(num_classes: int = CLASSES) -> nn.Module:
    return _network(PerSample(6, 8))


def by_batch(num_classes: int = CLASSES) -> nn.Module:
    return _network(ByBatch(6, 8, 3, 2, 1))


def parameter_by_batch(num_classes: int = CLASSES) -> nn.Module:
    return _network(ParameterByBatch(6, 8))


def generated(num_classes: int = CLASSES) -> nn.Module:
    return _network(Generated(6, 8))


def remembering(num_classes: int = CLASSES) -> nn.Module:
    return _network(Remembering(6, 8))


def noisy(num_classes: int = CLASSES) -> nn.Module:
    return _network(Noisy(6, 8, 3, 2, 1))


def counting(num_classes: int = CLASSES) -> nn.Module:
    return _network(Counting(6, 8))


def chosen(num_classes: int = CLASSES) -> nn.Module:
    return _network(Chosen(6, 8))


def by_count(num_classes: int = CLASSES) -> nn.Module:
    return _network(ByCount(6, 8))


def fused(num_classes: int = CLASSES) -> nn.Module:
    return _network(Fused(6, 8))


FIXED: Mapping[str, Callable[..., nn.Module]] = {
    made.__name__: made
    for made in (
        *(centred, centred_and_normed, by_batch_norm, gained, weight_norm, old_weight_norm, spectral_norm),
        *(old_spectral_norm, transposed, one_dimensional, symmetric, torch_pruned, summed, sliced),
        *(both_ways, blurred, generated),
    )
}
"""Networks with a weight that is no parameter and that is the same in every pass."""

VARYING: Mapping[str, Callable[..., nn.Module]] = {
    made.__name__: made for made in (routed, noisy, counting, per_sample, by_batch, parameter_by_batch)
}
"""Networks with a weight that nobody knows in advance, in the module called 2."""


def architecture(name: str) -> str:
    return f"{Path(__file__)}:{name}"


def network(name: str, seed: int = 0) -> Checkpoint:
    """A network of this file as a checkpoint, its batch norms doing something."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = globals()[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    spec = ModelSpec(
        architecture=architecture(name),
        arguments={"num_classes": CLASSES},
        input_shape=(1, 32, 32),
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    )
    return Checkpoint(model.eval(), spec)


def digit_images(checkpoint: Checkpoint, count: int = 64) -> Tensor:
    """Preprocessed training images, (count, 1, 32, 32)."""
    served, _ = calibration_images(checkpoint, digits(128), count, DATA, context())
    return torch.cat(list(served))


def signal_to_noise(wanted: Tensor, found: Tensor) -> float:
    """10 log10 of the variance of outputs over samples, over their mean squared error."""
    moved = wanted - wanted.mean(0)
    return float(10 * torch.log10(moved.square().mean() / (wanted - found).square().mean()))
