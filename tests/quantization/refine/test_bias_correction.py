import pytest
import torch
from torch import nn

from cctool.base.errors import QuantizationError
from cctool.base.networks import copied
from cctool.quantization.calibration.weight_ranges import fit_weight
from cctool.quantization.network.attach import attach, norm_factors, quantizers_of
from cctool.quantization.network.calls import flow_of
from cctool.quantization.network.placement import plan_points
from cctool.quantization.network.points import CallPoint, WeightPoint
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.refine.bias_correction import correct_biases


def _images(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _quantized(model, x, *, bits=2, left=()):
    model.eval()
    flow = flow_of(model, (x,))
    layers = [layer for layer in plan_points(flow, "none").layers if layer.place.title not in left]
    weights = {
        layer.weight: WeightPoint(config=QuantizerConfig(method="uniform", bits=bits), norm=layer.norm)
        for layer in layers
    }
    held = attach(model, weights, {layer.place: CallPoint(weight=layer.weight) for layer in layers})
    for layer in layers:
        quantizer = held.quantizer(layer.weight.replace(".", "/"))
        fold = norm_factors(model.get_submodule(layer.norm)) if layer.norm else None
        fit_weight(quantizer, model.get_parameter(layer.weight).detach(), fold)
    return flow


def _outputs(model, name, x):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, __, result: seen.append(result.clone())
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


@pytest.fixture
def chain():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.ConvTranspose2d(5, 3, 2),
        nn.Flatten(),
        nn.Linear(75, 4),
    )
    model[3].running_mean.uniform_(-1, 1)
    model[3].running_var.uniform_(0.5, 2)
    model[3].weight.data.uniform_(-2, 2)
    return model


def test_afterwards_every_channel_of_every_layer_has_the_mean_output_of_the_float_network(chain):
    batches = [_images(6, 2, 8, 8, seed=seed) for seed in (1, 2)] + [_images(3, 2, 8, 8, seed=3)]
    x = torch.cat(batches)
    places = {"0": (0, 2, 3), "3": (0, 2, 3), "5": (0, 2, 3), "7": (0,)}
    wanted = {name: _outputs(chain.eval(), name, x).mean(dims) for name, dims in places.items()}
    flow = _quantized(chain, x[:1])
    before = {name: _outputs(chain, name, x).mean(dims) for name, dims in places.items()}
    report = correct_biases(chain, flow, batches)
    for name, dims in places.items():
        assert float((before[name] - wanted[name]).abs().max()) > 0.05, name
        assert torch.allclose(_outputs(chain, name, x).mean(dims), wanted[name], atol=1e-5), name
    assert [found.into for found in report.layers] == ["0.bias", "3.bias", "5.bias", "7.bias"]
    assert report.images == 15
    first = (before["0"] - wanted["0"]).square().mean().sqrt()
    assert report.layers[0].error == pytest.approx(float(first), rel=1e-4)
    assert report.layers[0].size == pytest.approx(float(wanted["0"].square().mean().sqrt()), rel=1e-4)


def test_the_weights_and_the_float_networks_mode_stay(chain):
    x = _images(4, 2, 8, 8)
    flow = _quantized(chain, x)
    weights = {name: value.clone() for name, value in chain.named_parameters() if value.dim() > 1}
    chain.train()
    statistics = chain[3].running_mean.clone()
    correct_biases(chain, flow, [x])
    assert chain.training
    assert torch.equal(chain[3].running_mean, statistics)
    assert all(torch.equal(chain.get_parameter(name), value) for name, value in weights.items())


def test_a_layer_without_quantizers_stays(chain):
    x = _images(4, 2, 8, 8)
    flow = _quantized(chain, x, left=("7",))
    before = chain[7].bias.clone()
    report = correct_biases(chain, flow, [x])
    assert torch.equal(chain[7].bias, before)
    assert [found.layer for found in report.layers] == ["0", "2", "5"]
    assert not report.skipped


def test_layers_whose_constant_has_no_place_are_named():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), shared, nn.ReLU(), shared)
    x = _images(5, 3)
    flow = _quantized(model, x)
    report = correct_biases(model, flow, [x])
    assert not report.layers
    reasons = [(left.name, left.reason) for left in report.skipped]
    assert reasons[0] == ("0", "neither it nor a batch norm behind it has a bias")
    assert reasons[1:] == [("2", "2.bias is used 2 times")] * 2


def test_linear_layers_over_sequences_are_corrected_along_their_last_dimension():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4))
    x = _images(5, 7, 3)
    wanted = model(x).mean((0, 1))
    flow = _quantized(model, x)
    correct_biases(model, flow, [x])
    assert torch.allclose(model(x).mean((0, 1)), wanted, atol=1e-6)


def test_the_outputs_wanted_are_those_of_the_reference_where_weights_were_rounded_already(chain):
    x = _images(6, 2, 8, 8)
    wanted = _outputs(chain.eval(), "0", x).mean((0, 2, 3))
    flow = _quantized(chain, x[:1])
    reference = copied(chain)
    held = quantizers_of(chain)
    with torch.no_grad():
        chain[0].weight.copy_(held.quantizer("0/weight")(chain[0].weight))
    correct_biases(chain, flow, [x], reference=reference)
    assert torch.allclose(_outputs(chain, "0", x).mean((0, 2, 3)), wanted, atol=1e-5)


def test_without_images_it_refuses(chain):
    flow = _quantized(chain, _images(1, 2, 8, 8))
    with pytest.raises(QuantizationError, match="no images"):
        correct_biases(chain, flow, [])
    assert quantizers_of(chain).state.call_follower is None


@pytest.mark.cuda
def test_biases_corrected_on_a_gpu_are_those_of_the_cpu(chain):
    x = _images(4, 2, 8, 8)
    flow = _quantized(chain, x)
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    correct_biases(chain, flow, [x])
    here = chain[7].bias.detach().clone()
    chain.load_state_dict(before)
    chain.cuda()
    correct_biases(chain, flow, [x.cuda()])
    assert torch.allclose(chain[7].bias.cpu(), here, atol=1e-4)
