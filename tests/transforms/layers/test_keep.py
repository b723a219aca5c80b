"""Which coefficients stay: exact counts, ties, boxes, and the order that reconstruction errors ask for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cctool.options.prune.choices import Scope
from cctool.options.transform.choices import Select
from cctool.options.transform.options import WeightOptions
from cctool.transforms.layers.axes import TransformedAxis
from cctool.transforms.layers.build import coefficient_layer
from cctool.transforms.layers.coefficients import CoefficientLayer, Coefficients
from cctool.transforms.layers.keep import above, chosen, corner, largest, magnitudes
from cctool.transforms.layers.which import transformed_axes


def coded(kernel: str, out: int = 6, features: int = 10, seed: int = 0, **options: Any) -> CoefficientLayer:
    layer = nn.Linear(features, out)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    given: dict[str, Any] = {"axes": None, "block": None, "levels": None} | options
    return coefficient_layer(layer, Coefficients(axes=transformed_axes(layer.weight, kernel, **given)))


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.25, 0.29, 0.5, 0.999])
def test_exactly_so_many_stay_and_they_are_the_largest(keep: float) -> None:
    sizes = torch.rand(10, 10, dtype=torch.float64)
    mask = largest({"a": sizes}, keep)["a"]
    assert int(mask.sum()) == max(1, math.floor(100 * keep + 1e-9))
    assert sizes[mask].min() > sizes[~mask].max()


def test_of_equal_coefficients_the_first_stay() -> None:
    mask = largest({"a": torch.ones(4, 3, dtype=torch.float64)}, 0.5)["a"]
    assert mask.flatten().tolist() == [True] * 6 + [False] * 6


def test_layers_compete_where_that_is_asked_for_and_none_is_emptied() -> None:
    sizes = {"a": torch.arange(1.0, 11).double(), "b": torch.arange(101.0, 111).double()}
    apart = largest(sizes, 0.5)
    assert [int(mask.sum()) for mask in apart.values()] == [5, 5]
    together = largest(sizes, 0.5, together=True)
    assert [int(mask.sum()) for mask in together.values()] == [1, 9]
    assert together["a"].nonzero().flatten().tolist() == [9]


def test_a_threshold_keeps_what_reaches_it_and_the_largest_always() -> None:
    sizes = torch.tensor([[0.1, 0.2], [0.3, 0.0]], dtype=torch.float64)
    assert above(sizes, 0.2).tolist() == [[False, True], [True, False]]
    assert above(sizes, 9).tolist() == [[False, False], [True, False]]


def test_biorthogonal_coefficients_are_ranked_by_what_leaving_one_out_costs() -> None:
    layer = coded("bior2.2", 8, 8)
    found = magnitudes(layer)
    weight = layer.weight.detach().double()
    for place in ((0, 0), (3, 5), (7, 7), (2, 6)):
        other = coefficient_layer(nn.Linear(8, 8), layer.arguments)
        with torch.no_grad():
            other.coefficients.copy_(layer.coefficients)
            other.coefficients[place] = 0
        error = torch.linalg.vector_norm(weight - other.weight.detach())
        assert float(found[place]) == pytest.approx(float(error), rel=1e-4)
    # The order differs from that of the coefficients themselves, or nothing was tested.
    plain = layer.coefficients.detach().abs().flatten()
    assert found.flatten().argsort().tolist() != plain.argsort().tolist()


def axes(*sizes: int, block: int | None = None) -> list[TransformedAxis]:
    return [
        TransformedAxis(dim=i, kernel="dct", size=n, kept=min(n, block or n), block=block)
        for i, n in enumerate(sizes)
    ]


@pytest.mark.parametrize("sizes", [(3, 3), (5, 5), (84, 120), (10, 84), (16, 6, 5, 5), (7,), (64, 1)])
@pytest.mark.parametrize("keep", [0.02, 0.11, 0.25, 0.5, 0.9, 1.0])
def test_a_corner_is_proportional_and_as_large_as_allowed(sizes: tuple[int, ...], keep: float) -> None:
    kept = corner(axes(*sizes), keep)
    limit, volume = keep * math.prod(sizes), math.prod(kept)
    assert volume <= max(limit, 1) + 1e-6
    for i in range(len(sizes)):
        grown = volume // kept[i] * (kept[i] + 1)
        assert kept[i] == sizes[i] or grown > limit
    if min(sizes) > 60:
        shares = [k / n for k, n in zip(kept, sizes, strict=True)]
        assert max(shares) - min(shares) < 0.05
    if keep == 1:
        assert kept == sizes


def test_a_corner_of_blocks_stays_within_its_share_with_the_smaller_last_block() -> None:
    for size, keep in itertools.product((10, 13, 30), (0.1, 0.3, 0.5, 0.77)):
        (kept,) = corner(axes(size, block=4), keep)
        whole, rest = divmod(size, 4)
        total = whole * kept + math.ceil(kept * rest / 4)
        assert total <= keep * size or kept == 1


def options(**given: Any) -> WeightOptions:
    return WeightOptions(**given)


def test_choosing_follows_the_options() -> None:
    names = ("a", "b")
    layers = {name: coded("dct", seed=i) for i, name in enumerate(names)}
    assert chosen(layers, options()) == {}
    assert chosen(layers, options(keep=1.0)) == {}
    energy = chosen(layers, options(keep=0.3))
    assert [int(mask.sum()) for mask in energy.values()] == [18, 18]
    with torch.no_grad():
        layers["b"].coefficients.mul_(100)
    together = chosen(layers, options(keep=0.3, scope=Scope.GLOBAL))
    assert [int(mask.sum()) for mask in together.values()] == [1, 35]
    by_size = chosen(layers, options(threshold=1.0))
    assert int(by_size["a"].sum()) == int((layers["a"].coefficients.abs() >= 1).sum())
    assert chosen({"a": layers["a"]}, options(keep=0.3, select=Select.CORNER)) == {}
    assert layers["a"].coefficients.shape == (3, 6)


def svd_of_rank(weight: Tensor, rank: int) -> np.ndarray[Any, Any]:
    u, s, v = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    found: np.ndarray[Any, Any] = (u[:, :rank] * s[:rank]) @ v[:rank]
    return found


@pytest.mark.parametrize("select", list(Select))
def test_a_klt_of_a_linear_layer_is_its_truncated_svd_bases_counted(select: Select) -> None:
    layer = coded("klt", 20, 30)
    expected = layer.weight.detach().clone()
    masks = chosen({"a": layer}, options(keep=0.4, select=select))
    numbers = 600 * 0.4
    rank = 4
    assert rank * (20 + 30 + 1) <= numbers < (rank + 1) * (20 + 30 + 1)
    assert layer.coefficients.shape == (rank, rank)
    assert layer.get_buffer("basis_0").shape == (20, rank)
    assert layer.get_buffer("basis_1").shape == (30, rank)
    np.testing.assert_allclose(layer.weight.detach().numpy(), svd_of_rank(expected, rank), atol=1e-4)
    if select is Select.ENERGY:
        assert int(masks["a"].sum()) == rank
    else:
        assert masks == {}


def test_klt_layers_compete_and_keep_one_coefficient_each() -> None:
    layers = {name: coded("klt", 20, 30, seed=i) for i, name in enumerate("ab")}
    with torch.no_grad():
        layers["b"].coefficients.mul_(100)
    chosen(layers, options(keep=0.3, scope=Scope.GLOBAL))
    ranks = [layer.coefficients.shape[0] for layer in layers.values()]
    assert ranks[0] == 1
    assert ranks[1] == (600 * 2 * 0.3 - 51) // 51


def test_a_klt_in_blocks_counts_the_columns_of_each() -> None:
    layer = coded("klt", 20, 32, block=8)
    chosen({"a": layer}, options(keep=0.6))
    masked = sum(buffer.numel() for buffer in layer.buffers())
    assert masked < 0.6 * 640
    assert all(axis.kept < 8 for axis in layer.arguments.axes)


def test_a_threshold_on_a_klt_leaves_only_the_columns_that_are_used() -> None:
    layer = coded("klt", 20, 30)
    singular = np.linalg.svd(layer.weight.detach().numpy(), compute_uv=False)
    chosen({"a": layer}, options(threshold=float((singular[4] + singular[5]) / 2)))
    assert layer.coefficients.shape == (5, 5)
