"""Criteria that look at images, against autograd and activations by hand and Torch-Pruning's formulas."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cctool.base.errors import PruningError, UsageError
from cctool.graph.channels import couple
from cctool.options.prune.choices import NEEDS_DATA, Normalize, PruneMethod, Reduce
from cctool.pruning.scores.evidence import Evidence, gather
from cctool.pruning.scores.units import SCORES, Unscored, score_context
from cctool.pruning.scores.weights import SALIENCIES, weight_saliency
from criteria_toys import Chain, Residual, batches, gradient_of, images

METHODS = sorted(NEEDS_DATA)


def evidence(model: nn.Module, x: Tensor, y: Tensor, method: PruneMethod, size: int = 4) -> Evidence:
    return gather(model, batches(x, y, size), len(x), method, loss=F.cross_entropy)


def scored(model: nn.Module, found: Evidence, number: int = 0, **how: Any) -> Tensor:
    x = torch.randn(1, 3, 6, 6, dtype=next(model.parameters()).dtype)
    family = couple(model, (x,)).families[number]
    how.setdefault("normalize", Normalize.NONE)
    result = SCORES[found.method](family, score_context(model, evidence=found), **how)
    assert isinstance(result, Tensor)
    return result


def arriving(model: nn.Module, x: Tensor, *names: str) -> list[Tensor]:
    """What reaches the named modules, by hooks: no code under test."""
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        for name in names
    ]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return seen


# ---- first order -----------------------------------------------------------------------------------------
def test_taylor_equals_autograd_by_hand_image_by_image() -> None:
    model, (x, y) = Chain(batch_norm=True).double().eval(), images(dtype=torch.float64)
    expected = torch.zeros(6, dtype=torch.float64)
    for n in range(len(x)):
        gradient = gradient_of(model, x[n : n + 1], y[n : n + 1])["conv2.weight"]
        expected += (gradient * model.conv2.weight.detach()).sum((0, 2, 3)).square() / len(x)
    torch.testing.assert_close(scored(model, evidence(model, x, y, PruneMethod.TAYLOR)), expected)


def test_taylor_is_the_gate_behind_batch_norm() -> None:
    """Molchanov et al. 2019 set a gate z = 1 behind each batch norm; (dL/dz)^2 is the importance."""
    model, (x, y) = Chain(batch_norm=True).double().eval(), images(dtype=torch.float64)
    expected = torch.zeros(6, dtype=torch.float64)
    for n in range(len(x)):
        gate = torch.ones(1, 6, 1, 1, dtype=torch.float64, requires_grad=True)
        handle = model.bn1.register_forward_hook(lambda _, args, out, gate=gate: out * gate)
        (found,) = torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), gate)
        handle.remove()
        expected += found.flatten().square() / len(x)
    torch.testing.assert_close(scored(model, evidence(model, x, y, PruneMethod.TAYLOR)), expected)


def test_taylor_predicts_what_a_unit_costs_to_first_order() -> None:
    model, (x, y) = Residual().double().eval(), images(1, dtype=torch.float64)
    found = scored(model, evidence(model, x, y, PruneMethod.TAYLOR))
    base, step = F.cross_entropy(model(x), y), 1e-6
    for unit in range(4):
        shrunk = copy.deepcopy(model)
        with torch.no_grad():
            shrunk.conv.weight[:, unit] *= 1 - step
            shrunk.fc.weight[:, 4 * unit : 4 * unit + 4] *= 1 - step
        change = (F.cross_entropy(shrunk(x), y) - base).detach() / step
        assert change.square().item() == pytest.approx(found[unit].item(), rel=1e-3, abs=1e-9)


def residual_contributions(model: Residual, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[images, units] of each reader of the sum: the block's convolution, and fc with four columns a unit."""
    by_conv, by_fc = [], []
    for n in range(len(x)):
        gradient = gradient_of(model, x[n : n + 1], y[n : n + 1])
        by_conv.append((gradient["conv.weight"] * model.conv.weight.detach()).sum((0, 2, 3)))
        by_fc.append((gradient["fc.weight"] * model.fc.weight.detach()).sum(0).view(4, 4).sum(1))
    return torch.stack(by_conv), torch.stack(by_fc)


def test_taylor_reduces_over_the_layers_that_read_a_residual_sum() -> None:
    model, (x, y) = Residual().double().eval(), images(dtype=torch.float64)
    conv, fc = residual_contributions(model, x, y)
    found = evidence(model, x, y, PruneMethod.TAYLOR)
    first, second = conv.square().mean(0), fc.square().mean(0)
    expected = {
        None: (conv + fc).square().mean(0),
        Reduce.SUM: first + second,
        Reduce.MEAN: (first + second) / 2,
        Reduce.MAX: torch.maximum(first, second),
        Reduce.FIRST: first,
    }
    for reduce, values in expected.items():
        torch.testing.assert_close(scored(model, found, reduce=reduce), values)


# ---- second order ----------------------------------------------------------------------------------------
def test_hessian_equals_autograd_by_hand_image_by_image() -> None:
    model, (x, y) = Residual().double().eval(), images(dtype=torch.float64)
    expected = {name: torch.zeros(4, dtype=torch.float64) for name in ("stem.weight", "conv.weight")}
    for n in range(len(x)):
        gradient = gradient_of(model, x[n : n + 1], y[n : n + 1])
        for name in expected:
            weight = model.get_parameter(name).detach()
            expected[name] += (gradient[name] * weight).square().sum((1, 2, 3)) / (2 * len(x))
    found = evidence(model, x, y, PruneMethod.HESSIAN)
    torch.testing.assert_close(scored(model, found), expected["stem.weight"] + expected["conv.weight"])
    torch.testing.assert_close(scored(model, found, reduce=Reduce.FIRST), expected["stem.weight"])
    maximum = torch.maximum(expected["stem.weight"], expected["conv.weight"])
    torch.testing.assert_close(scored(model, found, reduce=Reduce.MAX), maximum)


def test_the_fisher_diagonal_is_the_hessians_where_labels_follow_the_network() -> None:
    """A softmax whose rows are equal gives every class 1/K; with each label once, both diagonals agree."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    with torch.no_grad():
        model.weight.copy_(model.weight[:1].expand(3, 5))
        model.bias.zero_()
    x = torch.randn(2, 5, dtype=torch.float64).repeat_interleave(3, dim=0)
    y = torch.arange(3).repeat(2)

    def loss(weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, model.bias.detach()), y)

    hessian = torch.autograd.functional.hessian(loss, model.weight.detach()).reshape(15, 15)
    found = evidence(model, x, y, PruneMethod.HESSIAN)
    torch.testing.assert_close(found.squares["weight"].flatten(), hessian.diagonal())


def test_one_image_scores_as_in_torch_pruning() -> None:
    tp = pytest.importorskip("torch_pruning")
    model, (x, y) = Chain().eval(), images(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
        group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=list(range(6)))
        F.cross_entropy(model(x), y).backward()
        # `gate` takes the last tensor of the group, the layer that reads
        taylor = tp.importance.GroupTaylorImportance("gate", normalizer=None, multivariable=True)(group)
        hessian = tp.importance.GroupHessianImportance("first", normalizer=None)
        hessian.accumulate_grad(model)
        second = hessian(group).detach()
    model.zero_grad()
    found = scored(model, evidence(model, x, y, PruneMethod.TAYLOR))
    torch.testing.assert_close(found.float(), taylor.detach().square())
    found = scored(model, evidence(model, x, y, PruneMethod.HESSIAN))
    torch.testing.assert_close(found, second / 2)  # theirs leaves the half out


# ---- gradient, activations -------------------------------------------------------------------------------
def test_gradient_is_the_mean_magnitude_of_the_mean_gradient() -> None:
    model, (x, y) = Residual().double().eval(), images(dtype=torch.float64)
    gradient = gradient_of(model, x, y)
    first, second = (gradient[name].abs().mean((1, 2, 3)) for name in ("stem.weight", "conv.weight"))
    found = evidence(model, x, y, PruneMethod.GRADIENT, size=3)
    torch.testing.assert_close(scored(model, found), (first + second) / 2)
    torch.testing.assert_close(scored(model, found, reduce=Reduce.FIRST), first)
    mean = (first + second) / 2
    torch.testing.assert_close(scored(model, found, normalize=None), mean / mean.mean())


@pytest.mark.parametrize("method", [PruneMethod.APOZ, PruneMethod.ACTIVATION])
def test_activations_are_those_behind_the_nonlinearity(method: PruneMethod) -> None:
    model, (x, y) = Residual().eval(), images()
    at_conv, at_fc = arriving(model, x, "conv", "fc")
    pooled = at_fc.view(len(x), 4, 4)

    def statistic(values: Tensor) -> "np.ndarray[Any, Any]":
        values = (values != 0) if method is PruneMethod.APOZ else values
        return values.double().flatten(2).mean((0, 2)).numpy()

    first, second = statistic(at_conv), statistic(pooled)
    assert (at_conv == 0).any()
    found = evidence(model, x, y, method)
    np.testing.assert_allclose(scored(model, found), (first + second) / 2, rtol=1e-6)
    np.testing.assert_allclose(scored(model, found, reduce=Reduce.FIRST), first, rtol=1e-6)
    np.testing.assert_allclose(scored(model, found, reduce=Reduce.MAX), np.maximum(first, second), rtol=1e-6)


def test_dead_units_go_first_by_zeros_and_by_activation() -> None:
    model, (x, y) = Chain(batch_norm=True).eval(), images()
    with torch.no_grad():
        model.bn1.bias[2] = -100
    for method in (PruneMethod.APOZ, PruneMethod.ACTIVATION, PruneMethod.TAYLOR):
        found = scored(model, evidence(model, x, y, method))
        assert found.argmin() == 2
        assert found[2] == 0


def test_zeros_do_not_rank_what_is_never_zero() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Conv2d(6, 2, 1), nn.Flatten()).eval()
    x, y = images()
    found = evidence(model, x, y, PruneMethod.APOZ)
    result = SCORES[PruneMethod.APOZ](couple(model, (x[:1],)).families[0], score_context(model, 0, found))
    assert isinstance(result, Unscored)
    assert "--method activation" in result.reason


# ---- laws ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(6)))
def test_permuted_units_have_permuted_scores(method: PruneMethod, order: list[int]) -> None:
    model, (x, y) = Chain(batch_norm=True).double().eval(), images(6, dtype=torch.float64)
    before = scored(model, evidence(model, x, y, method))
    with torch.no_grad():
        for tensor in (model.conv1.weight, model.conv1.bias, *model.bn1.state_dict().values()):
            if tensor.ndim:
                tensor.copy_(tensor[order])
        model.conv2.weight.copy_(model.conv2.weight[:, order])
    torch.testing.assert_close(scored(model, evidence(model, x, y, method)), before[order])


@pytest.mark.parametrize(
    ("method", "power"),
    [(PruneMethod.TAYLOR, 0), (PruneMethod.HESSIAN, 0), (PruneMethod.GRADIENT, -1), (PruneMethod.APOZ, 0),
     (PruneMethod.ACTIVATION, 1)],
)  # fmt: skip
@settings(max_examples=4, deadline=None)
@given(scale=st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_the_same_function_in_another_scale(method: PruneMethod, power: int, scale: float) -> None:
    """conv1 times c and conv2 over c compute the same: changes of the loss must not see it."""
    model, (x, y) = Chain().double().eval(), images(6, dtype=torch.float64)
    before = scored(model, evidence(model, x, y, method))
    with torch.no_grad():
        model.conv1.weight.mul_(scale)
        model.conv1.bias.mul_(scale)
        model.conv2.weight.div_(scale)
    torch.testing.assert_close(scored(model, evidence(model, x, y, method)), before * scale**power)


# ---- single weights --------------------------------------------------------------------------------------
def saliency(method: PruneMethod, name: str, weight: Tensor, found: Evidence | None = None) -> Any:
    return weight_saliency(method, name, weight, found, torch.Generator().manual_seed(0))


def test_every_method_has_a_saliency_or_says_why_not() -> None:
    assert set(SALIENCIES) == set(PruneMethod)
    model, (x, y) = Chain().eval(), images()
    for method in PruneMethod:
        found = evidence(model, x, y, method) if method in NEEDS_DATA else None
        result = saliency(method, "conv2.weight", model.conv2.weight, found)
        whole = {PruneMethod.SLIMMING, PruneMethod.FPGM, PruneMethod.APOZ, PruneMethod.ACTIVATION}
        if method in whole:
            assert isinstance(result, Unscored)
            assert method.value in result.reason
        else:
            assert result.shape == model.conv2.weight.shape
            assert not result.requires_grad


def test_saliencies_equal_the_formulas() -> None:
    model, (x, y) = Chain().double().eval(), images(dtype=torch.float64)
    weight = model.conv2.weight.detach()
    single = [gradient_of(model, x[n : n + 1], y[n : n + 1])["conv2.weight"] for n in range(len(x))]
    mean, square = sum(single) / len(x), sum(g.square() for g in single) / len(x)  # type: ignore[union-attr]
    flat = weight.flatten().square().numpy()
    expected = {
        PruneMethod.L1: weight.abs(),
        PruneMethod.L2: weight.abs(),
        PruneMethod.TAYLOR: (mean * weight).abs(),
        PruneMethod.GRADIENT: torch.as_tensor(mean).abs(),
        PruneMethod.HESSIAN: square * weight.square() / 2,
        PruneMethod.LAMP: torch.tensor([v / flat[flat >= v].sum() for v in flat]).view_as(weight),
    }
    for method, values in expected.items():
        found = evidence(model, x, y, method) if method in NEEDS_DATA else None
        torch.testing.assert_close(saliency(method, "conv2.weight", weight, found), values)
    draws = saliency(PruneMethod.RANDOM, "conv2.weight", weight)
    assert torch.equal(draws, saliency(PruneMethod.RANDOM, "conv2.weight", weight))


def test_saliency_without_evidence_or_gradient_says_so() -> None:
    model, (x, y) = Chain().eval(), images()
    with pytest.raises(UsageError, match="--data"):
        saliency(PruneMethod.TAYLOR, "conv2.weight", model.conv2.weight)
    found = evidence(model, x, y, PruneMethod.GRADIENT)
    with pytest.raises(UsageError, match="evidence of gradient"):
        saliency(PruneMethod.TAYLOR, "conv2.weight", model.conv2.weight, found)
    assert isinstance(saliency(PruneMethod.GRADIENT, "other.weight", model.conv2.weight, found), Unscored)


def test_evidence_of_another_network_is_refused() -> None:
    model, (x, y) = Chain().eval(), images()
    other = Chain().eval()
    other.conv1, other.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
    for method in METHODS:
        with pytest.raises(PruningError, match="another network"):
            scored(other, evidence(model, x, y, method))
