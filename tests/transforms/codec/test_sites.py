"""Which modules are tapped, on networks of several families and on ones made to be awkward."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from cctool.base.errors import TransformError, UsageError
from cctool.models import registry
from cctool.transforms.codec.sites import Site, find_sites


def sites(model: nn.Module, *taps: str, size: tuple[int, int, int] = (3, 32, 32)) -> list[Site]:
    return find_sites(model.eval(), (torch.rand(2, *size),), taps or ("blocks",))


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("resnet18", 8, "layer1.0", "layer4.1"),
        ("mobilenet_v2", 17, "features.1", "features.17"),
        ("regnet_x_400mf", 22, "trunk_output.block1.block1-0", "trunk_output.block4.block4-11"),
    ],
)
def test_blocks_of_torchvision_networks(name: str, count: int, first: str, last: str) -> None:
    found = [site.name for site in sites(getattr(torchvision.models, name)(weights=None))]
    assert len(found) == count
    assert (found[0], found[-1]) == (first, last)


@pytest.mark.parametrize(
    ("name", "count"), [("resnet32", 15), ("preact_resnet20", 9), ("mobilenet_student", 7)]
)
def test_blocks_of_our_networks(name: str, count: int) -> None:
    assert len(sites(registry.build(name, {"base": 4}))) == count


class Block(nn.Module):
    def __init__(self, channels: int, *, skips: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x if self.skips else self.conv(x)


class Backwards(nn.Module):
    """Passes its blocks in another order than that of their names; one of them twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Block(3), Block(3, skips=False), Block(3)
        self.twin = self.a
        self.pair = nn.LSTM(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.c(self.b(x)))
        out, _ = self.pair(x.flatten(2).mean(2)[None])
        return x + out.mean()


def test_the_order_is_that_of_the_forward_pass_and_blocks_that_add_nothing_count() -> None:
    model = Backwards()
    with pytest.raises(TransformError, match="a is not passed"):
        sites(model)
    del model.a, model.twin
    assert sites(model) == [Site("b", (3, 32, 32)), Site("c", (3, 32, 32))]


def test_patterns() -> None:
    model = nn.Sequential(Block(3), Block(3), nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    assert [site.name for site in sites(model, "*conv", "1")] == ["0.conv", "1.conv", "1"]
    with pytest.raises(UsageError, match="2x: no module has such a name; 0 is one"):
        sites(model, "2x")
    with pytest.raises(TransformError, match=r"2 returns \[2, 3072\]"):
        sites(model, "2")
    pair = Backwards()
    with pytest.raises(TransformError, match="pair returns tuple"):
        sites(pair, "pair")


def test_a_shared_module_is_tapped_under_its_first_name() -> None:
    model = nn.Sequential(Block(3))
    model.append(model[0])
    assert [site.name for site in sites(model, "1")] == ["0"]


def test_a_module_of_that_name_is_meant() -> None:
    model = nn.Sequential()
    model.add_module("blocks", nn.Conv2d(3, 2, 1))
    assert sites(model) == [Site("blocks", (2, 32, 32))]


def test_a_plain_network_has_no_blocks() -> None:
    with pytest.raises(UsageError, match="no residual blocks; name modules"):
        sites(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))


def test_nothing_is_left_on_the_network() -> None:
    model = nn.Sequential(Block(3))
    sites(model)
    assert not any(module._forward_hooks for module in model.modules())
