"""The layers that give a network's outputs, found by following channels."""

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import ArchitectureError
from cctool.graph.heads import output_layers
from cctool.models import registry


@pytest.mark.parametrize(
    ("reference", "arguments", "size", "expected"),
    [
        ("lenet", {}, 32, ("classifier.2",)),
        ("densenet40", {}, 32, ("classifier",)),
        ("torchvision:squeezenet1_1", {}, 64, ("classifier.1",)),
        ("torchvision:mobilenet_v3_small", {}, 64, ("classifier.3",)),
        ("torchvision:googlenet", {}, 96, ("fc", "aux1.fc2", "aux2.fc2")),
        (
            "torchvision:lraspp_mobilenet_v3_large",
            {"num_classes": 5},
            64,
            ("classifier.low_classifier", "classifier.high_classifier"),
        ),
        (
            "torchvision:deeplabv3_mobilenet_v3_large",
            {"num_classes": 5, "aux_loss": True},
            64,
            ("classifier.4", "aux_classifier.4"),
        ),
    ],
)
def test_of_architectures(
    reference: str, arguments: dict[str, object], size: int, expected: tuple[str, ...]
) -> None:
    model = registry.build(reference, arguments)
    channels = registry.input_shape(reference, arguments)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert output_layers(model, (torch.randn(2, channels, size, size),)) == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Parts(nn.Module):
    """Outputs of several layers, put together in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(6, 4), nn.Linear(6, 4 if how == "sum" else 3)
        self.grouped = nn.Conv2d(6, 6, 1, groups=2)

    def forward(self, x: Tensor) -> object:
        if self.how == "grouped":
            return self.grouped(x[:, :, None, None]).flatten(1)
        a, b = self.a(x), self.b(x)
        return {
            "sum": lambda: a + b,
            "cat": lambda: torch.cat([a, b], 1),
            "dict": lambda: {"boxes": a, "scores": b},
            "part": lambda: a[:, :2],
            "input": lambda: x,
        }[self.how]()


def test_layers_that_are_added_up_are_all_replaced() -> None:
    assert output_layers(Parts("sum"), (torch.randn(2, 6),)) == ("a", "b")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("cat", r"\(a 4, b 3\) are not all as wide as its first output \(7\)"),
        ("dict", r"\(a 4, b 3\) are not all as wide as its first output \(4\)"),
        ("part", r"\(a 4\) are not all as wide as its first output \(2\)"),
        ("input", "alone gives this network's outputs"),
        ("grouped", "grouped too has a value for each of them"),
    ],
)
def test_outputs_without_one_layer_for_the_classes(how: str, why: str) -> None:
    with pytest.raises(ArchitectureError, match=why):
        output_layers(Parts(how), (torch.randn(2, 6),))
