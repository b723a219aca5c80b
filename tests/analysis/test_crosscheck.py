"""thop beside us: its published figures, and why they differ."""

import pytest
import torch
from torch import Tensor, nn

from cctool.analysis.crosscheck import CrossCheck, check_against_thop
from cctool.graph.cost import measure


def checked(model: nn.Module, *shape: int) -> CrossCheck:
    return check_against_thop(model, shape, measure(model, shape))


def line(check: CrossCheck, kind: str) -> tuple[int, int, str]:
    return next((x.ours, x.thop, x.explanation) for x in check.lines if x.kind == kind)


def test_thops_figure_for_mobilenet_and_its_reason() -> None:
    from torchvision.models import mobilenet_v2

    check = checked(mobilenet_v2(), 3, 224, 224)
    assert check.total is not None
    assert check.total / 1e6 == pytest.approx(327.5, abs=0.05)
    ours, thop, explanation = line(check, "convolution and linear")
    assert ours == thop
    assert explanation == ""
    ours, thop, explanation = line(check, "norm")
    assert thop == 4 * ours
    assert "four" in explanation
    assert sum(x.thop for x in check.lines) == check.total


def test_functions_and_attention_are_named_as_invisible() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.kernel = nn.Parameter(torch.ones(8, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.conv2d(x, self.kernel).flatten(2).transpose(1, 2)
            return self.attention(x, x, x, need_weights=False)[0]

    check = checked(Net(), 3, 4, 4)
    ours, thop, explanation = line(check, "convolution and linear")
    assert (ours, thop) == (16 * 24 + 4 * 16 * 64, 0)
    assert "invisible" in explanation
    assert "(network)" in explanation
    assert "attention.out_proj" in explanation
    assert line(check, "attention and matmul")[:2] == (2 * 16 * 16 * 8, 0)


def test_transposed_and_shared_layers_are_explained() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
            self.mix = nn.Conv2d(4, 4, 1)
            self.again = nn.Sequential(self.mix)

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.mix(self.up(x)))

    check = checked(Net(), 4, 8, 8)
    ours, thop, explanation = line(check, "convolution and linear")
    assert ours == 4 * 64 * 16 + 2 * 256 * 16
    # It hooks a shared module once for each place, and adds each place: 4 times the 2 calls.
    assert thop == 4 * 4 * 64 * 16 + 4 * 2 * 256 * 16
    assert "transposed convolutions" in explanation
    assert "again.0" in explanation


def test_the_model_and_stdout_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    model.train()
    names = set(model.state_dict())
    checked(model, 3, 4, 4)
    assert set(model.state_dict()) == names
    assert model.training
    assert not model[0]._forward_hooks
    assert capsys.readouterr().out == ""


def test_a_failure_is_reported_and_not_raised() -> None:
    class Uncopyable(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("cannot be copied")

    check = checked(Uncopyable(4, 4), 4)
    assert check.total is None
    assert (
        check.failure
        == "thop failed: ArchitectureError: the network cannot be copied: TypeError: cannot be copied"
    )
