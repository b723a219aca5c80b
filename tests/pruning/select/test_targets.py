"""Searches: the order of removals, and the fewest units that bring a cost to its limit."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cctool.base.errors import PruningError
from cctool.graph.channels import couple
from cctool.graph.cost import measure
from cctool.models.registry import build
from cctool.options.prune.choices import PruneMethod, Scope
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.planner import Planner
from cctool.pruning.cut.surgery import apply_cut
from cctool.pruning.select.order import Candidates, Order, by_options, order
from cctool.pruning.select.targets import fewest_removed, sketch

X = (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)


def made(sizes: list[int], seed: int = 0) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(size, generator=generator).double() for n, size in enumerate(sizes)}
    return Candidates(scores, dict.fromkeys(scores, 1), {})


@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.integers(0, 99), st.floats(0, 0.99))
@settings(max_examples=60, deadline=None)
def test_local_order_is_the_local_rate_at_its_own_places(sizes: list[int], seed: int, rate: float) -> None:
    chosen = made(sizes, seed)
    options = PruneOptions(method=PruneMethod.L1, rate=rate, scope=Scope.LOCAL)
    kept = {n: max(1, count) for n, count in by_options(None, chosen, options).items()}  # type: ignore[arg-type]
    removed = sum(sizes) - sum(kept.values())
    assert order(chosen, Scope.LOCAL).counts(removed) == kept


@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_global_order_takes_the_lowest_scores_and_leaves_one_each(sizes: list[int], seed: int) -> None:
    chosen = made(sizes, seed)
    ordered = order(chosen, Scope.GLOBAL)
    assert len(ordered.owners) == sum(sizes) - len(sizes)
    free = sorted(
        (float(value), number)
        for number, score in chosen.scores.items()
        for value in score.sort().values[:-1]
    )
    assert ordered.owners.tolist() == [number for _, number in free]


@given(st.integers(1, 40), st.integers(0, 400), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_the_fewest_units_are_found_where_all_cost_the_same(units: int, limit: int, price: int) -> None:
    ordered = Order(torch.zeros(units, dtype=torch.int64), {0: units + 1})

    def cost(kept: Mapping[int, int]) -> float:
        return price * kept[0]

    possible = [k for k in range(units + 1) if price * (units + 1 - k) <= limit]
    if not possible:
        with pytest.raises(PruningError, match="cannot be reached"):
            fewest_removed(ordered, cost, limit, "--target params=1")
        return
    found = fewest_removed(ordered, cost, limit, "--target params=1")
    assert found.chosen.removed == possible[0]
    if possible[0]:
        assert found.above is not None
        assert found.above.cost > limit >= found.chosen.cost


@given(
    st.lists(st.tuples(st.integers(2, 6), st.integers(1, 50)), min_size=2, max_size=6),
    st.integers(0, 99),
    st.floats(0.2, 1),
)
@settings(max_examples=80, deadline=None)
def test_a_unit_that_overshoots_gives_way_to_one_that_fits(
    families: list[tuple[int, int]], seed: int, share: float
) -> None:
    ordered = order(made([size for size, _ in families], seed), Scope.GLOBAL)
    prices = [price for _, price in families]

    def cost(kept: Mapping[int, int]) -> float:
        return sum(prices[number] * count for number, count in kept.items())

    dense = cost(ordered.counts(0))
    limit = share * dense
    if cost(ordered.counts(len(ordered.owners))) > limit:
        return
    found = fewest_removed(ordered, cost, limit, "--target params=1")
    assert cost(found.counts) == found.chosen.cost <= limit
    first = next(k for k in range(len(ordered.owners) + 1) if cost(ordered.counts(k)) <= limit)
    single = [cost(ordered.counts(first))]
    if first and limit - single[0] > 0.005 * dense:
        before = cost(ordered.counts(first - 1))
        single += [before - prices[number] for number in set(ordered.owners[first:].tolist())]
    # one exchange is sure, further ones may land nearer still
    assert max(value for value in single if value <= limit) <= found.chosen.cost <= limit


def test_rounded_widths_give_way_a_grain_at_a_time() -> None:
    """Two families in steps of four: 40 a unit in one, 3 in the other, whose next step lands nearer."""
    ordered = Order(torch.tensor([0] * 4 + [1] * 4 + [0, 1] * 3), {0: 8, 1: 8})

    def cost(kept: Mapping[int, int]) -> float:
        rounded = {number: -(-count // 4) * 4 for number, count in kept.items()}
        return 40 * rounded[0] + 3 * rounded[1]

    # 344 at first, 184 once four units of the first family went, 332 once four of the second one did
    assert fewest_removed(ordered, cost, 340, "--target params=1", {0: 4, 1: 4}).chosen.cost == 332
    assert fewest_removed(ordered, cost, 340, "--target params=1").chosen.cost == 184
    assert fewest_removed(ordered, cost, 331, "--target params=1", {0: 4, 1: 4}).chosen.cost == 184


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("round_to", [1, 8])
def test_a_sketch_costs_what_the_cut_network_costs(scope: Scope, round_to: int) -> None:
    model = build("mobilenet_student", {"num_classes": 7, "base": 8})
    planner = Planner(model, X, PruneOptions(method=PruneMethod.L2, scope=scope, round_to=round_to))
    chosen = planner.candidates()
    ordered = order(chosen, scope)
    _, plan = planner.planned(chosen, ordered.counts(len(ordered.owners) // 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = sketch(model, plan)
    counted = measure(drawn, (3, 16, 16)).total.macs, sum(p.numel() for p in drawn.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    apply_cut(model, plan)
    assert counted == (measure(model, (3, 16, 16)).total.macs, sum(p.numel() for p in model.parameters()))


def test_widths_and_least_channels_are_kept() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 20, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(20, 4),
    )  # fmt: skip

    def kept(**given: object) -> list[int]:
        options = PruneOptions(method=PruneMethod.L1, rate=0.9, **given)  # type: ignore[arg-type]
        planner = Planner(model, X, options)
        return [int(mask.sum()) for mask in planner.verified(planner.by_options()).selection.kept]

    assert kept() == [2, 2]
    assert kept(min_channels=5) == [5, 5]
    assert kept(min_channels=15) == [12, 15]
    assert kept(round_to=4) == [4, 4]
    assert kept(round_to=None) == [8, 8]


def test_small_families_are_left_alone_by_name() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    options = PruneOptions(method=PruneMethod.L1, min_channels=6)
    planner = Planner(model, (torch.randn(1, 5),), options)
    with pytest.raises(PruningError, match="no more than --min-channels"):
        planner.verified(planner.by_options())


def test_every_scope_walks_every_prefix() -> None:
    """Costs never grow along an order, whatever the scope: bisection rests on it."""
    model = build("resnet20", {"base": 4})
    for scope, round_to in itertools.product(Scope, (1, 4)):
        options = PruneOptions(method=PruneMethod.L2, scope=scope, round_to=round_to)
        planner = Planner(model, X, options)
        chosen = planner.candidates()
        ordered = order(chosen, scope)
        costs = [
            sum(p.numel() for p in sketch(model, planner.planned(chosen, ordered.counts(k))[1]).parameters())
            for k in range(0, len(ordered.owners) + 1, 3)
        ]
        assert costs == sorted(costs, reverse=True)
        assert costs[-1] < 0.3 * costs[0]


def test_the_graph_is_not_needed_to_order() -> None:
    graph = couple(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.randn(1, 3),))
    assert [family.units for family in graph.families] == [4]
    assert len(order(Candidates({}, {}, {}), Scope.GLOBAL).owners) == 0
