"""The masked network made a second way: by hooks on activations that know nothing of graphs and plans.

Every batch norm's gamma and every layer's bias is drawn at random, so that no two values are equal. The
oracle looks only at the dense and at the cut network: the values that the cut one lacks tell which channels
each of its modules lost, and hooks on the dense network set just these channels of its output to zero.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, biases and batch-norm tensors, in float64."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _NORMS):
                for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.2)):
                    if tensor is not None:
                        drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                        tensor.copy_(drawn + low)
                variance = torch.rand(module.running_var.shape, generator=generator, dtype=torch.float64)
                module.running_var.copy_(variance + 0.5)
            elif isinstance(module, _LAYERS):
                # keeps the signal's size from layer to layer (He et al. 2015), so that no mistake drowns
                weight = torch.randn(module.weight.shape, generator=generator).double()
                module.weight.copy_(weight * (2 / module.weight[0].numel()) ** 0.5)
            if isinstance(module, _LAYERS) and module.bias is not None:
                module.bias.copy_(
                    torch.rand(module.bias.shape, generator=generator, dtype=torch.float64) - 0.5
                )
    return model


def lost_channels(dense: nn.Module, cut: nn.Module) -> dict[str, Tensor]:
    """Output channels that each module lost, told by the values that are missing."""
    lost = {}
    small = dict(cut.named_modules())
    for name, module in dense.named_modules():
        values, other = _marks(module), _marks(small[name])
        if values is None or other is None:
            continue
        missing = ~torch.isin(values, other)
        assert len(other) == len(values) - int(missing.sum())
        lost[name] = missing.nonzero().flatten()
    return lost


def _marks(module: nn.Module) -> Tensor | None:
    """One value a channel, no two of them equal."""
    if isinstance(module, _NORMS):
        return module.running_mean if module.weight is None else module.weight
    return module.bias if isinstance(module, _LAYERS) else None


@contextmanager
def zeroed(model: nn.Module, lost: dict[str, Tensor]) -> Iterator[nn.Module]:
    """Hooks that zero the lost channels of each module's output."""

    def hook(channels: Tensor, features_last: bool) -> Callable[..., Tensor]:
        dim = -1 if features_last else 1
        return lambda module, args, output: output.index_fill(dim, channels, 0)

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(hook(channels, isinstance(modules[name], nn.Linear)))
        for name, channels in lost.items()
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Output in evaluation mode."""
    result = model.eval()(x)
    assert isinstance(result, Tensor)
    return result


def relative(expected: Tensor, actual: Tensor) -> float:
    """Largest difference over the spread of what is expected across the batch."""
    assert expected.shape == actual.shape
    spread = (expected - expected.mean(dim=0)).abs().max()
    assert spread > 1e-7 * expected.abs().max(), "the network does not look at its input"
    return float((expected - actual).abs().max() / spread)
