"""Which units go: scores against formulas by hand, counts, scopes, rounding, patterns, presets, options."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import PruningError, UsageError
from cctool.graph.channels import couple
from cctool.graph.records import ChannelGraph
from cctool.models.registry import build
from cctool.options.prune.choices import PruneMethod, Scope, StepMode
from cctool.options.prune.options import PRESETS, PruneOptions, PrunePreset
from cctool.pruning.cut.planner import plan_thinning, thin
from cctool.pruning.scores.criteria import Unscored
from cctool.pruning.scores.units import SCORES, score_context
from cctool.pruning.select.order import Selection
from option_toys import asked
from pruning_toys import select

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """conv1 (3 -> 8) - bn1 - conv2 (8 -> 6) - bn2, added to bn3 of conv3 (8 -> 6); fc."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)
        for norm in (self.bn1, self.bn2, self.bn3):
            nn.init.uniform_(norm.weight, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Two:
    return Two()


@pytest.fixture
def graph(model: Two) -> ChannelGraph:
    return couple(model, (X,))


def chosen(model: nn.Module, graph: ChannelGraph, options: PruneOptions, step: int = 1) -> Selection:
    return select(model, graph, options, score_context(model), step)


def counts(selection: Selection) -> list[int]:
    return [int(mask.sum()) for mask in selection.kept]


def test_every_method_has_a_score_and_every_preset_its_options() -> None:
    assert set(SCORES) == set(PruneMethod)
    assert set(PRESETS) == set(PrunePreset)


def test_scores_equal_the_formulas(model: Two, graph: ChannelGraph) -> None:
    context = score_context(model)
    first, second = graph.families
    weights = model.conv1.weight.detach()
    torch.testing.assert_close(SCORES[PruneMethod.L1](first, context), weights.abs().sum((1, 2, 3)))
    torch.testing.assert_close(SCORES[PruneMethod.L2](first, context), weights.square().sum((1, 2, 3)).sqrt())
    both = torch.cat([model.conv2.weight, model.conv3.weight], dim=1).detach()
    torch.testing.assert_close(SCORES[PruneMethod.L1](second, context), both.abs().sum((1, 2, 3)))
    torch.testing.assert_close(SCORES[PruneMethod.L2](second, context), both.square().sum((1, 2, 3)).sqrt())
    gammas = model.bn2.weight.detach().abs() + model.bn3.weight.detach().abs()
    torch.testing.assert_close(SCORES[PruneMethod.SLIMMING](second, context), gammas)


def test_random_scores_depend_on_the_seed_alone(model: Two, graph: ChannelGraph) -> None:
    score = SCORES[PruneMethod.RANDOM]
    draws = [score(graph.families[0], score_context(model, seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])  # type: ignore[arg-type]
    assert not torch.equal(draws[0], draws[2])  # type: ignore[arg-type]


def test_slimming_says_why_it_cannot_rank() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = couple(model, (torch.randn(1, 3),))
    result = SCORES[PruneMethod.SLIMMING](graph.families[0], score_context(model))
    assert isinstance(result, Unscored)
    assert "no batch norm" in result.reason


def test_local_scope_takes_the_fraction_of_each_family(model: Two, graph: ChannelGraph) -> None:
    options = PruneOptions(method=PruneMethod.L1, rate=0.5, scope=Scope.LOCAL)
    selection = chosen(model, graph, options)
    assert counts(selection) == [4, 3]
    score = model.conv1.weight.detach().abs().sum((1, 2, 3))
    assert score[selection.kept[0]].min() > score[~selection.kept[0]].max()


def test_global_scope_takes_the_lowest_of_all(model: Two, graph: ChannelGraph) -> None:
    with torch.no_grad():
        model.bn1.weight.copy_(torch.arange(1.0, 9.0) / 100)
        model.bn2.weight.copy_(torch.tensor([1.0, 2, 3, 4, 5, 6]))
        model.bn3.weight.zero_()
    selection = chosen(model, graph, PruneOptions(rate=0.5))
    # 7 of 14 units go; all but the best of the eight small gammas
    assert [mask.nonzero().flatten().tolist() for mask in selection.kept] == [[7], [0, 1, 2, 3, 4, 5]]
    selection = chosen(model, graph, PruneOptions(rate=0.6))
    # 8 go: the family keeps its best one, and the other one loses its smallest
    assert [mask.nonzero().flatten().tolist() for mask in selection.kept] == [[7], [1, 2, 3, 4, 5]]


def test_default_scope_follows_the_method() -> None:
    assert PruneOptions(method=PruneMethod.SLIMMING).effective_scope is Scope.GLOBAL
    assert PruneOptions(method=PruneMethod.L1).effective_scope is Scope.LOCAL
    assert PruneOptions(method=PruneMethod.L1, scope=Scope.GLOBAL).effective_scope is Scope.GLOBAL


@pytest.mark.parametrize("scope", list(Scope))
def test_ties_are_cut_by_index_exactly(model: Two, graph: ChannelGraph, scope: Scope) -> None:
    with torch.no_grad():
        for norm in (model.bn1, model.bn2, model.bn3):
            norm.weight.fill_(1)
        model.bn3.weight.fill_(0)
    selections = [chosen(model, graph, PruneOptions(rate=0.5, scope=scope)) for _ in range(2)]
    assert selections[0].removed_units() == 7
    # equal scores thin all families alike
    assert counts(selections[0]) == [4, 3]
    assert [m.tolist() for m in selections[0].kept] == [m.tolist() for m in selections[1].kept]
    assert selections[0].kept[0].tolist() == [False] * 4 + [True] * 4


def test_one_unit_stays_in_every_family(model: Two, graph: ChannelGraph) -> None:
    for scope in Scope:
        options = PruneOptions(method=PruneMethod.L2, rate=0.999, scope=scope)
        assert counts(chosen(model, graph, options)) == [1, 1]


def test_rounding_keeps_multiples(model: Two, graph: ChannelGraph) -> None:
    options = PruneOptions(method=PruneMethod.L2, rate=0.5)
    assert counts(chosen(model, graph, options)) == [4, 3]
    assert counts(chosen(model, graph, replace(options, round_to=4))) == [4, 4]
    assert counts(chosen(model, graph, replace(options, round_to=8))) == [8, 6]


def test_rate_survives_floating_point() -> None:
    model = nn.Sequential(nn.Linear(3, 100), nn.ReLU(), nn.Linear(100, 2))
    graph = couple(model, (torch.randn(1, 3),))
    # 0.29 * 100 is 28.999999999999996
    assert counts(chosen(model, graph, PruneOptions(method=PruneMethod.L1, rate=0.29))) == [71]


@pytest.mark.parametrize("pattern", ["conv1", "conv1.weight", "bn1", "c*1", "conv1.*"])
def test_exclusion_by_family_module_or_parameter(model: Two, graph: ChannelGraph, pattern: str) -> None:
    options = PruneOptions(method=PruneMethod.L1, rate=0.5, exclude=(pattern,))
    selection = chosen(model, graph, options)
    assert counts(selection) == [8, 3]
    assert selection.spared == {"conv1": "excluded"}


def test_excluded_coupled_layer_holds_its_family(model: Two, graph: ChannelGraph) -> None:
    options = PruneOptions(method=PruneMethod.L1, rate=0.5, exclude=("conv3",))
    assert counts(chosen(model, graph, options)) == [4, 6]


def test_pattern_that_matches_nothing_names_what_is_near(model: Two, graph: ChannelGraph) -> None:
    with pytest.raises(UsageError, match=r"'conv9' matches no .*conv"):
        chosen(model, graph, PruneOptions(exclude=("conv9",)))


def test_only_and_keep_fix_widths(model: Two, graph: ChannelGraph) -> None:
    options = PruneOptions(method=PruneMethod.L1, keep=0.7, only=("conv1",))
    assert counts(chosen(model, graph, options)) == [5, 6]
    assert counts(chosen(model, graph, options, step=2)) == [3, 6]
    assert counts(chosen(model, graph, replace(options, step_mode=StepMode.PROGRESSIVE), step=2)) == [5, 6]


def test_steps_reach_the_rate() -> None:
    options = PruneOptions(rate=0.5, steps=4)
    assert [options.rate_at(step) for step in (1, 4)] == pytest.approx([1 - 0.5**0.25, 0.5])
    progressive = replace(options, step_mode=StepMode.PROGRESSIVE)
    kept = 1.0
    for step in range(1, 5):
        kept *= 1 - progressive.rate_at(step)
    assert kept == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": 1.0}, "rate 1.0"),
        ({"rate": -0.1}, "rate -0.1"),
        ({"round_to": 0}, "--round-to 0"),
        ({"steps": 0}, "steps 0"),
        ({"finetune_epochs": -1}, "--finetune-epochs -1"),
        ({"recalibrate": -5}, "recalibrate -5"),
        ({"keep": 0.0}, "keep 0.0"),
        ({"keep": 0.5, "scope": Scope.GLOBAL}, "scope global"),
    ],
)
def test_options_out_of_range_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PruneOptions(**given)  # type: ignore[arg-type]


def test_nan_weights_are_refused_by_name(model: Two, graph: ChannelGraph) -> None:
    with torch.no_grad():
        model.bn1.weight[3] = float("nan")
    with pytest.raises(PruningError, match="family conv1: scores are not finite"):
        chosen(model, graph, PruneOptions())


def test_preset_reproduces_the_published_parameter_counts() -> None:
    model = build("mobilenet_student", {"num_classes": 11})
    options = asked(PruneOptions, PrunePreset.LHY_HW7)
    assert sum(p.numel() for p in model.parameters()) == 256_779
    sizes = []
    for step in range(1, options.steps + 1):
        thinned = copy.deepcopy(model)
        result = thin(thinned, (torch.randn(1, 3, 32, 32),), options, step=step)
        sizes.append(sum(p.numel() for p in thinned.parameters()))
        assert result.report.parameters_after == sizes[-1]
        changed = [f.name for f in result.report.families if f.kept < f.units]
        assert changed == ["cnn.3.3", "cnn.4.3", "cnn.5.3", "cnn.6.3"]
    assert sizes == [236_066, 217_850, 200_354, 185_091, 171_606]


def test_preset_ranks_by_the_norm_behind_the_depthwise_convolution() -> None:
    model = build("mobilenet_student", {"num_classes": 11})
    gamma = model.get_submodule("cnn.4.1").weight
    with torch.no_grad():
        gamma.copy_(-torch.rand(128) - 0.5)
    result = plan_thinning(model, (torch.randn(1, 3, 32, 32),), asked(PruneOptions, PrunePreset.LHY_HW7))
    (cut,) = result.plan.tensors["cnn.4.1.weight"]
    assert cut.keep.tolist() == gamma.abs().topk(121).indices.sort().values.tolist()


def test_dry_plan_leaves_the_model_alone_and_thin_follows_it(model: Two) -> None:
    before = copy.deepcopy(model.state_dict())
    options = PruneOptions(method=PruneMethod.L2, rate=0.5)
    planned = plan_thinning(model, (X,), options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    done = thin(model, (X,), options)
    assert done.report == planned.report
    assert [family.kept for family in done.report.families] == [4, 3]


def test_rate_below_one_unit_removes_nothing(model: Two) -> None:
    result = thin(model, (X,), PruneOptions(method=PruneMethod.L1, rate=0.01))
    assert not result.plan.tensors
    assert result.report.notes == ("nothing to remove: the rate is below one unit",)
