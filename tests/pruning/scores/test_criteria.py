"""Criteria that look at weights alone, each against a formula of its own or Torch-Pruning's."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from cctool.base.errors import PruningError, UsageError
from cctool.graph.channels import ChannelGraph, Family, Place, couple
from cctool.graph.ledger import Role
from cctool.options.prune.choices import Normalize, PruneMethod, Reduce, Scope
from cctool.options.prune.options import PruneOptions
from cctool.pruning.scores.criteria import lamp
from cctool.pruning.scores.units import (
    NORMALIZERS,
    REDUCTIONS,
    SCORES,
    Unscored,
    score_context,
    score_families,
)
from cctool.pruning.select.order import select
from criteria_toys import Chain, Residual

X = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
WEIGHTS_ALONE = [
    PruneMethod.SLIMMING, PruneMethod.L1, PruneMethod.L2, PruneMethod.FPGM, PruneMethod.LAMP,
]  # fmt: skip


def scores(model: nn.Module, method: PruneMethod, number: int = 0, **how: Any) -> Tensor:
    found = SCORES[method](couple(model, (X,)).families[number], score_context(model), **how)
    assert isinstance(found, Tensor)
    return found


def rows(tensor: Tensor) -> "np.ndarray[Any, Any]":
    return tensor.detach().double().flatten(1).numpy()


def test_every_method_reduction_and_normalisation_has_a_function() -> None:
    assert set(SCORES) == set(PruneMethod)
    assert set(REDUCTIONS) == set(Reduce)
    assert set(NORMALIZERS) == set(Normalize)


def lamp_by_hand(squares: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Equation 1 of Lee et al. 2021 as it is written: a sum for each entry."""
    return np.array([s / sum(v for v in squares if v >= s) for s in squares])


def test_norms_distances_and_lamp_equal_numpy_and_scipy() -> None:
    model = Chain()
    filters = rows(model.conv1.weight)
    expected = {
        PruneMethod.L1: np.abs(filters).sum(1),
        PruneMethod.L2: np.linalg.norm(filters, axis=1),
        PruneMethod.FPGM: cdist(filters, filters).sum(1),
        PruneMethod.LAMP: lamp_by_hand((filters**2).sum(1)),
    }
    for method, values in expected.items():
        found = scores(model, method, normalize=Normalize.NONE)
        np.testing.assert_allclose(found.numpy(), values, rtol=1e-5, err_msg=method.value)


def test_distances_of_many_filters_stay_exact_far_from_the_origin() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 300, 3), nn.ReLU(), nn.Conv2d(300, 2, 1))
    with torch.no_grad():
        model[0].weight.mul_(0.01).add_(5)  # products of the raw filters would cancel
    found = scores(model, PruneMethod.FPGM, normalize=Normalize.NONE)
    filters = rows(model[0].weight)
    np.testing.assert_allclose(found.numpy(), cdist(filters, filters).sum(1), rtol=1e-4)


def test_distances_of_a_wide_layer_fit_in_memory() -> None:
    """All differences of 2048 filters of 512 x 3 x 3 would take 77 GB."""
    weight = torch.randn(2048, 512, 3, 3, generator=torch.Generator().manual_seed(0))
    place = Place("w", 0, torch.arange(2048).view(-1, 1), Role.FILTER)
    context = replace(score_context(nn.Identity()), tensors={"w": weight})
    found = SCORES[PruneMethod.FPGM](Family("w", torch.arange(2048), (place,)), context)
    assert isinstance(found, Tensor)
    some, filters = weight[:3].flatten(1).numpy(), weight.flatten(1).numpy()
    expected = cdist(some, filters).sum(1)
    np.testing.assert_allclose(found[:3] / found[0], expected / expected[0], rtol=1e-5)


def test_a_unit_of_several_filters_is_their_sum_or_one_point() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1, groups=2), nn.Conv2d(4, 2, 1))
    filters = rows(model[0].weight)  # unit u holds channels u and u + 4
    pairs = np.stack([np.concatenate([filters[u], filters[u + 4]]) for u in range(4)])
    np.testing.assert_allclose(scores(model, PruneMethod.L2), np.linalg.norm(pairs, axis=1), rtol=1e-5)
    found = scores(model, PruneMethod.FPGM, normalize=Normalize.NONE)
    np.testing.assert_allclose(found, cdist(pairs, pairs).sum(1), rtol=1e-5)


def torch_pruning_scores(model: nn.Module, importance: Any, layer: nn.Module) -> Tensor:
    import torch_pruning as tp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=X)
        width = layer.weight.shape[0]
        group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=list(range(width)))
        return importance(group).detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("method", "importance", "settings_", "power"),
    [
        (PruneMethod.L1, "GroupMagnitudeImportance", {"p": 1}, 1.0),
        # theirs sums squares and takes no root
        (PruneMethod.L2, "GroupMagnitudeImportance", {"p": 2}, 0.5),
        (PruneMethod.LAMP, "LAMPImportance", {"p": 2}, 1.0),
    ],
)
def test_a_plain_chain_scores_as_in_torch_pruning(
    method: PruneMethod, importance: str, settings_: dict[str, Any], power: float
) -> None:
    tp = pytest.importorskip("torch_pruning")
    model = Chain()
    normalizer = {} if method is PruneMethod.LAMP else {"normalizer": None}
    theirs = getattr(tp.importance, importance)(group_reduction="first", **settings_, **normalizer)
    expected = torch_pruning_scores(model, theirs, model.conv1) ** power
    torch.testing.assert_close(scores(model, method), expected)


def test_slimming_and_distances_are_torch_prunings() -> None:
    tp = pytest.importorskip("torch_pruning")
    model = Chain(batch_norm=True)
    theirs = tp.importance.BNScaleImportance(group_reduction="first", normalizer=None)
    expected = torch_pruning_scores(model, theirs, model.conv1)
    torch.testing.assert_close(scores(model, PruneMethod.SLIMMING), expected)
    # theirs takes distances between |w|^p, which are the paper's where p is 1 and no weight is negative
    with torch.no_grad():
        model.conv1.weight.abs_()
    theirs = tp.importance.FPGMImportance(p=1, group_reduction="first", normalizer=None)
    expected = torch_pruning_scores(model, theirs, model.conv1)
    torch.testing.assert_close(scores(model, PruneMethod.FPGM, normalize=Normalize.NONE), expected)


# ---- reduction and normalisation on a residual family ----------------------------------------------------
def by_hand(model: Residual, method: PruneMethod) -> list["np.ndarray[Any, Any]"]:
    """Scores of the two producers of the coupled family, one after the other."""
    if method is PruneMethod.SLIMMING:
        return [norm.weight.detach().abs().double().numpy() for norm in (model.bn1, model.bn2)]
    found = []
    for layer in (model.stem, model.conv):
        filters = rows(layer.weight)
        found.append(
            {
                PruneMethod.L1: np.abs(filters).sum(1),
                PruneMethod.L2: np.linalg.norm(filters, axis=1),
                PruneMethod.FPGM: cdist(filters, filters).sum(1),
                PruneMethod.LAMP: (filters**2).sum(1),
            }[method]
        )
    return found


@pytest.mark.parametrize("method", WEIGHTS_ALONE)
def test_each_reduction_over_the_producers_of_a_residual_sum(method: PruneMethod) -> None:
    model = Residual()
    first, second = by_hand(model, method)
    expected = {
        Reduce.SUM: first + second,
        Reduce.MEAN: (first + second) / 2,
        Reduce.MAX: np.maximum(first, second),
        Reduce.FIRST: first,
    }
    default = {PruneMethod.L2: np.sqrt(first**2 + second**2)}.get(method, expected[Reduce.SUM])
    for reduce, values in [*expected.items(), (None, default)]:
        found = scores(model, method, reduce=reduce, normalize=Normalize.NONE)
        values = lamp_by_hand(values) if method is PruneMethod.LAMP else values
        np.testing.assert_allclose(found.numpy(), values, rtol=1e-5, err_msg=str(reduce))


def test_each_normalisation_by_hand() -> None:
    model = Residual()
    values = np.array(by_hand(model, PruneMethod.SLIMMING)).sum(0)
    expected = {
        Normalize.NONE: values,
        Normalize.MEAN: values / values.mean(),
        Normalize.MAX: values / values.max(),
        Normalize.SUM: values / values.sum(),
        Normalize.STANDARD: (values - values.mean()) / values.std(),
    }
    for normalize, wanted in expected.items():
        found = scores(model, PruneMethod.SLIMMING, normalize=normalize)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6, err_msg=normalize.value)


@pytest.mark.parametrize("normalize", list(Normalize))
def test_normalising_scores_that_are_all_zero_gives_zeros(normalize: Normalize) -> None:
    assert NORMALIZERS[normalize](torch.zeros(4)).tolist() == [0, 0, 0, 0]


def chosen(model: nn.Module, graph: ChannelGraph, **options: Any) -> list[list[bool]]:
    selection = select(model, graph, PruneOptions(**options), score_context(model))
    return [mask.tolist() for mask in selection.kept]


def test_reduce_and_normalize_change_what_goes() -> None:
    model = Residual()
    with torch.no_grad():
        model.bn1.weight.copy_(torch.tensor([1.0, 2, 3, 4]))
        model.bn2.weight.copy_(torch.tensor([9.0, 1, 1, 1]))
    graph = couple(model, (X,))
    by = {reduce: chosen(model, graph, reduce=reduce, rate=0.25) for reduce in Reduce}
    assert by[Reduce.FIRST] == [[False, True, True, True]]
    assert by[Reduce.SUM] == [[True, False, True, True]]

    chain = Chain(batch_norm=True)
    with torch.no_grad():
        chain.bn1.weight.copy_(torch.tensor([1.0, 2, 3, 4, 5, 6]))
        chain.bn2.weight.copy_(torch.tensor([1.0, 2, 3, 4, 5]) * 100)
    graph = couple(chain, (X,))
    kept = {n: chosen(chain, graph, normalize=n, rate=0.45) for n in Normalize}
    assert [sum(mask) for mask in kept[Normalize.NONE]] == [2, 5]
    assert [sum(mask) for mask in kept[Normalize.MEAN]] == [4, 3]
    local = [chosen(chain, graph, normalize=n, rate=0.45, scope=Scope.LOCAL) for n in Normalize]
    assert all(mask == local[0] for mask in local), "within a family normalising ranks nothing anew"


def test_methods_whose_scale_is_the_layers_are_divided_by_its_mean() -> None:
    custom = {method for method in PruneMethod if SCORES[method].normalize is not Normalize.NONE}
    assert custom == {PruneMethod.FPGM, PruneMethod.GRADIENT, PruneMethod.ACTIVATION}
    found = scores(Chain(), PruneMethod.FPGM)
    assert found.mean().item() == pytest.approx(1)


# ---- laws ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", WEIGHTS_ALONE)
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(6)), scale=st.sampled_from([0.125, 0.5, 3.0, 1000.0]))
def test_permuted_units_have_permuted_scores_and_scaled_weights_scaled_ones(
    method: PruneMethod, order: list[int], scale: float
) -> None:
    model = Chain(batch_norm=True)
    before = scores(model, method, normalize=Normalize.NONE)
    with torch.no_grad():
        for parameter in (model.conv1.weight, model.bn1.weight):
            parameter.copy_(parameter[order] * scale)
    after = scores(model, method, normalize=Normalize.NONE)
    factor = 1 if method is PruneMethod.LAMP else scale
    torch.testing.assert_close(after, before[order] * factor, rtol=1e-5, atol=1e-6 * factor)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=12, unique=True))
def test_lamp_keeps_the_order_and_ends_at_one(values: list[float]) -> None:
    squares = torch.tensor(values, dtype=torch.float64)
    found = lamp(squares)
    if squares.max() > 0:
        assert found.max() == 1
        np.testing.assert_allclose(found.numpy(), lamp_by_hand(squares.numpy()), rtol=1e-9)
    order = torch.argsort(squares)
    assert bool((found[order].diff() >= 0).all())


def test_lamp_breaks_ties_by_index() -> None:
    torch.testing.assert_close(lamp(torch.tensor([1.0, 1.0, 2.0])), torch.tensor([1 / 4, 1 / 3, 1.0]))
    assert lamp(torch.zeros(3)).tolist() == [0, 0, 0]


def test_identical_filters_go_first_by_distance_and_by_index() -> None:
    model = Chain()
    with torch.no_grad():
        model.conv1.weight[3].copy_(model.conv1.weight[1])
    found = scores(model, PruneMethod.FPGM)
    assert found[1] == found[3]


def test_scores_that_are_not_finite_are_refused_by_name() -> None:
    model = Chain()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = float("inf")
    for method in (PruneMethod.FPGM, PruneMethod.LAMP, PruneMethod.L2):
        with pytest.raises(PruningError, match="family conv1: scores are not finite"):
            score_families(couple(model, (X,)), PruneOptions(method=method), score_context(model))


def test_a_method_that_looks_at_images_says_how_to_name_them() -> None:
    model = Chain()
    for method in (PruneMethod.TAYLOR, PruneMethod.APOZ):
        with pytest.raises(UsageError, match=f"--method {method.value} .*--data"):
            score_families(couple(model, (X,)), PruneOptions(method=method), score_context(model))


def test_slimming_says_what_ranks_instead() -> None:
    model = Chain()
    found = SCORES[PruneMethod.SLIMMING](couple(model, (X,)).families[0], score_context(model))
    assert isinstance(found, Unscored)
    assert "l1 or l2" in found.reason
