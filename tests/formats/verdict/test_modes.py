from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cctool.formats.verdict.rounding import Run, exact_runner


class Float(nn.Module):
    """Asks for float32 in each of the ways that code has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.kernel = torch.randn(5, 4, 1, 1) / 3  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.float())
        x = F.conv2d(x, self.kernel)
        x = F.layer_norm(x.to(torch.float32), x.shape[1:])
        ramp = torch.linspace(0.1, 0.7, x.shape[-1], dtype=torch.float32)
        out = torch.zeros(x.shape, dtype=torch.float32)
        out[:] = x * ramp
        third = torch.full((1,), 1 / 3)
        return F.softmax(out.flatten(1) * third, 1, dtype=torch.float32).type_as(third)


def by_hand(model: Float, x: Tensor) -> Tensor:
    x = F.conv2d(x.double(), model.conv.weight.double(), model.conv.bias.double())
    x = F.conv2d(x, model.kernel.double())
    x = (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    x = x * torch.linspace(0.1, 0.7, x.shape[-1], dtype=torch.float64)
    return (x.flatten(1) / 3).softmax(1)


def test_code_that_asks_for_float32_runs_in_float64() -> None:
    torch.manual_seed(0)
    model, x = Float().eval(), torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        expected = by_hand(model, x)
        rounded = model(x)
    (found,) = exact_runner(model)(x)
    assert found.dtype is torch.float64
    assert (found - expected).abs().max() < 1e-15
    assert (rounded - expected).abs().max() > 1e-11
    assert model.conv.weight.dtype is torch.float32
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("run", [exact_runner(nn.Flatten()), exact_runner(nn.Flatten(), loosely=True)])
def test_a_run_that_fails_leaves_the_default_type(run: Run) -> None:
    with pytest.raises(IndexError):
        run(torch.zeros(()))
    assert torch.get_default_dtype() is torch.float32
