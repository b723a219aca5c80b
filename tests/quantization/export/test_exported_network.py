from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.checkpoint.edits.mask import add_masks
from cctool.quantization.export.network import (
    ExportNetwork,
    export_network,
    made_weights,
    rounding_network,
    with_weights,
)
from cctool.quantization.export.noise import shaken
from cctool.quantization.network.attach import attach, following_values
from cctool.quantization.network.calls import flow_of
from cctool.quantization.network.placement import plan_points
from cctool.quantization.network.points import CallPoint, WeightPoint, weight_key
from cctool.quantization.quantizers.config import QuantizerConfig

SHAPE = (3, 8, 8)
ACTIVATION = QuantizerConfig(method="uniform", bits=8, signed=False, symmetric=False)
PER_CHANNEL = QuantizerConfig(method="uniform", bits=8, narrow=True, axis=0)
PER_TENSOR = QuantizerConfig(method="uniform", bits=8, narrow=True)


def settle(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 4)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.num_features, generator=generator))
                module.weight[0] = 0.0
                module.weight[1] = -1.25
                module.bias.copy_(torch.randn(module.num_features, generator=generator))
    return model.eval()


def quantized(
    model: nn.Module,
    weights: QuantizerConfig = PER_CHANNEL,
    activations: QuantizerConfig | None = ACTIVATION,
    way: Any = "all",
) -> nn.Module:
    images = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    points = plan_points(flow_of(model, (images,)), way if activations is not None else "none")
    calls: dict[Any, dict[str, Any]] = {layer.place: {"weight": layer.weight} for layer in points.layers}
    for found in points.activations:
        calls.setdefault(found.place, {})[found.slot] = activations
    wanted = {}
    for layer in points.layers:
        shape = model.get_parameter(layer.weight).shape
        channels = None if weights.axis is None else shape[weights.axis]
        norm = layer.norm if layer.axis == 0 else None
        wanted[layer.weight] = WeightPoint(config=weights, channels=channels, norm=norm)
    held = attach(model, wanted, {place: CallPoint(**call) for place, call in calls.items()})
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad(), following_values(model, lambda key, value: seen.update({key: value.aminmax()})):
        model(images)
    for key in held.activation_keys:
        quantizer = held.quantizer(key)
        if quantizer is not None and quantizer.has_range:
            quantizer.set_range(*seen[key])
    for name in wanted:
        quantizer = held.quantizer(weight_key(name))
        assert quantizer is not None
        quantizer.initialise(model.get_parameter(name))
    return model


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.deep_norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.conv(x)))
        x = F.relu(self.deep_norm(self.deep(x)))
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.up_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 8 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = self.second(self.shared(F.relu(self.first(self.shared(x))))) + x
        z = F.avg_pool2d(torch.cat((x, y), 1), 2)
        return self.head(self.up_norm(self.up(z)).flatten(1))


class Tokens(nn.Module):
    """Layers over tokens; there are as many tokens as channels, and a batch norm takes the former."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.conv, self.conv_norm = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.mix(x[:, 0]))
        return self.head(F.relu(self.conv_norm(self.conv(x))).mean(2))


def settled(kind: type[nn.Module]) -> nn.Module:
    return settle(kind())


def outputs(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(images)
    return found


def example(batch: int = 2) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(7))


def export(model: nn.Module) -> ExportNetwork:
    return export_network(model, (example(),))


@pytest.mark.parametrize("weights", [PER_CHANNEL, PER_TENSOR], ids=["channels", "tensor"])
@pytest.mark.parametrize("kind", [Plain, Branches, Tokens])
def test_weights_alone_give_the_quantized_networks_outputs(
    kind: type[nn.Module], weights: QuantizerConfig
) -> None:
    model = quantized(settled(kind), weights, None)
    made = export(model)
    assert {weight.name for weight in made.weights} == set(made_weights(model))
    torch.testing.assert_close(
        outputs(made.model, example(3)), outputs(model, example(3)), atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(outputs(model, example()), outputs(settled(kind), example()), atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [Plain, Branches, Tokens])
def test_with_activations_outputs_are_as_close_as_a_tenth_of_a_step_allows(
    kind: type[nn.Module], bits: int
) -> None:
    activations = ACTIVATION.model_copy(update={"bits": bits})
    model = quantized(settled(kind), PER_CHANNEL, activations)
    expected, found = outputs(model, example(16)), outputs(export(model).model, example(16))
    with shaken(model, 0.1, torch.Generator().manual_seed(0)):
        moved = (outputs(model, example(16)) - expected).square().mean().sqrt()
    assert (found - expected).square().mean().sqrt() <= moved
    assert (found - outputs(settled(kind), example(16))).square().mean().sqrt() > 0


def test_integers_are_those_of_the_weights_by_hand() -> None:
    model = quantized(settled(Plain))
    made = next(weight for weight in export(model).weights if weight.name == "conv.weight")
    assert isinstance(model, Plain)
    w = model.conv.weight.detach().double()
    scale = w.abs().flatten(1).amax(1) / 127
    n = (w / scale.float().double()[:, None, None, None]).round()
    gamma = model.norm.weight.detach().double()
    signs = gamma.sign()[:, None, None, None]
    torch.testing.assert_close(made.integers.double(), n * signs)
    factor = gamma.abs() / (model.norm.running_var.double() + 1e-5).sqrt()
    torch.testing.assert_close(made.scale.double(), scale * factor)
    assert not made.zero_point.any()


def test_a_batch_norm_is_folded_and_no_longer_computed() -> None:
    model = quantized(settled(Plain))
    kinds = {call.place.function for call in flow_of(export(model).model, (example(),)).calls}
    assert "batch_norm" not in kinds


def test_one_scale_stays_one_where_the_batch_norm_was_folded_before() -> None:
    model = quantized(settled(Plain), PER_TENSOR)
    conv, deep, head = export(model).weights
    assert (conv.axis, deep.axis, head.axis) == (None, None, None)
    assert conv.scale.dim() == 0


def test_a_shared_layer_has_the_same_integers_and_a_scale_for_each_norm() -> None:
    model = quantized(settled(Branches))
    shared = [weight for weight in export(model).weights if weight.name == "shared.weight"]
    assert len(shared) == 2
    assert torch.equal(shared[0].integers.abs()[1:], shared[1].integers.abs()[1:])
    assert not torch.equal(shared[0].scale, shared[1].scale)


@pytest.mark.parametrize("method", ["apot", "dorefa"])
def test_weights_without_a_grid_of_bytes_are_left_and_named(method: Any) -> None:
    config = QuantizerConfig(method=method, bits=8 if method == "dorefa" else 4)
    model = quantized(settled(Plain), config, None)
    made = export(model)
    assert not made.weights
    assert {left.name for left in made.left} == {"conv.weight", "deep.weight", "head.weight"}
    torch.testing.assert_close(
        outputs(made.model, example()), outputs(model, example()), atol=1e-5, rtol=1e-5
    )


def test_dorefas_few_bits_become_odd_integers() -> None:
    config = QuantizerConfig(method="dorefa", bits=2)
    model = quantized(settled(Plain), config, None)
    head = export(model).weights[-1]
    assert set(head.integers.unique().tolist()) <= {-3, -1, 1, 3}
    torch.testing.assert_close(head.values(), made_weights(model)["head.weight"])


def test_masked_weights_are_integers_of_zero() -> None:
    model = settled(Plain)
    keep = torch.rand(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    add_masks(model, {"conv.weight": keep})
    model = quantized(model)
    conv = export(model).weights[0]
    assert not conv.integers[~keep].any()
    assert conv.integers[keep].any()


def test_a_range_of_nothing_gives_zeros() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)).eval()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # type: ignore[union-attr, operator]
    quantized(model)
    torch.testing.assert_close(outputs(export(model).model, example()), outputs(model, example()))


def test_the_rounding_network_is_bit_for_bit_the_quantized_one() -> None:
    for kind in (Plain, Branches):
        model = quantized(settled(kind), PER_TENSOR)
        network = rounding_network(model)
        assert torch.equal(outputs(network, example(5)), outputs(model, example(5)))
        assert not any("quantizers" in name for name in network.state_dict())


def test_made_weights_replace_parameters_and_leave_the_network_alone() -> None:
    model = quantized(settled(Plain))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = with_weights(model, made_weights(model))
    assert copy.state_dict().keys() == settled(Plain).state_dict().keys()
    assert not torch.equal(copy.get_parameter("conv.weight"), before["conv.weight"])
    for row in copy.get_parameter("conv.weight").flatten(1):
        assert len(row.unique()) <= 255
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.cuda
def test_a_network_from_the_gpu_gives_the_same_integers() -> None:
    model = quantized(settled(Plain))
    expected = export(model).weights[0].integers
    found = export(model.cuda().cpu()).weights[0].integers
    assert torch.equal(found, expected)
    on_cpu = outputs(model, example())
    # It shares parameters with `model`, which therefore moves in part.
    rounded = rounding_network(model).cuda()
    torch.testing.assert_close(outputs(rounded, example().cuda()).cpu(), on_cpu, atol=0.1, rtol=0)
