"""Where quantizers go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.quantization.network.calls import flow_of
from cctool.quantization.network.placement import INPUT_PLACE, Points, Way, plan_points
from quantizing_toys import Functional, Lost, Residual, images, made


def points(build: type[nn.Module], way: Way = "all") -> Points:
    return plan_points(flow_of(made(build), (images(),)), way)


def named(found: Points) -> list[str]:
    return [f"{item.place.module}/{item.place.key}:{item.slot}" for item in found.activations]


def test_between_integer_kernels_each_value_is_quantized_once() -> None:
    # Convolutions take their batch norm and ReLU along, the addition its ReLU; logits leave as floats.
    assert named(points(Residual)) == [
        "/input#0:output",
        "relu/relu#0:output",
        "bn2/batch_norm#0:output",
        "relu/relu#1:output",
        "/adaptive_avg_pool2d#0:output",
    ]


def test_functional_activations_and_concatenations_have_their_points() -> None:
    assert named(points(Functional)) == [
        "/input#0:output",
        "/relu#0:output",
        "/relu6#0:output",
        "/relu#1:output",
        "/cat#0:output",
        "head/conv2d#0:output",
    ]


def test_inputs_of_layers_and_outputs_of_clips() -> None:
    assert named(points(Residual, "inputs")) == [
        "conv1/conv2d#0:input",
        "conv2/conv2d#0:input",
        "fc/linear#0:input",
    ]
    assert named(points(Residual, "clips")) == [
        "relu/relu#0:output",
        "relu/relu#1:output",
        "conv1/conv2d#0:input",
        "fc/linear#0:input",
    ]
    assert named(points(Residual, "none")) == []


def test_layers_know_their_batch_norm_and_whether_they_are_first_or_last() -> None:
    found = {layer.weight: layer for layer in points(Residual).layers}
    assert {name: (layer.norm, layer.first, layer.last) for name, layer in found.items()} == {
        "conv1.weight": ("bn1", True, False),
        "conv2.weight": ("bn2", False, False),
        "fc.weight": (None, False, True),
    }


def test_a_batch_norm_before_its_convolution_is_not_folded_into_another_one() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bn, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.bn(F.relu(self.first(x)))).mean((2, 3))

    found = points(Backwards)
    assert [layer.norm for layer in found.layers] == [None, None]
    assert "bn/batch_norm#0:output" in named(found)


def test_a_convolution_whose_result_is_also_taken_elsewhere_keeps_its_norm_apart() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return (self.bn(x) + x).mean((2, 3))

    found = points(Both)
    assert found.layers[0].norm is None
    assert "conv/conv2d#0:output" in named(found)


class Tokens(nn.Module):
    """Batch norms of other channels than those of the layer before: of tokens, and of rows of one image."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.by_token = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.conv, self.by_row = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.head, self.by_class = nn.Linear(8, 10), nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        single = self.by_row(self.conv(x.mean(0)[:, :8, :8])).mean(0)
        x = self.by_token(self.mix(x[:, 0, :8, :8] + single))
        return self.by_class(self.head(x.mean(2)))


def test_a_batch_norm_of_other_channels_is_not_folded() -> None:
    norms = {layer.weight: layer.norm for layer in points(Tokens).layers}
    assert norms == {"conv.weight": None, "mix.weight": None, "head.weight": "by_class"}


def test_what_cannot_be_quantized_in_place_is_named() -> None:
    found = points(Lost)
    assert [item.name for item in found.left] == ["relu"]
    assert "in place" in found.left[0].reason
    assert "/relu#0:output" not in named(found)


def test_layers_behind_no_clip_are_named_where_clips_are_quantized() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x).mean((2, 3))

    found = points(Bare, "clips")
    assert [item.name for item in found.left] == ["layers.1"]
    assert "stay float" in found.left[0].reason


@pytest.mark.parametrize(("groups", "axis"), [(1, 1), (2, None)])
def test_output_channels_of_transposed_convolutions(groups: int, axis: int | None) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=groups))

    found = plan_points(flow_of(made(build), (images(),)), "all")
    assert [layer.axis for layer in found.layers] == [0, axis]


def test_takers_are_found_through_what_only_moves_values() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4 * 16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.conv(x)), 2)
            return self.fc(torch.flatten(F.dropout(x, training=self.training), 1))

    found = points(Moved)
    assert [(item.place.function, [t.module for t in item.takers]) for item in found.activations] == [
        ("input", ["conv"]),
        ("relu", ["fc"]),
    ]
    assert found.activations[0].place == INPUT_PLACE
