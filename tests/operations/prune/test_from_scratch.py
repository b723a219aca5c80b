"""A thinned network drawn anew has the variances of a network that was built at those widths."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import procedure_toys as toys
from cctool.base import user_code
from cctool.base.errors import PruningError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import add_masks
from cctool.checkpoint.spec import ModelSpec
from cctool.models import registry
from cctool.operations.keep.events import new_head
from cctool.operations.prune.from_scratch import reinitialised
from cctool.options.prune.choices import Scope


def network(arch: str, **arguments: Any) -> Checkpoint:
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = registry.build(arch, arguments)
    shape = (3, 64, 64) if arch.startswith("torchvision") else registry.input_shape(arch, arguments)
    return Checkpoint(model.eval(), ModelSpec(architecture=arch, arguments=arguments, input_shape=shape))


def halved(checkpoint: Checkpoint) -> Checkpoint:
    return toys.cut(toys.shaken(checkpoint), 0.5, scope=Scope.LOCAL)[0]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.dim() > 1}


def same_spread(found: Tensor, expected: Tensor) -> bool:
    """Standard deviations agree within six standard errors of what they were estimated from."""
    error = math.sqrt(1 / (2 * found.numel()) + 1 / (2 * expected.numel()))
    return abs(math.log(found.std().item() / expected.std().item())) < 6 * error


def test_it_draws_as_a_network_of_those_widths_does() -> None:
    """resnet20 at base 16, halved, against resnet20 at base 8; its loop draws by fan-out."""
    found = reinitialised(halved(network("resnet20")), toys.context(seed=3)).model
    expected = network("resnet20", base=8).model
    ours, theirs = found.state_dict(), expected.state_dict()
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}
    assert all(same_spread(value, weights(expected)[name]) for name, value in weights(found).items())
    for name, value in ours.items():
        if "weight" not in name or value.dim() == 1:
            # gammas (0 at the end of a block), betas, statistics, counters; the classifier's bias is drawn
            assert name == "fc.bias" or torch.equal(value, theirs[name]), name
    dense = network("resnet20").model.state_dict()
    assert not same_spread(ours["layer2.0.conv1.weight"], dense["layer2.0.conv1.weight"])


@pytest.mark.parametrize(
    ("arch", "arguments", "layer", "fan"),
    [
        ("vgg11", {}, "features.4.weight", 0),
        ("mobilenet_student", {}, "cnn.2.3.weight", 1),
        ("torchvision:mobilenet_v2", {}, "features.3.conv.0.0.weight", 0),
        ("torchvision:regnet_y_400mf", {}, "trunk_output.block3.block3-1.f.a.0.weight", 0),
    ],
)
def test_each_rule_of_the_field_sees_the_thinned_fan(
    arch: str, arguments: dict[str, Any], layer: str, fan: int
) -> None:
    """By fan-out through the tensor's shape or the module's attribute, by fan-in through reset_parameters."""
    dense = network(arch, **arguments)
    before = weights(dense.model)[layer]
    after = weights(reinitialised(halved(dense), toys.context()).model)[layer]
    share = [after.shape[0] / before.shape[0], after[0].numel() / before[0].numel()][fan]
    assert share < 1
    assert same_spread(after * math.sqrt(share), before)


def test_the_seed_decides_and_the_pruned_weights_are_gone() -> None:
    start = halved(toys.residual_checkpoint())
    pruned = {name: value.clone() for name, value in weights(start.model).items()}
    state = torch.get_rng_state()
    first = {n: v.clone() for n, v in weights(reinitialised(start, toys.context(seed=1)).model).items()}
    assert torch.equal(torch.get_rng_state(), state)
    again = {n: v.clone() for n, v in weights(reinitialised(start, toys.context(seed=1)).model).items()}
    other = weights(reinitialised(start, toys.context(seed=2)).model)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
        assert not torch.isclose(value, pruned[name]).all()


def test_a_network_that_was_not_cut_is_what_its_builder_gives() -> None:
    start = toys.shaken(toys.residual_checkpoint())
    result = reinitialised(start, toys.context(seed=8)).model.state_dict()
    torch.manual_seed(8)
    expected = registry.build("resnet20", toys.ARGUMENTS).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in result.items())


def test_masked_weights_stay_zero() -> None:
    start = toys.shaken(toys.residual_checkpoint())
    mask = torch.rand_like(start.model.conv1.weight) > 0.5
    add_masks(start.model, {"conv1.weight": mask})
    result = reinitialised(start, toys.context()).model
    assert torch.equal(result.conv1.weight != 0, mask)
    assert torch.equal(result.conv1.weight_mask, mask)


NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    '''Finds the width behind its flatten by a pass in its constructor, scales by a bare parameter, ties.'''

    def __init__(self):
        super().__init__()
        self.scrap = nn.Conv2d(1, 40, 3)
        self.scrap = None
        self.features = nn.Sequential(nn.Conv2d(1, 40, 3, stride=4), nn.BatchNorm2d(40), nn.ReLU())
        self.scale = nn.Parameter(3 + 0.01 * torch.randn(40, 1, 1))
        width = self.features(torch.zeros(2, 1, 32, 32)).flatten(1).shape[1]
        self.classifier = nn.Linear(width, 10)
        self.first = nn.Linear(10, 30, bias=False)
        self.second = nn.Linear(10, 30, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(30, 10)
        nn.init.normal_(self.classifier.weight, std=1 / self.classifier.in_features)

    def forward(self, x):
        x = self.classifier((self.features(x) * self.scale).flatten(1)).relu()
        return self.last(self.first(x).relu() + self.second(x))


def make():
    return Net()


def stubborn():
    net = Net()
    net.last.weight.data = torch.zeros(10, 30)
    return net


class Counting(Net):
    made = 0

    def __init__(self):
        super().__init__()
        Counting.made += 1
        if Counting.made > 2:
            self.more = nn.Parameter(torch.zeros(1))


def changing():
    return Counting()
"""


def users(tmp_path: Path, factory: str) -> tuple[Checkpoint, Any]:
    (tmp_path / "net.py").write_text(NETWORK, encoding="utf-8")
    arch = f"{tmp_path / 'net.py'}:{factory}"
    context = toys.context(arch=arch)
    torch.manual_seed(0)
    model = user_code.load(arch)().eval()
    return Checkpoint(model, ModelSpec(architecture=arch, input_shape=(1, 32, 32))), context


def test_users_networks_with_ties_bare_parameters_and_passes_in_the_constructor(tmp_path: Path) -> None:
    dense, context = users(tmp_path, "make")
    thinned = toys.cut(dense, 0.5, scope=Scope.LOCAL)[0]
    assert thinned.model.scale.shape == (20, 1, 1)
    result = reinitialised(thinned, context).model
    assert result.first.weight is result.second.weight
    assert result.first.weight.shape == (15, 5)
    assert bool(((result.scale - 3).abs() < 0.1).all())
    width = result.classifier.in_features
    assert width == dense.model.classifier.in_features // 2
    assert result.classifier.weight.std().item() == pytest.approx(1 / width, rel=0.1)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("stubborn", r"last\.weight has shape \[10, 15\] after the cut.*gives it \[10, 30\]"),
        ("changing", "another order each time|has no such"),
    ],
)
def test_what_does_not_follow_widths_is_refused_by_name(tmp_path: Path, factory: str, message: str) -> None:
    dense, context = users(tmp_path, factory)
    thinned = toys.cut(dense, 0.5, scope=Scope.LOCAL)[0]
    with pytest.raises(PruningError, match=message):
        reinitialised(thinned, context)


def test_stored_forms_are_dropped() -> None:
    start = toys.shaken(toys.residual_checkpoint())
    marked = replace(start, stored={"conv1.weight": object()})  # type: ignore[dict-item]
    assert reinitialised(marked, toys.context()).stored == {}


@pytest.mark.cuda
def test_drawing_anew_leaves_the_generators_of_devices_as_they_are() -> None:
    start = halved(network("resnet20", base=4))
    torch.manual_seed(11)
    torch.rand(3, device="cuda")
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    reinitialised(start, toys.context(seed=3))
    new_head(start, ["fc"], 5, toys.context(seed=3))
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
