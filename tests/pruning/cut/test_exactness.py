"""Cut == masked on every architecture, with masks from the plan and from hooks that never saw it."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from cctool.base.errors import PruningError
from cctool.graph.channels import couple
from cctool.models.registry import build, input_shape
from cctool.options.prune.choices import NEEDS_DATA, PruneMethod, Scope
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.planner import plan_thinning, thin
from cctool.pruning.cut.surgery import Cut, CutPlan, apply_cut, mask, plan_cut
from cctool.pruning.scores.units import score_context
from cctool.pruning.select.order import select
from masking_oracle import lost_channels, outputs, randomise, relative, zeroed

SMALL = ["lenet", "resnet20", "preact_resnet20", "densenet40", "mobilenet_student", "vgg11"]
LARGE = ["resnet32", "resnet44", "resnet56", "resnet110", "vgg16", "vgg19", "alexnet"]
FOREIGN = ["torchvision:" + name for name in ("resnet18", "mobilenet_v2", "googlenet", "densenet121")]
# the smallest sides that these networks take, for speed
SIDES = dict.fromkeys(["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"], 8)
SIDES |= {"preact_resnet20": 8, "densenet40": 8, "mobilenet_student": 16}
SIDES |= dict.fromkeys(FOREIGN, 64)
WITHOUT_BATCH_NORM = {"lenet", "alexnet"}
# those that look at images choose other units, and are cut alike
OTHERS = [m for m in PruneMethod if m not in NEEDS_DATA and m is not PruneMethod.SLIMMING]
TOLERANCE = 1e-7  # of the spread over the batch, in float64: it may be a millionth of the output


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    arguments = {"num_classes": 10} if name.startswith("torchvision:") else {}
    if name.endswith("googlenet"):
        arguments["init_weights"] = False
    model = randomise(build(name, arguments))
    channels, side = input_shape(name, arguments)[0], SIDES.get(name, 32)
    # large inputs keep the signal above the constants that betas and biases add in each of many layers
    return model, 30 * torch.randn(2, channels, side, side, dtype=torch.float64)


def check_exact(name: str, method: PruneMethod) -> None:
    model, x = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cut = copy.deepcopy(model)
    options = PruneOptions(method=method, rate=0.5, scope=Scope.LOCAL)
    result = thin(cut, (x[:1],), options, seed=3)

    assert not result.report.notes
    for family in result.report.families:
        untouched = method is PruneMethod.SLIMMING and "no batch norm" in family.note
        assert family.kept == (family.units if untouched else family.units - family.units // 2)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    dense, thinned = outputs(model, x), outputs(cut, x)
    with zeroed(model, lost_channels(model, cut)):
        by_hooks = outputs(model, x)
    masked = copy.deepcopy(model)
    mask(masked, result.graph, result.selection)
    assert relative(by_hooks, thinned) < TOLERANCE
    assert relative(outputs(masked, x), thinned) < TOLERANCE
    assert relative(dense, thinned) > 1e-3
    assert result.report.error < 1e-5
    assert result.report.parameters_after == sum(p.numel() for p in cut.parameters())
    assert result.report.parameters_after < result.report.parameters_before

    loss = cut.train()(x)
    (loss if isinstance(loss, torch.Tensor) else sum(loss)).square().mean().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in cut.parameters())
    assert any(p.grad is not None for p in cut.parameters())

    again = thin(cut, (x[:1],), options)
    assert again.report.parameters_after < result.report.parameters_after
    assert outputs(cut, x).shape == dense.shape


@pytest.mark.parametrize("method", [PruneMethod.SLIMMING, PruneMethod.L2, PruneMethod.RANDOM])
@pytest.mark.parametrize("name", SMALL)
def test_cut_is_masked(name: str, method: PruneMethod) -> None:
    if method is PruneMethod.SLIMMING and name in WITHOUT_BATCH_NORM:
        model, x = make(name)
        with pytest.raises(PruningError, match="no batch norm on these channels"):
            thin(model, (x[:1],), PruneOptions(method=method))
    else:
        check_exact(name, method)


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_cut_is_masked(name: str) -> None:
    check_exact(name, PruneMethod.SLIMMING)


@pytest.mark.slow
@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("name", [*SMALL, *FOREIGN])
def test_cut_is_masked_by_each_method(name: str, method: PruneMethod) -> None:
    check_exact(name, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", [PruneMethod.SLIMMING, *OTHERS])
@pytest.mark.parametrize("name", LARGE)
def test_large_cut_is_masked(name: str, method: PruneMethod) -> None:
    if not (method is PruneMethod.SLIMMING and name in WITHOUT_BATCH_NORM):
        check_exact(name, method)


# ---- the check must be able to fail ---------------------------------------------------------------------
def difference(model: nn.Module, x: torch.Tensor, dropped_tie: int = -1) -> float:
    """Difference of the cut from the hook-masked network without one of the ties; inf if it breaks."""
    from cctool.graph.ledger import Ledger

    original, calls = Ledger.tie, [0]

    def tie(self: Ledger, a: torch.Tensor, b: torch.Tensor) -> None:
        if calls[0] != dropped_tie:
            original(self, a, b)
        calls[0] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "tie", tie)
        graph = couple(model, (x[:1],))
    options = PruneOptions(method=PruneMethod.RANDOM, scope=Scope.LOCAL)
    plan = plan_cut(model, graph, select(model, graph, options, score_context(model, seed=1)))
    return plan_difference(model, x, plan)


def plan_difference(model: nn.Module, x: torch.Tensor, plan: CutPlan) -> float:
    cut = copy.deepcopy(model)
    apply_cut(cut, plan)
    try:
        actual = outputs(cut, x)
    except (RuntimeError, ValueError):
        return float("inf")
    try:
        lost = lost_channels(model, cut)
    except AssertionError:
        return float("inf")
    with zeroed(model, lost):
        return relative(outputs(model, x), actual)


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, torch.Tensor]:
    return make("resnet20")


def test_unmutated_graph_is_exact(resnet: tuple[nn.Module, torch.Tensor]) -> None:
    assert difference(*resnet) < TOLERANCE


@pytest.mark.parametrize("number", range(9))
def test_deleting_any_tie_is_noticed(resnet: tuple[nn.Module, torch.Tensor], number: int) -> None:
    assert difference(*resnet, dropped_tie=number) > 1e-4


def test_resnet_has_nine_ties(resnet: tuple[nn.Module, torch.Tensor]) -> None:
    from cctool.graph.ledger import Ledger

    count, original = [0], Ledger.tie
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "tie", lambda s, a, b: (count.__setitem__(0, count[0] + 1), original(s, a, b)))
        couple(resnet[0], (resnet[1][:1],))
    assert count == [9]


def swapped(cut: Cut, position: int) -> Cut:
    """One index that stays is exchanged for one that goes."""
    gone = torch.tensor([i for i in range(cut.size) if i not in cut.keep.tolist()])
    others = torch.cat([cut.keep[:position], cut.keep[position + 1 :]])
    return replace(cut, keep=torch.cat([gone[position : position + 1], others]).sort().values)


def forgotten(cut: Cut, position: int) -> Cut:
    """One index that should go stays."""
    gone = torch.tensor([i for i in range(cut.size) if i not in cut.keep.tolist()])
    return replace(cut, keep=torch.cat([gone[position : position + 1], cut.keep]).sort().values)


@pytest.mark.parametrize("mutate", [swapped, forgotten])
def test_a_wrong_index_is_noticed(
    resnet: tuple[nn.Module, torch.Tensor], mutate: Callable[[Cut, int], Cut]
) -> None:
    model, x = resnet
    options = PruneOptions(method=PruneMethod.RANDOM, scope=Scope.LOCAL)
    plan = plan_thinning(model, (x[:1],), options).plan
    assert plan_difference(model, x, plan) < TOLERANCE

    def noticed(name: str, number: int, position: int) -> bool:
        cuts = list(plan.tensors[name])
        cuts[number] = mutate(cuts[number], position)
        mutated = replace(plan, tensors={**plan.tensors, name: tuple(cuts)})
        return plan_difference(model, x, mutated) > 1e-6

    targets = [(name, number) for name, cuts in plan.tensors.items() for number in range(len(cuts))]
    assert len(targets) > 100
    for name, number in targets[::4]:
        # two channels that ReLU silences for this input may be exchanged unnoticed, so that several are tried
        assert any(noticed(name, number, position) for position in range(6)), (name, number)
