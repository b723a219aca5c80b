import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cctool.checkpoint.edits.mask import add_masks, masks_of
from cctool.models.lenet import LeNet
from cctool.models.mobilenet import MobileNetStudent
from cctool.models.resnet import CifarResNet
from cctool.quantization.network.calls import flow_of
from cctool.quantization.refine.equalize import equalize, find_pairs


def _trained_like(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                module.weight.data.copy_(torch.rand(module.num_features, generator=generator) * 3 + 0.01)
                module.bias.data.copy_(torch.randn(module.num_features, generator=generator))
        elif isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() > 1:
            size = [len(module.weight), *[1] * (module.weight.dim() - 1)]
            module.weight.data.mul_(torch.exp(torch.randn(size, generator=generator)))
    return model.eval()


def _with_relu(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    return model


def _equalized(model, x):
    before = model(x)
    flow = flow_of(model, (x,))
    report = equalize(model, flow)
    after = model(x)
    assert float((after - before).norm() / before.norm()) < 1e-5
    return report


def _images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [
        (lambda: LeNet(1, 10), (2, 1, 32, 32), 4),
        (lambda: CifarResNet(3, 3, 10, base=4), (2, 3, 16, 16), 9),
        (lambda: MobileNetStudent(3, 5, base=2), (1, 3, 32, 32), 7),
        (lambda: _with_relu(MobileNetStudent(3, 5, base=2)), (1, 3, 32, 32), 15),
    ],
)
@torch.no_grad()
def test_a_network_computes_the_same_after_its_layers_were_equalized(model, shape, count):
    network = _trained_like(model())
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    report = _equalized(network, _images(*shape))
    assert len(report.pairs) == count
    assert report.largest > 2
    assert any(not torch.equal(value, weights[name]) for name, value in network.state_dict().items())


@torch.no_grad()
def test_both_ranges_of_a_channel_become_the_root_of_their_product():
    model = _trained_like(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)))
    first, second = model[0].weight.double().numpy(), model[2].weight.double().numpy()
    made, taken = abs(first).max((1, 2, 3)), abs(second).max((0, 2, 3))
    _equalized(model, _images(1, 3, 8, 8))
    found = model[0].weight.numpy()
    assert abs(found).max((1, 2, 3)) == pytest.approx(np.sqrt(made * taken), rel=1e-5)
    assert abs(model[2].weight.numpy()).max((0, 2, 3)) == pytest.approx(np.sqrt(made * taken), rel=1e-5)


@torch.no_grad()
def test_with_batch_norm_the_folded_ranges_become_equal_and_the_weight_stays():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)
    )
    _trained_like(model)
    before = model[0].weight.clone()
    _equalized(model, _images(2, 3, 8, 8))
    assert torch.equal(model[0].weight, before)
    sigma = [(model[n].running_var + model[n].eps).sqrt() for n in (1, 4)]
    made = (model[0].weight * (model[1].weight / sigma[0])[:, None, None, None]).abs().amax((1, 2, 3))
    taken = (model[3].weight * (model[4].weight / sigma[1])[:, None, None, None]).abs().amax((0, 2, 3))
    assert torch.allclose(made, taken, rtol=1e-3)


@torch.no_grad()
def test_three_layers_around_a_depthwise_one_end_with_the_cube_root_of_the_product():
    model = _trained_like(
        nn.Sequential(
            nn.Conv2d(3, 6, 1),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.LeakyReLU(0.2),
            nn.Conv2d(6, 4, 1),
        )
    )
    ranges = [
        model[0].weight.abs().amax((1, 2, 3)),
        model[2].weight.abs().amax((1, 2, 3)),
        model[4].weight.abs().amax((0, 2, 3)),
    ]
    expected = (ranges[0] * ranges[1] * ranges[2]) ** (1 / 3)
    report = _equalized(model, _images(2, 3, 8, 8))
    assert len(report.pairs) == 2
    assert report.rounds > 2
    assert torch.allclose(model[0].weight.abs().amax((1, 2, 3)), expected, rtol=1e-3)
    assert torch.allclose(model[2].weight.abs().amax((1, 2, 3)), expected, rtol=1e-3)
    assert torch.allclose(model[4].weight.abs().amax((0, 2, 3)), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 9, 3, groups=3)), (2, 4, 9, 9)),
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(6, 3, 1)), (2, 4, 5, 5)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.ConvTranspose2d(4, 6, 2, groups=2)), (2, 3, 5, 5)),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(4, 2, 2)), (2, 3, 9)),
        (nn.Sequential(nn.Conv3d(2, 4, 2), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(32, 3)), (2, 2, 5, 5, 5)),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)), (4, 6)),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
            (2, 3, 8, 8),
        ),
    ],
)
@torch.no_grad()
def test_layers_of_every_kind_are_equalized(model, shape):
    report = _equalized(_trained_like(model), _images(*shape))
    assert len(report.pairs) == 1
    assert report.largest > 1.1


class _Mean(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.first, self.second, self.dims = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), dims

    def forward(self, x):
        return self.second(F.relu(self.first(x)).mean(self.dims))


class _Twice(nn.Module):
    def __init__(self, *, shared):
        super().__init__()
        self.first, self.second, self.shared = nn.Linear(5, 5), nn.Linear(5, 5), shared

    def forward(self, x):
        if self.shared:
            return self.second(F.relu(self.first(F.relu(self.first(x)))))
        x = self.first(x)
        return self.second(F.relu(x)) + x


class _Elsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.second(F.relu(self.first(x))) + torch.mul(self.first.weight, 2).sum()


@torch.no_grad()
def test_a_mean_over_places_passes_a_factor_on_and_one_over_channels_does_not():
    assert len(_equalized(_trained_like(_Mean(2, -1)), _images(2, 3, 8, 8)).pairs) == 1
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), _Channels(), nn.Linear(4, 2))
    report = _equalized(_trained_like(model), _images(2, 3, 6, 6))
    assert not report.pairs
    assert "passes through mean" in report.skipped[0].reason


class _Channels(nn.Module):
    def forward(self, x):
        return x.mean(dim=(1, 2))


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 2, 1)),
            (1, 3, 5, 5),
            "hardtanh|relu6",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)), (2, 3), "sigmoid"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (2, 7, 3), "other dimensions"),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 2, 1)
            ),
            (2, 3, 5, 5),
            "no scale and shift",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
            (2, 3, 5, 5),
            "batch_norm",
        ),
        (lambda: _Twice(shared=False), (2, 5), "used more than once"),
        (lambda: _Twice(shared=True), (2, 5), "first.weight is used 2 times"),
        (_Elsewhere, (2, 5), "first.weight is used 2 times"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)),
            (2, 3),
            "computed",
        ),
    ],
)
@torch.no_grad()
def test_where_a_factor_does_not_pass_nothing_changes_and_the_reason_is_named(model, shape, reason):
    network = _trained_like(model())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = _equalized(network, _images(*shape))
    assert not report.pairs
    assert report.largest == 1
    assert any(part in left.reason for left in report.skipped for part in reason.split("|"))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@torch.no_grad()
def test_channels_without_a_range_stay_and_masked_weights_stay_zero():
    model = _trained_like(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    model[0].weight[1] = 0
    model[2].weight[:, 2] = 0
    add_masks(model, {"0.weight": torch.tensor([[1, 0, 1]] * 4) > 0})
    before = model[0].weight.clone(), model[0].bias.clone()
    _equalized(model, _images(6, 3))
    assert torch.equal(model[0].weight[1:3], before[0][1:3])
    assert torch.equal(model[0].bias[1:3], before[1][1:3])
    assert not torch.equal(model[0].weight[0], before[0][0])
    assert not model[0].weight[~masks_of(model)["0.weight"]].any()


@torch.no_grad()
def test_pairs_name_both_layers_and_the_features_of_a_channel():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    pairs, left = find_pairs(model.eval(), flow_of(model, (_images(1, 3, 5, 5),)))
    assert [(pair.title, pair.repeat) for pair in pairs] == [("0 -> 3", 9)]
    assert not left


@pytest.mark.cuda
@torch.no_grad()
def test_weights_equalized_on_a_gpu_are_those_of_the_cpu():
    x = _images(2, 1, 32, 32)
    here, there = (_trained_like(LeNet(1, 10)) for _ in range(2))
    there.load_state_dict(here.state_dict())
    there.cuda()
    equalize(here, flow_of(here, (x,)))
    equalize(there, flow_of(there, (x.cuda(),)))
    for name, value in here.state_dict().items():
        assert torch.allclose(value, there.state_dict()[name].cpu(), rtol=1e-4, atol=1e-6), name
