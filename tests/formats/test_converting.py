"""What is said of networks that torch cannot export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, nn

import cctool
from cctool.base.errors import ExportError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec


class Deciding(nn.Module):
    """Goes on as ``decide`` says of its features, [N, 4]."""

    def __init__(self, decide: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.conv, self.head, self.decide = nn.Conv2d(1, 4, 3, 2), nn.Linear(4, 10), decide

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        out: Tensor = self.head(y / 60 if self.decide(y) else y)
        return out


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize(
    "decide",
    [lambda y: y.max() > 60, lambda y: int(y.abs().sum()) > 3, lambda y: len(y[y > 0]) > 3],
    ids=["a value", "an integer", "a number of chosen rows"],
)
def test_decisions_by_values_are_called_so(
    decide: Callable[[Tensor], object], suffix: str, tmp_path: Path
) -> None:
    spec = ModelSpec(architecture="lenet", input_shape=(1, 16, 16))
    checkpoint = Checkpoint(Deciding(decide).eval(), spec)
    with pytest.raises(ExportError, match="it decides by values that it computes") as caught:
        cctool.export(checkpoint, output=str(tmp_path / f"a.{suffix}"))
    assert "shapes" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
