"""What is folded computes the same, for every kind of network; what is not is named with its reason."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import TransformError
from cctool.checkpoint.edits.computed import computed_layers
from cctool.checkpoint.edits.fold import AbsentBranch
from cctool.transforms.fold import checks
from cctool.transforms.fold.fold import fold_network
from folding_toys import NETWORKS, Custom, conv_bn, functional_norm, lively

SHAPE = (1, 8, 8)


def conv(*arguments: Any, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(*arguments, **more)


def two(a: nn.Module, b: nn.Module, *, of: Callable[[Any, Tensor], Any] | None = None) -> nn.Module:
    return Custom(of or (lambda self, x: self.a(x) + self.b(x)), a=a, b=b)


def error_of(model: nn.Module, before: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        after = model(x)
    return float((after - before).abs().max() / (before.max() - before.min()))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("double", [False, True])
def test_outputs_stay_and_only_plain_layers_are_left(name: str, double: bool) -> None:
    torch.manual_seed(0)
    model = lively(NETWORKS[name]())
    model = model.double() if double else model
    x = torch.randn(16, *SHAPE, dtype=torch.float64 if double else torch.float32)
    with torch.no_grad():
        before = model(x)
    found = fold_network(model, SHAPE)
    assert error_of(model, before, x) < (1e-12 if double else 2e-6)
    assert found.double_error is not None
    assert found.double_error < 1e-12
    assert found.stays == ()
    assert found.norms_left == 0
    assert not computed_layers(model)
    kinds = {
        type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    assert not kinds
    # Nothing of the folded branches is stored.
    assert all(name.rpartition(".")[2] in ("weight", "bias") for name in model.state_dict())


def test_branches_leave_one_convolution_each() -> None:
    torch.manual_seed(0)
    model = lively(NETWORKS["over"]())
    fold_network(model, SHAPE)
    shapes = {tuple(value.shape) for name, value in model.state_dict().items() if value.dim() == 4}
    assert shapes == {(8, 1, 3, 3), (8, 8, 3, 3)}
    assert sum(value.dim() == 4 for value in model.state_dict().values()) == 3
    assert sum(isinstance(module, AbsentBranch) for module in model.modules()) == 3 * 3 + 2


def test_a_second_fold_finds_nothing() -> None:
    model = lively(NETWORKS["rep"]())
    fold_network(model, SHAPE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = fold_network(model, SHAPE)
    assert again.edits == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def merged(model: nn.Module) -> int:
    """Fold a network; the number of modules that give nothing now."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    lively(model).double()
    with torch.no_grad():
        before = model(x)
    fold_network(model, (3, 8, 8))
    assert error_of(model, before, x) < 1e-12
    return sum(isinstance(module, AbsentBranch) for module in model.modules())


def test_kernels_of_other_sizes_paddings_and_dilations_are_added_where_they_fit() -> None:
    assert merged(two(conv(3, 4, 3, padding=2, dilation=2), conv(3, 4, 1))) == 1
    assert merged(two(conv(3, 4, 5, padding=2), conv(3, 4, 3, padding=2, dilation=2))) == 1
    assert merged(two(conv(3, 4, 3, padding=1, stride=2), conv(3, 4, 1, stride=2, bias=False))) == 1
    assert merged(two(conv(3, 4, 3, padding="same"), conv(3, 4, 1, padding="same"))) == 1
    assert merged(two(conv(3, 6, 3, padding=1, groups=3), conv(3, 6, 5, padding=2, groups=3))) == 1
    assert (
        merged(
            two(conv(3, 4, 3, padding=1), conv(3, 4, 1), of=lambda self, x: torch.add(self.b(x), self.a(x)))
        )
        == 1
    )
    linear = two(nn.Linear(8, 4), nn.Linear(8, 4, bias=False), of=of_rows)
    assert merged(linear) == 1


def of_rows(self: Any, x: Tensor) -> Tensor:
    rows = x.mean((1, 2))
    return self.a(rows) + self.b(rows)


def test_only_sums_of_the_same_input_are_merged() -> None:
    a, b = conv(3, 4, 3, padding=1), conv(3, 4, 1)
    assert merged(two(a, b, of=lambda self, x: self.a(x) - self.b(x))) == 0
    assert merged(two(a, b, of=lambda self, x: torch.add(self.a(x), self.b(x), alpha=2))) == 0
    assert merged(two(a, b, of=lambda self, x: self.a(x.relu()) + self.b(x))) == 0
    assert merged(two(a, conv(3, 4, 3), of=lambda self, x: self.a(x) + self.b(x).mean((2, 3), True))) == 0
    assert merged(two(conv(3, 3, 3, padding=1), b, of=lambda self, x: x + self.a(x))) == 0


def test_a_kernel_grows_where_branches_together_have_as_many_products() -> None:
    tall, wide = {"kernel_size": (3, 1), "padding": (1, 0)}, {"kernel_size": (1, 3), "padding": (0, 1)}
    four = Custom(
        lambda self, x: self.a(x) + self.b(x) + self.c(x) + self.d(x),
        **{key: conv(3, 4, **size) for key, size in zip("abcd", (tall, wide, tall, wide), strict=True)},
    )
    assert merged(four) == 3
    assert four.a.kernel_size == (3, 3)
    assert four.a.padding == (1, 1)
    assert merged(two(conv(3, 4, **tall), conv(3, 4, **wide))) == 0


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(3)


STAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (
        lambda: nn.Sequential(conv(3, 3, 3), nn.Dropout(0.5), norm()),
        "dropout of 1 lies directly before",
    ),
    "batch statistics": (
        lambda: nn.Sequential(conv(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)),
        "statistics of each batch",
    ),
    "functional": (
        lambda: Custom(functional_norm, conv=conv(3, 3, 3), norm=norm()),
        "calls batch_norm with tensors that are not its own",
    ),
    "result used twice": (
        lambda: Custom(lambda self, x: (y := self.a(x)) * self.b(y), a=conv(3, 3, 3), b=norm()),
        "the result of a is used elsewhere",
    ),
    "zero padding": (lambda: nn.Sequential(norm(), conv(3, 3, 3, padding=1)), "pads with zeros"),
    "transposed": (lambda: nn.Sequential(norm(), nn.ConvTranspose2d(3, 3, 3)), "at the border"),
    "two layers before": (
        lambda: Custom(
            lambda self, x: self.n(self.b(self.n(self.a(x)))), a=conv(3, 3, 1), b=conv(3, 3, 1), n=norm()
        ),
        "it follows a and b",
    ),
    "padding mode": (
        lambda: two(conv(3, 4, 3, padding=1), conv(3, 4, 3, padding=1, padding_mode="circular")),
        "by circular",
    ),
    "dilation": (
        lambda: two(conv(3, 4, 3, padding=2, dilation=2), conv(3, 4, 3, padding=1)),
        "its dilation is not that of a",
    ),
    "cost": (
        lambda: two(conv(3, 4, (3, 1), padding=(1, 0)), conv(3, 4, (1, 3), padding=(0, 1))),
        "more multiply-accumulates",
    ),
    "groups": (
        lambda: two(conv(3, 3, 3, padding=1, groups=3), conv(3, 3, 1)),
        "more multiply-accumulates",
    ),
    "called twice": (
        lambda: Custom(
            lambda self, x: self.a(x) + self.b(x) + self.b(x.flip(2)),
            a=conv(3, 4, 3, padding=1),
            b=conv(3, 4, 1),
        ),
        "it is called 2 times, and only one result belongs to the sum",
    ),
    "asked for its shape": (
        lambda: two(
            conv(3, 4, 3, padding=1),
            conv(3, 4, 1),
            of=lambda self, x: self.a(x) + y if (y := self.b(x)).dim() else y,
        ),
        "the network's code fails",
    ),
    "computed by its code": (lambda: nn.Sequential(Standardised(3, 3, 3), norm()), "computes the weight"),
    "computed by batch norm": (lambda: ByBatchNorm(3, 3, 3), "computes the weight"),
}


class Standardised(nn.Conv2d):
    """A convolution whose own forward makes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class ByBatchNorm(nn.Conv2d):
    """A convolution whose weight is standardised by batch norm, which is not one of activations."""

    def forward(self, x: Tensor) -> Tensor:
        flat = nn.functional.batch_norm(self.weight.flatten(1)[None], None, None, training=True)
        return nn.functional.conv2d(x, flat.view_as(self.weight), self.bias)


@pytest.mark.parametrize("name", STAYS)
def test_what_cannot_be_folded_stays_and_says_why(name: str) -> None:
    make, reason = STAYS[name]
    torch.manual_seed(0)
    model = lively(make())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = fold_network(model, (3, 8, 8))
    assert any(reason in item.reason for item in found.stays), found.stays
    assert found.edits == ()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_tied_weights_stay() -> None:
    one, other = conv_bn(3, 3, 3), conv_bn(3, 3, 3)
    other[0].weight = one[0].weight
    found = fold_network(lively(nn.Sequential(one, nn.ReLU(), other)), (3, 8, 8))
    assert found.edits == ()
    assert {item.name for item in found.stays} == {"0.1", "2.1"}


def test_what_shares_its_original_with_another_stays() -> None:
    make = nn.utils.parametrizations.spectral_norm
    one, other = make(conv(3, 3, 3)), make(conv(3, 3, 3))
    other.parametrizations.weight.original = one.parametrizations.weight.original
    found = fold_network(nn.Sequential(one, other).eval(), (3, 8, 8))
    assert found.edits == ()
    assert ["is shared with" in item.reason for item in found.stays] == [True, True]


def test_weights_that_differ_from_call_to_call_stay() -> None:
    class Noise(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.rand_like(weight)

    layer = conv(3, 3, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Noise())
    found = fold_network(nn.Sequential(layer), (3, 8, 8))
    assert found.edits == ()
    assert "differs from call to call" in found.stays[0].reason


def test_instance_norm_with_running_statistics_is_folded_and_no_other() -> None:
    torch.manual_seed(0)
    tracked, free = nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.InstanceNorm2d(4)
    for value in (tracked.running_mean, tracked.running_var, tracked.weight, tracked.bias):
        value.data.uniform_(0.5, 1.5)
    behind = nn.InstanceNorm2d(4, track_running_stats=True)
    model = nn.Sequential(conv(3, 4, 3), tracked, nn.ReLU(), conv(4, 4, 3), free, nn.ReLU(), behind).eval()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
    found = fold_network(model, (3, 8, 8))
    assert error_of(model, before, x) < 2e-6
    assert found.layers["0"].what == ["instance norm 1"]
    assert [(item.name, item.reason) for item in found.stays] == [
        ("6", "relu of 5 lies directly before it; the network's output lies directly behind it")
    ]
    assert found.norms_left == 1
    assert isinstance(model[4], nn.InstanceNorm2d)


def test_a_unit_that_is_used_twice_is_folded_once() -> None:
    torch.manual_seed(0)
    model = Custom(lambda self, x: self.unit(self.unit(x).relu()), unit=conv_bn(3, 3, 3))
    assert merged(model) == 0
    assert model.state_dict().keys() == {"unit.0.weight", "unit.0.bias"}


def test_an_activation_inside_of_a_batch_norm_remains() -> None:
    class Activated(nn.BatchNorm2d):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.drop = nn.Identity()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.drop(super().forward(x)))

    model = nn.Sequential(conv(3, 4, 3), Activated(4))
    assert merged(model) == 0
    assert [type(module) for module in model[1].modules()] == [nn.Sequential, nn.ReLU]


def test_a_network_that_changes_its_input_in_place_is_folded() -> None:
    torch.manual_seed(0)
    model = Custom(lambda self, x: self.unit(x.sub_(0.5).mul_(3)), unit=conv_bn(3, 4, 3))
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        before = lively(model)(x.clone())
    assert fold_network(model, (3, 8, 8)).norms_left == 0
    assert error_of(model, before, x) < 2e-6


def test_one_misfit_does_not_keep_the_others() -> None:
    class Deaf(nn.Conv2d):
        """Ignores the bias that it is given."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight)

    torch.manual_seed(0)
    units = [conv_bn(3, 3, 3) for _ in range(5)]
    units[3][0] = Deaf(3, 3, 1, bias=False)
    found = fold_network(lively(nn.Sequential(*units)), (3, 8, 8))
    assert set(found.layers) == {"0.0", "1.0", "2.0", "4.0"}
    assert [item.name for item in found.stays] == ["3.1"]


def test_a_network_that_needs_float32_is_folded_in_float32() -> None:
    torch.manual_seed(0)
    model = lively(
        Custom(
            lambda self, x: self.unit(x.float() if x.dtype == torch.float32 else x.long()),
            unit=conv_bn(3, 4, 3),
        )
    )
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
    found = fold_network(model, (3, 8, 8))
    assert found.double_error is None
    assert found.norms_left == 0
    assert error_of(model, before, x) < 2e-6


def test_outputs_that_change_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(NETWORKS["rep"]())
    monkeypatch.setattr(checks, "_ROUNDINGS", 0)
    monkeypatch.setattr(checks, "_OWN_NOISE", 0)
    with pytest.raises(TransformError, match=r"outputs differ by .* of their range"):
        fold_network(model, SHAPE)


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_rounding_is_no_worse_than_that_of_timms_own_fusion(name: str) -> None:
    pytest.importorskip("timm")
    from timm.models import byobnet
    from timm.utils import reparameterize_model

    torch.manual_seed(0)
    config = byobnet.model_cfgs[name]
    small = byobnet.ByoModelCfg(**{**vars(config), "blocks": config.blocks[:2]})
    model = byobnet.ByobNet(small, num_classes=5)
    lively(model)
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        exact = model.double()(x.double())
        theirs = reparameterize_model(model.float()).eval()(x)
    found = fold_network(model, (3, 32, 32))
    spread = exact.max() - exact.min()
    with torch.no_grad():
        ours = (model(x) - exact).abs().max() / spread
    assert found.norms_left == 0
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    # Sums of another order round otherwise, too.
    assert ours < max(1.5 * float((theirs - exact).abs().max() / spread), 3e-7)
    assert ours < 1e-5


# Conditions that N(0, 1) never meets: the branch that they lead to is one that no fold may pass over.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "small inputs": lambda x: x.abs().max() < 2.5,
    "tiny inputs": lambda x: x.std() < 0.05,
    "large inputs": lambda x: x.abs().max() > 20,
    "no signal": lambda x: x.abs().sum() == 0,
    "one bright value": lambda x: (x - 1).abs().max() < 1e-3,
    "one dark value": lambda x: x.max() < 0,
}


def gated(condition: Callable[[Tensor], Tensor]) -> nn.Module:
    """Two units, the first with something between convolution and batch norm where a condition holds."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        if condition(x):
            y = y.tanh() * 2
        return self.unit(self.norm(y).relu())

    return lively(Custom(forward, conv=conv(3, 4, 3), norm=nn.BatchNorm2d(4), unit=conv_bn(4, 4, 3)))


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("double", [True, False])
def test_branches_that_other_inputs_take_are_not_folded_over(name: str, double: bool) -> None:
    torch.manual_seed(0)
    model = gated(GATES[name])
    if not double:
        # A network whose code needs its own type is checked alike.
        model.register_forward_pre_hook(
            lambda module, given: (given[0].float() + 0 * given[0].to(torch.int),)
        )
    before = copy.deepcopy(model)
    found = fold_network(model, (3, 8, 8))
    assert [item.name for item in found.stays] == ["norm"]
    assert "decides by its input" in found.stays[0].reason
    assert set(found.layers) == {"unit.0"}
    assert found.decides == ("",)
    assert (found.double_error is not None) == double
    drawn = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        for x in (drawn, 0.01 * drawn, 10 * drawn, 0 * drawn, 0 * drawn + 1, 0 * drawn - 1):
            assert error_of(model, before(x), x) < 2e-6


SHAPES: dict[str, tuple[Callable[[Tensor], bool], tuple[int, ...]]] = {
    "larger": (lambda x: x.shape[-1] > 8, (2, 3, 16, 16)),
    "smaller": (lambda x: x.shape[-2] < 8, (2, 3, 4, 4)),
    "many": (lambda x: len(x) > 96, (128, 3, 8, 8)),
    "one": (lambda x: len(x) == 1, (1, 3, 8, 8)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_branches_that_other_shapes_take_are_not_folded_over(name: str) -> None:
    condition, shape = SHAPES[name]
    torch.manual_seed(0)
    model = gated(condition)  # type: ignore[arg-type]
    before = copy.deepcopy(model)
    found = fold_network(model, (3, 8, 8))
    assert [item.name for item in found.stays] == ["norm"]
    assert "inputs of another scale, number or size differ" in found.stays[0].reason
    assert set(found.layers) == {"unit.0"}
    with torch.no_grad():
        for x in (torch.randn(4, 3, 8, 8), torch.randn(shape)):
            assert error_of(model, before(x), x) < 2e-6


def test_branches_that_only_images_take_are_not_folded_over() -> None:
    def of_images(x: Tensor) -> Tensor:
        return (x.mean() - 0.3).abs() < 0.05

    torch.manual_seed(0)
    images = [torch.full((24, 3, 8, 8), 0.3) + 0.2 * torch.randn(24, 3, 8, 8) for _ in range(2)]
    blind = fold_network(gated(of_images), (3, 8, 8))
    assert (blind.stays, blind.images) == ((), 0)
    # Nothing but the images can show that; that the code decides is known.
    assert blind.decides == ("",)
    found = fold_network(gated(of_images), (3, 8, 8), images)
    assert [item.name for item in found.stays] == ["norm"]
    assert "on images differ" in found.stays[0].reason
    assert found.images == 48


def test_a_branch_that_single_images_take_is_not_folded_over() -> None:
    found = fold_network(gated(lambda x: len(x) == torch.ones(())), (3, 8, 8), [torch.randn(8, 3, 8, 8)])
    assert [item.name for item in found.stays] == ["norm"]


def test_networks_that_refuse_some_inputs_are_checked_on_the_others() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not x.any() or len(x) == 1:
            raise ValueError("an empty image")
        result: Tensor = self.unit(x)
        return result

    found = fold_network(lively(Custom(forward, unit=conv_bn(3, 4, 3))), (3, 8, 8), [torch.randn(8, 3, 8, 8)])
    assert (found.norms_left, found.images) == (0, 8)


def test_code_that_asks_for_shapes_alone_does_not_decide_by_values() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        known = bool(self.unit[0].weight.any()) and float(self.unit[0].weight.sum()) != 0
        result: Tensor = self.unit(x) if known and x.shape[1] == 3 and x.dim() == 4 else x
        return result

    found = fold_network(lively(Custom(forward, unit=conv_bn(3, 4, 3))), (3, 8, 8))
    assert found.decides == ()
