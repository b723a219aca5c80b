"""What all fake quantizers promise: stored levels, state, folds, and inputs that are hardly any."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError, QuantizationError
from cctool.quantization.quantizers.base import Quantizer
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.make import make_quantizer

WEIGHTS: list[dict[str, Any]] = [
    {"method": "uniform", "bits": 2},
    {"method": "uniform", "bits": 8, "axis": 0},
    {"method": "uniform", "bits": 3, "axis": 1, "narrow": True},
    {"method": "uniform", "bits": 4, "symmetric": False, "signed": False},
    {"method": "uniform", "bits": 8, "symmetric": False, "axis": 0, "momentum": 0.9},
    {"method": "uniform", "bits": 16, "momentum": 0.0},
    {"method": "lsq", "bits": 3},
    {"method": "lsq", "bits": 8, "axis": 0},
    {"method": "dorefa", "bits": 1},
    {"method": "dorefa", "bits": 2},
    {"method": "dorefa", "bits": 8},
    {"method": "pact", "bits": 16},
    {"method": "wrpn", "bits": 2},
    {"method": "wrpn", "bits": 9},
    {"method": "apot", "bits": 2},
    {"method": "apot", "bits": 4},
    {"method": "apot", "bits": 8},
]
ACTIVATIONS: list[dict[str, Any]] = [
    {"method": "uniform", "bits": 8, "signed": False, "momentum": 0.9},
    {"method": "uniform", "bits": 8, "symmetric": False},
    {"method": "uniform", "bits": 4, "axis": 1, "momentum": 0.5},
    {"method": "lsq", "bits": 4, "signed": False},
    {"method": "lsq", "bits": 4, "axis": 1},
    {"method": "dorefa", "bits": 2, "signed": False},
    {"method": "pact", "bits": 4, "signed": False},
    {"method": "wrpn", "bits": 3, "signed": False},
]


def label(config: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in config.values())


def made(config: dict[str, Any], x: Tensor, *, weight: bool = True) -> Quantizer:
    axis = config.get("axis")
    channels = None if axis is None else x.shape[axis]
    return make_quantizer(QuantizerConfig(**config), weight=weight, channels=channels)


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits_of(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits_of(a), bits_of(b))


@pytest.mark.parametrize("config", WEIGHTS, ids=label)
@given(
    st.integers(0, 10_000),
    st.sampled_from([1e-20, 1e-3, 0.3, 5.0, 1e4]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=25, deadline=None)
def test_the_settled_weight_quantizes_to_the_same_bits(
    config: dict[str, Any], seed: int, size: float, folded: bool, after_training: bool, dtype: torch.dtype
) -> None:
    weight = (randoms(4, 3, 2, seed=seed) * size).to(dtype)
    weight[1] *= 1e-3
    fold = randoms(4, seed=seed + 1) * 10 if folded else None
    if fold is not None:
        fold[seed % 4] = 0
    quantizer = made(config, weight)
    quantizer.initialise(weight, fold)
    if after_training:
        quantizer(weight, fold)
    quantizer.eval()
    expected = quantizer(weight, fold)
    indices, table = quantizer.levels(weight, fold)
    settled = quantizer.settled(weight, fold)
    assert same(quantizer(settled, fold), expected)
    assert same(quantizer.settled(settled, fold), settled)
    assert torch.equal(quantizer.levels(settled, fold)[0], indices)
    assert table.dtype == torch.float32
    assert table.shape[-1] <= 2 ** config["bits"]
    assert indices.shape == weight.shape
    assert indices.dtype == (torch.uint8 if table.shape[-1] <= 256 else torch.uint16)
    assert torch.isfinite(settled).all()


@pytest.mark.parametrize("config", WEIGHTS, ids=label)
@pytest.mark.parametrize("folded", [False, True])
def test_the_settled_weight_is_the_table_at_the_indices(config: dict[str, Any], folded: bool) -> None:
    weight = randoms(4, 3, 2)
    fold = torch.tensor([1.0, -3.0, 0.0, 0.1]) if folded else None
    quantizer = made(config, weight)
    quantizer.initialise(weight, fold)
    indices, table = quantizer.levels(weight, fold)
    settled = quantizer.settled(weight, fold)
    axis = config.get("axis", 0)
    assert table.dim() == (2 if folded or "axis" in config else 1)
    for at in torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(2)).tolist():
        row = table if table.dim() == 1 else table[at[axis]]
        assert settled[tuple(at)] == row[int(indices[tuple(at)])]


@pytest.mark.parametrize(
    "config", [c for c in WEIGHTS if c["method"] in ("uniform", "lsq", "wrpn")], ids=label
)
def test_levels_of_a_grid_are_stored_as_they_are(config: dict[str, Any]) -> None:
    weight = randoms(4, 3, 2)
    quantizer = made(config, weight)
    quantizer.initialise(weight)
    assert same(quantizer.settled(weight), quantizer(weight))


@pytest.mark.parametrize("config", WEIGHTS, ids=label)
def test_training_on_from_the_settled_weight_starts_where_it_stopped(config: dict[str, Any]) -> None:
    for weight in (randoms(4, 3, 2), torch.zeros(4, 3, 2)):
        quantizer = made(config, weight)
        quantizer.initialise(weight)
        expected = quantizer(weight)
        assert torch.allclose(quantizer(quantizer.settled(weight)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", WEIGHTS, ids=label)
def test_a_fold_puts_the_folded_weight_on_the_grid(config: dict[str, Any]) -> None:
    weight, fold = randoms(4, 3, 2), torch.tensor([0.5, -2.0, 0.0, 30.0])
    quantizer = made(config, weight)
    quantizer.initialise(weight, fold)
    quantizer.eval()
    found = quantizer(weight, fold)
    if "axis" in config:
        assert same(found, quantizer(weight))
        return
    for channel, factor in enumerate(fold.tolist()):
        alone = quantizer(weight[channel] * (factor or 1)) / (factor or 1)
        assert same(found[channel], alone)
    assert same(quantizer(weight, fold.view(4, 1, 1)), found)
    assert not same(found, quantizer(weight))


@pytest.mark.parametrize("config", [c for c in WEIGHTS if "axis" not in c], ids=label)
def test_a_fold_may_run_along_another_dimension(config: dict[str, Any]) -> None:
    weight, fold = randoms(3, 4, 2), torch.tensor([0.5, -2.0, 0.0, 30.0])
    quantizer = made(config, weight)
    quantizer.initialise(weight.transpose(0, 1), fold)
    quantizer.eval()
    sideways, upright = fold.view(1, 4, 1), weight.transpose(0, 1).contiguous()
    assert same(quantizer(weight, sideways).transpose(0, 1), quantizer(upright, fold))
    assert same(quantizer.settled(weight, sideways).transpose(0, 1), quantizer.settled(upright, fold))


def test_a_fold_leaves_the_gradient_of_the_weight() -> None:
    weight = randoms(4, 3).requires_grad_()
    quantizer = made({"method": "uniform", "bits": 4}, weight)
    fold = torch.tensor([0.5, -2.0, 0.0, 3.0])
    quantizer.initialise(weight, fold)
    quantizer(weight, fold).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, torch.ones(4, 3))


@pytest.mark.parametrize("config", WEIGHTS, ids=label)
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 2),
        torch.tensor([[0.0, 0.0], [1.0, -2.0], [0.0, 0.0]]),
        torch.full((3, 2), 0.7),
        torch.full((3, 2), -0.7),
        torch.tensor([[0.3]]),
        torch.full((1, 1), 1e-45),
        torch.full((2, 2), 1e38),
        torch.zeros(0, 2),
        torch.zeros(3, 0),
    ],
    ids=["zeros", "zero-channels", "constant", "negative", "single", "denormal", "huge", "empty", "hollow"],
)
def test_hardly_any_weights_stay_numbers(config: dict[str, Any], weight: Tensor) -> None:
    weight = weight.clone().requires_grad_()
    quantizer = made(config, weight)
    quantizer.initialise(weight)
    found = quantizer(weight)
    assert found.shape == weight.shape
    found.sum().backward()
    grads = [weight.grad, *(p.grad for p in quantizer.parameters() if weight.numel())]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
    quantizer.check()
    quantizer.eval()
    assert torch.isfinite(quantizer(weight)).all()
    assert same(quantizer(quantizer.settled(weight)), quantizer(weight))


@pytest.mark.parametrize("config", [c for c in WEIGHTS if c["method"] in ("uniform", "lsq", "wrpn", "apot")])
def test_zeros_stay_zeros(config: dict[str, Any]) -> None:
    weight = torch.zeros(3, 2)
    quantizer = made(config, weight)
    quantizer.initialise(weight)
    assert not quantizer(weight).any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("config", [c for c in WEIGHTS if c["method"] in ("uniform", "apot")], ids=label)
def test_constants_come_back(config: dict[str, Any], sign: int) -> None:
    weight = torch.full((3, 2), 0.7 * sign)
    quantizer = made(config, weight)
    quantizer.initialise(weight)
    assert torch.allclose(quantizer(weight), weight, rtol=1e-6)


@pytest.mark.parametrize("config", ACTIVATIONS, ids=label)
@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 3, 4), torch.full((2, 3, 4), 5.0), torch.zeros(0, 3, 4), randoms(1, 1, 1), randoms(2, 3)],
    ids=["zeros", "constant", "empty", "single", "flat"],
)
def test_hardly_any_activations_stay_numbers(config: dict[str, Any], x: Tensor) -> None:
    x = x.clone().requires_grad_()
    quantizer = made(config, x, weight=False)
    quantizer.initialise(x)
    found = quantizer(x)
    found.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    quantizer.eval()
    assert same(quantizer(x), found.detach())
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("config", ACTIVATIONS, ids=label)
def test_activations_of_evaluation_lie_on_the_grid(config: dict[str, Any]) -> None:
    x = randoms(4, 3, 5)
    quantizer = made(config, x, weight=False)
    quantizer.initialise(x)
    quantizer(x)
    quantizer.eval()
    grid = quantizer.grid()
    assert grid is not None
    assert same(grid.nearest(x), quantizer(x))
    assert same(grid.values(grid.integers(x)), quantizer(x))


@pytest.mark.parametrize("weight", [True, False])
def test_a_file_is_loaded_into_a_fresh_quantizer(weight: bool) -> None:
    for config in WEIGHTS if weight else ACTIVATIONS:
        x = randoms(4, 3, 2)
        quantizer = made(config, x, weight=weight)
        quantizer.initialise(x)
        quantizer(x)
        fresh = made(QuantizerConfig(**config).model_dump(), x, weight=weight)
        fresh.load_state_dict(quantizer.state_dict())
        fresh.eval()
        assert same(fresh(x), quantizer.eval()(x))
        assert same(copy.deepcopy(fresh)(x), fresh(x))


@pytest.mark.parametrize("config", [c for c in WEIGHTS if "axis" in c], ids=label)
def test_a_cut_keeps_what_the_kept_slices_become(config: dict[str, Any]) -> None:
    weight, axis = randoms(4, 3, 2), config["axis"]
    quantizer = made(config, weight)
    quantizer.initialise(weight)
    quantizer(weight.clone().requires_grad_()).sum().backward()
    quantizer.eval()
    kept = torch.tensor([2, 0])
    expected = quantizer(weight).index_select(axis, kept)
    gradients = {name: p.grad[kept] for name, p in quantizer.named_parameters()}
    quantizer.taken(kept)
    assert quantizer.channels == 2
    assert same(quantizer(weight.index_select(axis, kept)), expected)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in quantizer.named_parameters())
    assert {tuple(value.shape) for value in quantizer.state_dict().values()} == {(2,)}


@pytest.mark.parametrize("config", [c for c in WEIGHTS if "axis" not in c], ids=label)
def test_a_cut_changes_nothing_where_there_is_one_scale(config: dict[str, Any]) -> None:
    weight = randoms(4, 3)
    quantizer = made(config, weight)
    quantizer.initialise(weight)
    quantizer(weight)
    quantizer.eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    expected = quantizer(weight)[1:3]
    quantizer.taken(torch.tensor([1, 2]))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert same(quantizer(weight[1:3]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_computed_in_float32_or_float64_and_kept(dtype: torch.dtype) -> None:
    for config, weight in [*((c, True) for c in WEIGHTS), *((c, False) for c in ACTIVATIONS)]:
        x = randoms(4, 3, 2).to(dtype).requires_grad_()
        quantizer = made(config, x, weight=weight)
        quantizer.initialise(x)
        found = quantizer(x)
        assert found.dtype == dtype
        found.sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == dtype
        if dtype != torch.float64:
            assert torch.equal(found, quantizer(x.float()).to(dtype))


def test_nan_stays_nan() -> None:
    x = torch.tensor([[0.5, float("nan")]])
    for config in ACTIVATIONS:
        quantizer = made(config, x, weight=False)
        quantizer.eval()
        assert quantizer(x).isnan().tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("config", "weight", "channels", "reason"),
    [
        ({"method": "apot", "bits": 4}, False, None, "does not quantize activations"),
        ({"method": "dorefa", "bits": 4, "signed": False}, True, None, "set signed=True"),
        ({"method": "pact", "bits": 4}, False, None, "set signed=False"),
        ({"method": "uniform", "bits": 4, "axis": 0}, True, None, "axis 0 with None channels"),
        ({"method": "uniform", "bits": 4}, True, 3, "axis None with 3 channels"),
        ({"method": "uniform", "bits": 4, "axis": 0}, True, -1, "0 or more"),
    ],
)
def test_what_cannot_be_is_not_made(
    config: dict[str, Any], weight: bool, channels: int | None, reason: str
) -> None:
    with pytest.raises(QuantizationError, match=reason):
        make_quantizer(QuantizerConfig(**config), weight=weight, channels=channels)


def test_activations_have_no_folds_or_stored_levels() -> None:
    x = randoms(2, 3)
    quantizer = made({"method": "lsq", "bits": 4}, x, weight=False)
    with pytest.raises(QuantizationError, match="folded into weights"):
        quantizer(x, torch.ones(2))
    with pytest.raises(QuantizationError, match="only a weight's levels"):
        quantizer.levels(x)


def test_fixed_ranges_take_none_from_calibration() -> None:
    for config, weight in [*((c, True) for c in WEIGHTS), *((c, False) for c in ACTIVATIONS)]:
        x = randoms(4, 3, 2)
        quantizer = made(config, x, weight=weight)
        quantizer.initialise(x)
        before = [value.clone() for value in quantizer.state_dict().values()]
        ends = torch.full(() if quantizer.channels is None else (quantizer.channels,), 7.0)
        if quantizer.has_range:
            quantizer.set_range(-ends, ends)
            after = quantizer.state_dict().values()
            assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        else:
            with pytest.raises(QuantizationError, match="not calibrated"):
                quantizer.set_range(-ends, ends)


@pytest.mark.parametrize("method", ["lsq", "apot"])
def test_learned_state_that_is_not_finite_is_refused(method: str) -> None:
    quantizer = made({"method": method, "bits": 4}, randoms(2, 2))
    quantizer.check()
    next(quantizer.parameters()).data.fill_(float("nan"))
    with pytest.raises(CorruptCheckpointError, match="not finite"):
        quantizer.check()


def test_the_repr_names_what_is_not_default() -> None:
    quantizer = made({"method": "uniform", "bits": 4, "axis": 0}, randoms(2, 2))
    assert repr(quantizer) == "UniformQuantizer(method=uniform, bits=4, axis=0)"


@pytest.mark.cuda
def test_values_gradients_and_state_on_cuda_are_the_cpus() -> None:
    for config, weight in [*((c, True) for c in WEIGHTS), *((c, False) for c in ACTIVATIONS)]:
        x, upstream = randoms(4, 3, 6), randoms(4, 3, 6, seed=1)
        found = []
        for device in ("cpu", "cuda"):
            quantizer = made(config, x, weight=weight).to(device)
            mine = x.clone().to(device).requires_grad_()
            quantizer.initialise(mine)
            y = quantizer(mine)
            (y * upstream.to(device)).sum().backward()
            assert mine.grad is not None
            values = [
                y,
                mine.grad,
                *quantizer.state_dict().values(),
                *(p.grad for p in quantizer.parameters()),
            ]
            if weight:
                values += quantizer.levels(mine)
            found.append([value.detach().cpu().double() for value in values])
        for here, there in zip(*found, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
