import pytest
import torch
from torch import nn

from cctool.base.errors import QuantizationError
from cctool.base.networks import copied
from cctool.checkpoint.edits.mask import add_masks
from cctool.quantization.calibration.weight_ranges import fit_weight
from cctool.quantization.network.attach import attach, norm_factors
from cctool.quantization.network.calls import flow_of
from cctool.quantization.network.placement import plan_points
from cctool.quantization.network.points import CallPoint, WeightPoint, weight_key
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.refine.adaround import adaround


def _images(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _quantized(model, x, *, method="uniform", activations=False):
    model.eval()
    flow = flow_of(model, (x,))
    layers = plan_points(flow, "none").layers
    config = QuantizerConfig(method=method, bits=3)
    act = QuantizerConfig(method="uniform", bits=4, signed=False) if activations else None
    held = attach(
        model,
        {layer.weight: WeightPoint(config=config, norm=layer.norm) for layer in layers},
        {layer.place: CallPoint(weight=layer.weight, input=None if layer.first else act) for layer in layers},
    )
    for layer in layers:
        fold = norm_factors(model.get_submodule(layer.norm)) if layer.norm else None
        fit_weight(held.quantizer(weight_key(layer.weight)), model.get_parameter(layer.weight).detach(), fold)
    for key in held.activation_keys:
        held.quantizer(key).set_range(torch.tensor(0.0), torch.tensor(2.0))
    return flow


@pytest.fixture
def chain():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, groups=3),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    model[1].running_mean.uniform_(-0.3, 0.3)
    model[1].running_var.uniform_(0.5, 2)
    model[1].weight.data.uniform_(-2, 2)
    return model


@pytest.mark.parametrize("activations", [False, True])
def test_outputs_get_closer_and_quantizers_leave_the_weights_as_they_are(chain, activations):
    x = _images(24, 2, 8, 8)
    flow = _quantized(chain, x[:1], activations=activations)
    reference = copied(chain)
    before = _float(reference, x)
    nearest = float((chain(x) - before).detach().square().mean())
    report = adaround(chain, flow, list(x.split(8)), steps=60, seed=0)
    assert float((chain(x) - before).detach().square().mean()) < 0.6 * nearest
    assert [layer.layer for layer in report.layers] == ["0", "3", "7"]
    assert report.images == 24
    assert any(layer.kept and layer.changed for layer in report.layers)
    held = chain.quantizers
    for name, norm in (("0.weight", "1"), ("3.weight", None), ("7.weight", None)):
        weight = chain.get_parameter(name).detach()
        fold = norm_factors(chain.get_submodule(norm)) if norm else None
        assert torch.equal(held.quantizer(weight_key(name))(weight, fold), weight)


def _float(model, x):
    with torch.no_grad():
        return nn.Sequential(*list(model)[:8])(x)


def test_the_error_reported_is_that_behind_batch_norm_and_clipping(chain):
    x = _images(24, 2, 8, 8)
    flow = _quantized(chain, x[:1])
    quantizer = chain.quantizers.quantizer("0/weight")
    part, judged = nn.Sequential(*list(chain)[:3]), x[21:]
    with torch.no_grad():
        wanted = part(judged)
        kept = part[0].weight.clone()
        part[0].weight.copy_(quantizer(kept, norm_factors(chain[1])))
        nearest = float((part(judged) - wanted).square().mean())
        part[0].weight.copy_(kept)
    report = adaround(chain, flow, [x], steps=40, seed=0)
    with torch.no_grad():
        learned = float((part(judged) - wanted).square().mean())
    assert report.layers[0].nearest == pytest.approx(nearest, rel=1e-3)
    assert report.layers[0].learned == pytest.approx(learned, rel=1e-3)
    assert report.layers[0].rows == 21 * 64


def test_what_a_layer_is_fitted_to_does_not_depend_on_roundings_before_it(chain):
    x = _images(24, 2, 8, 8)
    flow = _quantized(chain, x[:1])
    reference, rounded = copied(chain), copied(chain)
    with torch.no_grad():
        rounded[3].bias += 1
    first = adaround(rounded, flow, [x], steps=20, seed=0, reference=reference)
    second = adaround(chain, flow, [x], steps=20, seed=0)
    assert first.layers[1].nearest > second.layers[1].nearest + 0.1


def test_steps_and_seed_change_the_rounding_and_the_same_seed_does_not(chain, monkeypatch):
    monkeypatch.setattr("cctool.quantization.refine.adaround._MOST_ROWS", 120)
    x = _images(24, 2, 8, 8)
    flow = _quantized(chain, x[:1])
    found = {}
    for name, steps, seed in (("a", 30, 0), ("again", 30, 0), ("seed", 30, 1), ("steps", 5, 0)):
        model = copied(chain)
        adaround(model, flow, [x], steps=steps, seed=seed)
        found[name] = torch.cat([model[index].weight.detach().flatten() for index in (0, 3, 7)])
    assert torch.equal(found["a"], found["again"])
    assert not torch.equal(found["a"], found["seed"])
    assert not torch.equal(found["a"], found["steps"])


def test_places_are_sampled_where_rows_would_not_fit(chain, monkeypatch):
    monkeypatch.setattr("cctool.quantization.refine.adaround._MOST_ROWS", 120)
    x = _images(24, 2, 8, 8)
    flow = _quantized(chain, x[:1])
    report = adaround(chain, flow, list(x.split(8)), steps=10, seed=0)
    assert [layer.rows for layer in report.layers] == [105, 105, 21]
    monkeypatch.setattr("cctool.quantization.refine.adaround._MOST_BYTES", 4 * 18 * 48)
    report = adaround(chain, flow, list(x.split(8)), steps=10, seed=0)
    assert report.layers[0].rows == 42


def test_masked_weights_stay_zero(chain):
    mask = torch.arange(chain[3].weight.numel()).reshape(chain[3].weight.shape) % 2 > 0
    add_masks(chain, {"3.weight": mask})
    x = _images(12, 2, 8, 8)
    flow = _quantized(chain, x[:1])
    report = adaround(chain, flow, [x], steps=20, seed=0)
    assert report.layers[1].changed > 0
    assert not chain[3].weight[~mask].any()


def test_layers_that_cannot_be_rounded_are_named():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))
    x = _images(20, 4)
    flow = _quantized(model, x)
    report = adaround(model, flow, [x], steps=5, seed=0)
    assert [(left.name, left.reason) for left in report.skipped] == [("0", "0.weight is used 2 times")] * 2
    assert [layer.layer for layer in report.layers] == ["3"]
    dorefa = nn.Sequential(nn.Linear(4, 2))
    flow = _quantized(dorefa, x, method="dorefa")
    assert "not evenly spaced" in adaround(dorefa, flow, [x], steps=5, seed=0).skipped[0].reason


def test_without_images_it_refuses(chain):
    flow = _quantized(chain, _images(1, 2, 8, 8))
    with pytest.raises(QuantizationError, match="no images"):
        adaround(chain, flow, [], steps=5, seed=0)


@pytest.mark.cuda
def test_on_a_gpu_outputs_get_closer_too(chain):
    reports = []
    for device in ("cpu", "cuda"):
        model, x = copied(chain).to(device), _images(24, 2, 8, 8).to(device)
        flow = _quantized(model, x[:1])
        reports.append(adaround(model, flow, [x], steps=60, seed=0))
    for here, there in zip(*(report.layers[:1] for report in reports), strict=True):
        assert here.kept
        assert there.kept
        assert here.rows == there.rows
        assert there.nearest == pytest.approx(here.nearest, rel=1e-3)
        assert there.learned == pytest.approx(here.learned, rel=0.2)
