"""Each granularity of masks against a computation by hand in numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cctool.base.errors import PruningError, UsageError
from cctool.options.prune.choices import Granularity, PruneMethod, Scope, StepMode
from cctool.options.prune.options import PruneOptions
from cctool.options.prune.patterns import Block, Pattern
from cctool.pruning.masks.choose import choose_masks
from cctool.pruning.masks.granularity import (
    as_filters,
    from_filters,
    keep_highest,
    keep_pattern,
    pattern_holds,
)
from cctool.pruning.masks.report import weights_of
from cctool.pruning.scores.criteria import Unscored


class Net(nn.Module):
    """Convolutions of every kind, an embedding that is none, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=3)
        self.table = nn.Parameter(torch.randn(6, 1))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.up(torch.relu(self.grouped(x))).mean((2, 3))
        return self.fc(x * self.table[:, 0])


INPUTS = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)
WEIGHTS = ["stem.weight", "grouped.weight", "up.weight", "fc.weight"]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def chosen(net: nn.Module, granularity: Granularity, **options: Any) -> dict[str, Tensor]:
    given = {"method": PruneMethod.L1, "granularity": granularity} | options
    return dict(choose_masks(net, INPUTS, PruneOptions(**given)).masks)


def matrix(net: Net, name: str) -> np.ndarray:
    """The weight as [O, I / groups, K], output channels first, computed apart from the code under test."""
    weight = net.get_parameter(name).detach().numpy().astype(np.float64)
    if name == "fc.weight":
        return weight[:, :, None]
    if name == "up.weight":  # [12, 2, 2, 2] in 3 groups: output g * 2 + o reads inputs 4 g .. 4 g + 3
        turned = np.zeros((6, 4, 4))
        for group in range(3):
            for output in range(2):
                for i in range(4):
                    turned[group * 2 + output, i] = weight[group * 4 + i, output].reshape(-1)
        return turned
    return weight.reshape(*weight.shape[:2], -1)


def lowest(worth: list[float], rate: float) -> set[int]:
    """Numbers of the floor(rate * n) lowest, by index where they are equal."""
    order = sorted(range(len(worth)), key=lambda i: (worth[i], i))
    return set(order[: int(rate * len(worth) + 1e-9)])


def by_hand(w: np.ndarray, groups: list[list[tuple[int, int, int]]], rate: float) -> np.ndarray:
    """What stays where each group is a list of places."""
    gone = lowest([sum(abs(w[place]) for place in group) for group in groups], rate)
    kept = np.ones(w.shape, dtype=bool)
    for number in gone:
        for place in groups[number]:
            kept[place] = False
    return kept


Shape = tuple[int, int, int]


def elements(shape: Shape) -> list[list[Any]]:
    return [[place] for place in np.ndindex(shape)]


def kernels(shape: Shape) -> list[list[Any]]:
    return [[(o, i, k) for k in range(shape[2])] for o in range(shape[0]) for i in range(shape[1])]


def rows(shape: Shape) -> list[list[Any]]:
    return [[(o, i, k) for i in range(shape[1]) for k in range(shape[2])] for o in range(shape[0])]


def columns(shape: Shape) -> list[list[Any]]:
    return [[(o, i, k) for o in range(shape[0])] for i in range(shape[1]) for k in range(shape[2])]


def blocks(shape: Shape) -> list[list[Any]]:
    """Blocks of 3 rows and 4 columns, smaller at the edges."""
    outputs, inputs, size = shape
    return [
        [
            (o, c // size, c % size)
            for o in range(top, min(top + 3, outputs))
            for c in range(left, min(left + 4, inputs * size))
        ]
        for top in range(0, outputs, 3)
        for left in range(0, inputs * size, 4)
    ]


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [
        (Granularity.ELEMENT, elements),
        (Granularity.KERNEL, kernels),
        (Granularity.ROW, rows),
        (Granularity.COLUMN, columns),
        (Granularity.BLOCK, blocks),
    ],
)
@pytest.mark.parametrize("rate", [0.3, 0.75])
def test_each_granularity_is_the_computation_by_hand(
    net: Net, granularity: Granularity, groups: Callable[[Shape], list[list[Any]]], rate: float
) -> None:
    block = {"block": Block(3, 4)} if granularity is Granularity.BLOCK else {}
    masks = chosen(net, granularity, rate=rate, **block)
    # Rows of the classifier are the model's outputs.
    expected = WEIGHTS[:3] if granularity is Granularity.ROW else WEIGHTS
    assert [name for name in masks if name in WEIGHTS] == expected
    for name in expected:
        w = matrix(net, name)
        module = net.get_submodule(name.partition(".")[0])
        assert np.array_equal(as_filters(net.get_parameter(name).detach(), module).double().numpy(), w)
        found = as_filters(masks[name], module).numpy()
        assert np.array_equal(found, by_hand(w, groups(w.shape), rate)), name  # type: ignore[arg-type]
        assert masks[name].shape == net.get_parameter(name).shape


def test_l2_ranks_groups_by_their_l2_norm() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[3.0, 0.0], [2.0, 2.0]]))
    net = nn.Sequential(layer, nn.Linear(2, 2))

    def rows_of(method: PruneMethod) -> list[list[bool]]:
        options = PruneOptions(method=method, granularity=Granularity.ROW, only=("0",))
        return choose_masks(net, (torch.ones(2, 2),), options).masks["0.weight"].tolist()

    assert rows_of(PruneMethod.L1) == [[False, False], [True, True]]  # 3 < 4
    assert rows_of(PruneMethod.L2) == [[True, True], [False, False]]  # 9 > 8


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (1, 2)])
def test_n_of_m_along_the_input_dim(net: Net, keep: int, of: int) -> None:
    found = choose_masks(
        net,
        INPUTS,
        PruneOptions(method=PruneMethod.L1, granularity=Granularity.NM, pattern=Pattern(keep, of)),
    )
    for name in WEIGHTS:
        w = matrix(net, name)
        if w.shape[1] % of:
            assert found.skipped[name] == f"its input dim of {w.shape[1]} is not a multiple of {of}"
            continue
        module = net.get_submodule(name.partition(".")[0])
        mask = as_filters(found.masks[name], module).numpy()
        for o, i, k in np.ndindex(w.shape[0], w.shape[1] // of, w.shape[2]):
            four = slice(i * of, (i + 1) * of)
            best = sorted(range(of), key=lambda j: (abs(w[o, four, k][j]), j))[-keep:]
            assert mask[o, four, k].nonzero()[0].tolist() == sorted(best)
        masked = as_filters(net.get_parameter(name) * found.masks[name], module)
        assert pattern_holds(masked, Pattern(keep, of))
        assert not pattern_holds(as_filters(net.get_parameter(name), module), Pattern(keep, of))
    assert set(found.masks) | set(found.skipped) == {*WEIGHTS, "table"}


def test_depthwise_layers_have_nothing_to_choose_among() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))
    options = PruneOptions(method=PruneMethod.L1, granularity=Granularity.NM)
    found = choose_masks(net, (torch.randn(2, 4, 5, 5),), options)
    assert set(found.masks) == {"1.weight"}
    assert "one input channel" in found.skipped["0.weight"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.floats(0, 0.999))
def test_exactly_k_go_and_ties_by_index(values: list[int], rate: float) -> None:
    kept = keep_highest(torch.tensor(values, dtype=torch.float32), rate)
    best = values.index(max(values))
    order = sorted((i for i in range(len(values)) if i != best), key=lambda i: (values[i], i))
    gone = set(order[: int(rate * len(values) + 1e-9)])
    assert kept.tolist() == [i not in gone for i in range(len(values))]
    assert kept.any()


def test_the_first_of_equals_go_in_a_pattern() -> None:
    assert keep_pattern(torch.ones(1, 4, 1), Pattern()).flatten().tolist() == [False, False, True, True]


def test_globally_all_weights_compete_and_none_is_emptied(net: Net) -> None:
    with torch.no_grad():
        net.fc.weight.mul_(1e-6)
        net.grouped.weight.mul_(2)
    masks = chosen(net, Granularity.ELEMENT, rate=0.5, scope=Scope.GLOBAL)
    sizes = {name: net.get_parameter(name).numel() for name in WEIGHTS}
    values = {name: net.get_parameter(name).detach().abs().numpy() for name in WEIGHTS}
    # The best of each weight is out of the contest.
    rivals = sorted(v for found in values.values() for v in found.flatten() if v != found.max())
    threshold = rivals[sum(sizes.values()) // 2 - 1]
    for name, found in values.items():
        stays = (found > threshold) | (found == found.max())
        assert np.array_equal(masks[name].numpy(), stays), name
    assert masks["fc.weight"].sum() == 1
    local = chosen(net, Granularity.ELEMENT, rate=0.5, scope=Scope.LOCAL)
    assert {name: int((~mask).sum()) for name, mask in local.items()} == {n: s // 2 for n, s in sizes.items()}


def test_what_is_masked_already_is_not_counted_again(net: Net) -> None:
    from cctool.checkpoint.edits.mask import add_masks

    add_masks(net, chosen(net, Granularity.ELEMENT, rate=0.5))
    again = chosen(net, Granularity.ELEMENT, rate=0.5)
    for name in WEIGHTS:
        left = net.get_parameter(name).numel() - net.get_parameter(name).numel() // 2
        assert int((again[name] & (net.get_parameter(name) != 0)).sum()) == left - left // 2
    # Progressive steps reach the full rate so.
    assert PruneOptions(rate=0.75, steps=2, step_mode=StepMode.PROGRESSIVE).rate_at(2) == pytest.approx(0.5)


def test_steps_rates_only_and_exclude_change_what_goes(net: Net) -> None:
    def gone(**options: Any) -> dict[str, int]:
        step, rates = options.pop("step", 1), options.pop("rates", None)
        given = PruneOptions(method=PruneMethod.L1, granularity=Granularity.ELEMENT, **options)
        found = choose_masks(net, INPUTS, given, step=step, rates=rates)
        return {name: int((~mask).sum()) for name, mask in found.masks.items()}

    base = gone(rate=0.5)
    assert gone(rate=0.75)["fc.weight"] == 22 != base["fc.weight"] == 15
    assert gone(rate=0.75, steps=2, step=1)["fc.weight"] == 15
    assert set(gone(exclude=("stem",))) == {*WEIGHTS} - {"stem.weight"}
    assert set(gone(only=("grouped.*", "fc.weight"))) == {"grouped.weight", "fc.weight"}
    assert gone(rates={"*.weight": 0.5, "fc": 0.1}) == {**base, "fc.weight": 3}
    assert set(gone(rates={"up": 0.5})) == {"up.weight"}
    for options in ({"only": ("sten",)}, {"exclude": ("sten",)}, {"rates": {"sten": 0.5}}):
        with pytest.raises(UsageError, match="'sten' matches no parameter or module; near: stem"):
            gone(**options)
    with pytest.raises(UsageError, match="outside"):
        gone(rates={"fc": 1.0})


def test_the_saliency_decides_and_may_decline(net: Net) -> None:
    declined = Unscored("no evidence")
    options = PruneOptions(method=PruneMethod.TAYLOR, granularity=Granularity.ELEMENT, scope=Scope.LOCAL)

    def backwards(name: str, weight: Tensor) -> Any:
        return declined if name == "fc.weight" else torch.arange(weight.numel()).view_as(weight).float()

    found = choose_masks(net, INPUTS, options, backwards)
    assert found.skipped["fc.weight"] == "no evidence"
    mask = found.masks["stem.weight"].flatten()
    assert mask.tolist() == [i >= len(mask) // 2 for i in range(len(mask))]
    with pytest.raises(PruningError, match="not finite"):
        choose_masks(net, INPUTS, options, lambda name, weight: weight / 0)
    with pytest.raises(PruningError, match=r"nothing can be masked.*no evidence"):
        choose_masks(net, INPUTS, options, lambda name, weight: declined)


def test_empty_rows_take_bias_and_batch_norm_along(net: Net) -> None:
    found = choose_masks(net, INPUTS, PruneOptions(method=PruneMethod.L1, granularity=Granularity.ROW))
    rows_left = found.masks["stem.weight"].flatten(1).any(1)
    for name in ("stem.bias", "norm.weight", "norm.bias"):
        assert torch.equal(found.masks[name], rows_left)
        assert found.follow[name] == "stem.weight"
    assert torch.equal(found.masks["up.bias"], as_filters(found.masks["up.weight"], net.up).flatten(1).any(1))
    assert "grouped.bias" not in found.masks
    assert found.skipped["fc.weight"] == "its rows are the model's outputs"
    assert found.skipped["table"] == "not the weight of a convolution or linear layer"


def test_shapes_come_back() -> None:
    for module in (nn.ConvTranspose2d(12, 6, 2, groups=3), nn.ConvTranspose1d(4, 6, 3), nn.Conv3d(2, 4, 2)):
        weight = module.weight.detach()
        assert torch.equal(from_filters(as_filters(weight, module), module, weight.shape), weight)


def test_tied_weights_are_masked_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert [name for name, _, _ in weights_of(net)] == ["0.weight"]
