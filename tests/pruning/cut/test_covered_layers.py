"""Every kind of layer and of input and output that `cctool prune` says it covers: cut by half, and exactly.

Each network states the fraction of its parameters below which half of its units have to bring it: a family
that froze would leave more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.pruning.cut.planner import thin
from hook_oracle import HALF, check_exact, count, difference, distinct, run

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def conv(i: int, o: int, **keywords: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **keywords)


class Net(nn.Module):
    """Modules by name, and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


class Block(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(conv(i, o), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


def unet(groups: int) -> nn.Module:
    """Two levels down, two up by transposed convolutions, skips by concatenation; segments into 3 classes."""

    def forward(m: Net, x: Tensor) -> Tensor:
        one = m.down1(x)
        two = m.down2(F.max_pool2d(one, 2))
        x = m.bottom(F.max_pool2d(two, 2))
        x = m.dec2(torch.cat([m.up2(x), two], dim=1))
        x = m.dec1(torch.cat([m.up1(x), one], dim=1))
        return m.out(x)  # type: ignore[no-any-return]

    return Net(
        forward, down1=Block(3, 8), down2=Block(8, 16), bottom=Block(16, 16),
        up2=nn.ConvTranspose2d(16, 16, 2, stride=2, groups=groups), dec2=Block(32, 16),
        up1=nn.ConvTranspose2d(16, 8, 2, stride=2, groups=groups), dec1=Block(16, 8), out=nn.Conv2d(8, 3, 1),
    )  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_unet_with_transposed_convolutions_and_concatenated_skips(groups: int) -> None:
    cut, report = check_exact(unet(groups), (IMAGE,), below=0.31)
    assert {f.op for f in report.frozen} == {"input", "output"}
    assert (cut.up2.in_channels, cut.up2.out_channels, cut.up2.groups) == (8, 8, groups)


def test_depthwise_transposed_convolution_whose_outputs_are_many() -> None:
    model = Net(
        lambda m, x: m.out(m.up(m.a(x))), a=Block(3, 16),
        up=nn.ConvTranspose2d(16, 32, 2, stride=2, groups=16), out=conv(32, 2),
    )  # fmt: skip
    cut, _ = check_exact(model, (IMAGE,), below=0.51)
    assert (cut.up.in_channels, cut.up.out_channels, cut.up.groups) == (8, 16, 8)


def shuffled_by_hand(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    x = x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(b, c // 4, 2 * h, 2 * w)


@pytest.mark.parametrize("shuffle", [nn.PixelShuffle(2), shuffled_by_hand])
def test_super_resolution_by_pixel_shuffle(shuffle: Callable[[Tensor], Tensor]) -> None:
    model = Net(
        lambda m, x: m.out(shuffle(m.b(F.relu(m.a(x))))), a=conv(3, 16), b=conv(16, 32), out=conv(8, 3)
    )
    cut, _ = check_exact(model, (IMAGE,), below=0.3)
    assert cut.b.out_channels == 4 * cut.out.in_channels == 16


def test_pixel_unshuffle() -> None:
    model = Net(
        lambda m, x: m.out(m.b(m.s(m.a(x)))),
        a=Block(3, 8),
        s=nn.PixelUnshuffle(2),
        b=Block(32, 8),
        out=conv(8, 3),
    )
    check_exact(model, (IMAGE,), below=0.31)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.InstanceNorm2d(8, affine=True),
        lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm2d(8, affine=False, track_running_stats=True),
        lambda: nn.BatchNorm2d(8, affine=False),
        lambda: nn.GroupNorm(4, 8),
        lambda: nn.GroupNorm(8, 8),
    ],
)  # fmt: skip
def test_norms_go_along(norm: Callable[[], nn.Module]) -> None:
    model = Net(
        lambda m, x: m.out(F.relu(m.n2(m.b(F.relu(m.n(m.a(x))))))),
        a=conv(3, 8),
        n=norm(),
        b=conv(8, 8),
        n2=norm(),
        out=conv(8, 3),
    )
    cut, _ = check_exact(model, (IMAGE,), below=0.37)
    assert getattr(cut.n, "num_features", getattr(cut.n, "num_channels", 0)) == 4


@pytest.mark.parametrize("slopes", [1, 16])
def test_prelu_with_one_slope_and_with_one_a_channel(slopes: int) -> None:
    model = Net(
        lambda m, x: m.out(m.p2(m.b(m.p1(m.a(x))))), a=conv(3, 16), p1=nn.PReLU(slopes), b=conv(16, 16),
        p2=nn.PReLU(slopes), out=conv(16, 2),
    )  # fmt: skip
    cut, _ = check_exact(model, (IMAGE,), below=0.33)
    assert cut.p1.num_parameters == max(1, slopes // 2)


def test_squeeze_and_excitation_by_linear_layers_inside_a_residual_block() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.block(x)
        b, c, _, _ = y.shape
        gate = torch.sigmoid(m.up(F.relu(m.down(y.mean((2, 3)))))).view(b, c, 1, 1)
        return m.out(F.relu(x + y * gate))  # type: ignore[no-any-return]

    model = Net(
        forward,
        stem=Block(3, 16),
        block=Block(16, 16),
        down=nn.Linear(16, 8),
        up=nn.Linear(8, 16),
        out=conv(16, 2),
    )
    _, report = check_exact(model, (IMAGE,), below=0.33)
    assert [family.units for family in report.families] == [16, 8]


def test_dense_concatenation_of_all_that_came_before() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        found = [m.stem(x)]
        for layer in (m.l1, m.l2, m.l3):
            found.append(layer(torch.cat(found, dim=1)))
        return m.out(torch.cat(found, dim=1))  # type: ignore[no-any-return]

    model = Net(forward, stem=Block(3, 8), l1=Block(8, 8), l2=Block(16, 8), l3=Block(24, 8), out=conv(32, 2))
    _, report = check_exact(model, (IMAGE,), below=0.32)
    assert [family.kept for family in report.families] == [4, 4, 4, 4]


def test_channel_shuffle_between_grouped_convolutions() -> None:
    model = Net(
        lambda m, x: m.out(m.b(F.channel_shuffle(m.a(m.stem(x)), 4))), stem=Block(3, 16),
        a=conv(16, 32, groups=4), b=conv(32, 16, groups=4), out=conv(16, 2),
    )  # fmt: skip
    check_exact(model, (IMAGE,), below=0.34)


def test_flatten_into_linear_layers_with_batch_norm() -> None:
    model = nn.Sequential(
        Block(3, 8), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 32), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Dropout(0.5), nn.Linear(32, 5),
    )  # fmt: skip
    cut, _ = check_exact(model, (IMAGE,), below=0.29)
    assert (cut[3].in_features, cut[3].out_features, cut[4].num_features) == (64, 16, 16)


def test_a_batch_norm_that_two_convolutions_share() -> None:
    model = Net(
        lambda m, x: m.out(F.relu(m.n(m.a(x))) * torch.sigmoid(m.n(m.b(x)))),
        a=conv(3, 16), b=conv(3, 16), n=nn.BatchNorm2d(16), out=conv(16, 2),
    )  # fmt: skip
    _, report = check_exact(model, (IMAGE,), below=0.52)
    assert [family.units for family in report.families] == [16]


def test_a_head_that_runs_at_two_resolutions() -> None:
    """One tower over a pyramid, as detectors have it; its output is a list."""

    def forward(m: Net, x: Tensor) -> list[Tensor]:
        fine = m.a(x)
        coarse = m.b(F.max_pool2d(fine, 2))
        levels = [
            m.lateral_a(fine) + F.interpolate(m.lateral_b(coarse), scale_factor=2.0),
            m.lateral_b(coarse),
        ]
        return [m.score(m.tower(level)) for level in levels]

    model = Net(
        forward, a=Block(3, 8), b=Block(8, 16), lateral_a=nn.Conv2d(8, 16, 1), lateral_b=nn.Conv2d(16, 16, 1),
        tower=Block(16, 16), score=conv(16, 3),
    )  # fmt: skip
    check_exact(model, (IMAGE,), below=0.32)


def test_a_convolution_that_is_applied_again_and_again() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        for _ in range(3):
            x = F.relu(m.again(x) + x)
        return m.out(x)  # type: ignore[no-any-return]

    _, report = check_exact(
        Net(forward, stem=Block(3, 16), again=conv(16, 16), out=conv(16, 2)), (IMAGE,), below=0.33
    )
    assert [family.units for family in report.families] == [16]


def test_auxiliary_heads_that_run_in_training_mode_alone() -> None:
    def forward(m: Net, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = m.a(x)
        main = m.out(m.b(x))
        return (main, m.aux_out(m.aux(x))) if m.training else main

    model = Net(
        forward, a=Block(3, 16), b=Block(16, 16), aux=Block(16, 16), aux_out=conv(16, 2), out=conv(16, 2)
    )
    cut, _ = check_exact(model, (IMAGE,), below=0.32)
    assert (cut.aux[0].in_channels, cut.aux[0].out_channels, cut.aux_out.in_channels) == (8, 8, 8)
    dense, small = model.train()(IMAGE.double()), cut.train()(IMAGE.double())
    assert [t.shape for t in dense] == [t.shape for t in small]


class Functional(nn.Module):
    """No module of its own: convolution, batch norm, depthwise convolution and linear layer by function."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"w": (16, 3, 3, 3), "d": (16, 1, 3, 3), "v": (20, 16), "u": (4, 20)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        for name in ("gamma", "beta", "b"):
            self.register_parameter(name, nn.Parameter(torch.rand(16 if name != "b" else 20)))
        self.register_buffer("mean", torch.rand(16))
        self.register_buffer("var", torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w, padding=1)
        x = F.relu(F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training))
        x = F.conv2d(x, self.d, padding=1, groups=x.shape[1])
        x = F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.v, self.b)
        return F.linear(F.relu(x), self.u)


def test_functional_calls_with_raw_parameters_and_buffers() -> None:
    model = distinct(Functional())
    cut = copy.deepcopy(model)
    x = IMAGE.double()
    report = thin(cut, (x,), HALF).report
    assert not report.notes
    assert count(cut) < 0.43 * count(model)
    assert (len(cut.mean), len(cut.var), cut.d.shape[0]) == (8, 8, 8)
    # masked by hand: the values that are missing tell which channels went
    network = copy.deepcopy(model)
    with torch.no_grad():
        gone = ~torch.isin(model.gamma, cut.gamma)
        assert int(gone.sum()) == 8
        assert torch.equal(cut.w, model.w[~gone])
        for tensor in (network.gamma, network.beta):
            tensor[gone] = 0
        gone = ~torch.isin(model.b, cut.b)
        assert int(gone.sum()) == 10
        network.v[gone] = 0
        network.b[gone] = 0
    assert difference(run(network, (x,)), run(cut, (x,))) < 1e-9
    assert difference(run(model, (x,)), run(cut, (x,))) > 1e-3


@dataclass
class Answer:
    """A dataclass among the outputs."""

    logits: Tensor
    maps: dict[str, list[Tensor]]


def test_several_inputs_and_nested_outputs() -> None:
    """An image, a vector that modulates its features, and whole numbers; a dataclass of a dict of lists."""

    def forward(m: Net, image: Tensor, vector: Tensor, number: Tensor) -> Answer:
        x = m.a(image)
        scale, shift = m.film(vector).chunk(2, dim=1)
        x = F.relu(x * scale[:, :, None, None] + shift[:, :, None, None])
        x = x + m.table(number)[:, :, None, None]
        return Answer(m.fc(x.mean((2, 3))), {"maps": [m.score(x), m.score(m.b(x))]})

    model = Net(
        forward, a=Block(3, 16), film=nn.Linear(5, 32), table=nn.Embedding(7, 16), b=Block(16, 16),
        score=conv(16, 2), fc=nn.Linear(16, 4),
    )  # fmt: skip
    vector, number = torch.randn(2, 5), torch.tensor([1, 4])
    cut, _ = check_exact(model, (IMAGE, vector, number), below=0.42)
    assert (cut.film.out_features, cut.table.embedding_dim) == (16, 8)


# ---- widths that the code keeps in attributes -------------------------------------------------------------
class Stored(nn.Module):
    """conv -> something that uses a stored width -> conv."""

    def __init__(self, use: Callable[[Stored, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.stem, self.out = Block(3, 16), conv(16, 2)
        self.left = conv(16, 16)
        self.use = use
        for name, value in attributes.items():
            setattr(self, name, value)
        self.register_buffer("blur", torch.rand(16, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.use(self, self.left(self.stem(x))))  # type: ignore[no-any-return]


def by_slice(m: Stored, x: Tensor) -> Tensor:
    return torch.cat([x[:, : m.width], torch.tanh(x[:, m.width :])], dim=1)


def by_narrow(m: Stored, x: Tensor) -> Tensor:
    return torch.cat([x.narrow(1, 0, m.width), torch.tanh(x[:, m.width :])], dim=1)


def by_list(m: Stored, x: Tensor) -> Tensor:
    first, second, third = torch.split(x, m.widths, 1)
    return torch.cat([torch.tanh(third), first, F.relu(second)], dim=1)


def by_size(m: Stored, x: Tensor) -> Tensor:
    first, second = x.split(m.whole // 2, dim=1)
    return torch.cat([first * torch.sigmoid(second), second], dim=1)


def by_view(m: Stored, x: Tensor) -> Tensor:
    return F.relu(x.view(-1, m.whole, 16 * 16)).view(-1, m.whole, 16, 16)


def by_groups(m: Stored, x: Tensor) -> Tensor:
    return F.conv2d(x, m.blur, padding=1, groups=m.whole)


def by_assertion(m: Stored, x: Tensor) -> Tensor:
    assert x.shape[1] == m.whole
    return F.relu(x)


@pytest.mark.parametrize(
    ("use", "attributes", "after"),
    [
        (by_slice, {"width": 6}, {"width": None}),
        (by_narrow, {"width": 6}, {"width": None}),
        (by_list, {"widths": [4, 10, 2]}, {"widths": None}),
        (by_size, {"whole": 16}, {"whole": 8}),
        (by_view, {"whole": 16}, {"whole": 8}),
        (by_groups, {"whole": 16}, {"whole": 8}),
        (by_assertion, {"whole": 16}, {"whole": 8}),
    ],
)  # fmt: skip
def test_widths_in_attributes_follow(
    use: Callable[[Stored, Tensor], Tensor], attributes: dict[str, Any], after: dict[str, int | None]
) -> None:
    cut, report = check_exact(Stored(use, **attributes), (IMAGE,), below=0.6)
    assert cut.left.out_channels == 8
    assert "left" in {family.name for family in report.families}
    for name, value in after.items():
        found = getattr(cut, name)
        assert type(found) is type(attributes[name])
        if value is not None:
            assert found == value


# ---- what stays, and says so ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_parametrized_convolutions_keep_their_width_and_are_named(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 8), nn.ReLU(), wrap(conv(8, 8)), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 2)
    )
    before = count(model)
    report = thin(model.eval(), (IMAGE,), HALF).report
    assert count(model) < before
    assert [(family.name, family.kept) for family in report.families] == [("4", 4)]
    frozen = {item.parameter: item for item in report.frozen if item.op not in ("input", "output")}
    assert any(name.startswith("2.parametrizations.weight") for name in frozen)
    assert "weight computed on the fly" in frozen["0.weight"].reason
