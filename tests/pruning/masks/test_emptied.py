"""Channels that masks left empty are cut with nothing changing; what only looks empty stays."""

from copy import deepcopy
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import PruningError
from cctool.checkpoint.edits.mask import add_masks, masks_of
from cctool.models import registry
from cctool.options.prune.choices import Granularity, PruneMethod
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.planner import plan_thinning
from cctool.pruning.cut.surgery import apply_cut
from cctool.pruning.masks.choose import choose_masks, unit_masks
from cctool.pruning.masks.emptied import find_emptied


class Chain(nn.Module):
    """conv - norm - activation - conv - mean - linear."""

    def __init__(self, activation: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.activation = activation
        self.second = nn.Conv2d(width, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.first(x)))
        return self.fc(torch.relu(self.second(x)).mean((2, 3)))


INPUTS = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)),)


def chain(activation: nn.Module | None = None) -> Chain:
    torch.manual_seed(0)
    net = Chain(activation or nn.ReLU())
    with torch.no_grad():
        for tensor in (net.norm.weight, net.norm.bias, net.norm.running_mean):
            nn.init.normal_(tensor)
    return net.eval()


def silence(net: Chain, *units: int, shift: float = 0.0) -> None:
    """Empty the filters of these units, and everything behind them but a shift."""
    with torch.no_grad():
        for tensor in (net.first.weight, net.first.bias, net.norm.weight, net.norm.bias):
            tensor[list(units)] = 0
        net.norm.bias[list(units)] = shift


def widths_after(net: nn.Module) -> tuple[int, int, tuple[str, ...]]:
    """Widths of the first two layers after the cut, compared with the network before in float64."""
    net = net.double()
    inputs = tuple(value.double() for value in INPUTS)
    before = net(*inputs)
    found = find_emptied(net, inputs)
    assert found.error <= 1e-9
    apply_cut(net, found.plan)
    torch.testing.assert_close(net(*inputs), before, rtol=1e-9, atol=1e-12)
    return net.first.out_channels, net.second.out_channels, found.notes


def test_units_that_nothing_reads_go() -> None:
    net = chain()
    with torch.no_grad():
        net.second.weight[:, [1, 4]] = 0
        net.fc.weight[:, 2] = 0
    assert widths_after(net) == (4, 4, ())


def test_units_that_emit_zero_go() -> None:
    net = chain()
    silence(net, 0, 5)
    assert widths_after(net) == (4, 5, ())


def test_a_batch_norm_may_silence_filters_that_are_not_zero() -> None:
    net = chain()
    with torch.no_grad():
        for tensor in (net.first.bias, net.norm.weight, net.norm.bias):
            tensor[2] = 0
    assert widths_after(net)[:2] == (5, 5)


def test_units_that_still_emit_a_constant_stay_and_are_named() -> None:
    net = chain()
    silence(net, 0)
    silence(net, 3, shift=0.7)
    first, _, notes = widths_after(net)
    assert first == 5
    assert notes == (
        "first: 1 empty filters stay: a bias, a batch norm's shift or another filter of the same channels is "
        "not zero",
    )


def test_zero_that_does_not_pass_on_keeps_its_units() -> None:
    # sigmoid(0) is 0.5; what nothing reads goes all the same
    net = chain(nn.Sigmoid())
    silence(net, 0, 1)
    with torch.no_grad():
        net.second.weight[:, 4] = 0
    first, _, notes = widths_after(net)
    assert first == 5
    assert notes == ("first: 2 units that look empty stay: cutting them changes outputs",)


def test_one_unit_stays_where_all_are_empty() -> None:
    net = chain()
    silence(net, *range(6))
    first, _, notes = widths_after(net)
    assert first == 1
    assert notes == ("first: all its units are empty, and one must stay",)


def test_statistics_over_channels_keep_their_width() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.norm(self.first(x)))

    torch.manual_seed(0)
    net = Normed().eval()
    with torch.no_grad():
        net.second.weight[:, 2] = 0
    found = find_emptied(net, (torch.randn(2, 5),))
    assert not found.plan.tensors


def test_nothing_is_empty_in_a_dense_network() -> None:
    found = find_emptied(chain(), INPUTS)
    assert not found.plan.tensors
    assert found.notes == ()
    assert found.precision == ""


def test_a_network_that_answers_differently_each_time_keeps_its_widths() -> None:
    class Noise(nn.Module):
        calls: ClassVar[list[int]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(0)
            return x + len(self.calls)

    net = chain(Noise())
    with torch.no_grad():
        net.second.weight[:, 1] = 0
    found = find_emptied(net, INPUTS)
    assert not found.plan.tensors
    assert found.notes == ("first: 1 units that look empty stay: cutting them changes outputs",)


def test_a_network_that_does_not_run_at_other_batch_sizes_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 6, 8, 8)

    with pytest.raises(PruningError, match="does not run at batch sizes 3 and 5: RuntimeError"):
        find_emptied(chain(Two()), INPUTS)


def test_a_dtype_in_the_code_is_compared_in_float32() -> None:
    class Float(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x.float())

    net = chain(Float())
    silence(net, 0)
    found = find_emptied(net, INPUTS)
    assert found.precision == "float32"
    assert found.plan.tensors["first.weight"][0].keep.tolist() == [1, 2, 3, 4, 5]


def small(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    model = registry.build(architecture, {"num_classes": 10, "in_channels": 1})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return model.eval()


@pytest.mark.parametrize("architecture", ["resnet20", "mobilenet_student"])
def test_masked_channels_are_what_would_be_cut_and_cutting_them_later_is_that_cut(architecture: str) -> None:
    model, inputs = small(architecture), (torch.randn(2, 1, 32, 32),)
    found = plan_thinning(model, inputs, PruneOptions(method=PruneMethod.L2, rate=0.5))
    cut = deepcopy(model)
    apply_cut(cut, found.plan)
    add_masks(model, unit_masks(model, found.graph, found.selection))
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), cut(*inputs), rtol=1e-4, atol=1e-5)
    later = find_emptied(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(later.selection.kept, found.selection.kept, strict=True))
    apply_cut(model, later.plan)
    for name, parameter in cut.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
        assert bool(masks_of(model).get(name, torch.tensor(True)).all())


def test_empty_rows_are_cut_exactly() -> None:
    model, inputs = small("resnet20"), (torch.randn(2, 1, 32, 32),)
    options = PruneOptions(method=PruneMethod.L1, granularity=Granularity.ROW, rate=0.5)
    add_masks(model, choose_masks(model, inputs, options).masks)
    with torch.no_grad():
        before = model(*inputs)
        found = find_emptied(model, inputs)
        # Of the blocks' inner channels, every masked filter goes; the residual ones have several producers.
        inner = [
            (family, kept)
            for family, kept in zip(found.graph.families, found.selection.kept, strict=True)
            if family.name.endswith("conv1") and "." in family.name
        ]
        assert len(inner) == 9
        assert all(int(kept.sum()) == family.units // 2 for family, kept in inner)
        apply_cut(model, found.plan)
        torch.testing.assert_close(model(*inputs), before, rtol=1e-4, atol=1e-5)
    assert masks_of(model)["layer1.0.conv1.weight"].shape == model.layer1[0].conv1.weight.shape
