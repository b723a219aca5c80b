"""Zeros put in by hand, counted at every granularity."""

import math

import pytest
import torch
from torch import nn

from cctool.analysis.sparsity import NonFinite, nonfinite, sparsity


def filled(module: nn.Module, name: str = "weight") -> nn.Module:
    with torch.no_grad():
        getattr(module, name).fill_(2.0)
    return module


def test_convolution_at_every_granularity() -> None:
    layer = filled(nn.Conv2d(4, 8, 3, bias=False))
    with torch.no_grad():
        layer.weight[0] = 0  # one of 8 filters, and with it 4 of 32 kernels
        layer.weight[:, 1] = 0  # one of 4 channels: 8 kernels, one of them zero already; 9 of 36 columns
        layer.weight[2, 2, 0, 0] = 0  # one more element
    (found,) = sparsity(layer)
    zeros = 36 + 7 * 9 + 1
    assert found.nnz_dense == 288
    assert found.nnz_sparse == 288 - zeros
    assert found.filters_3d == found.rows == pytest.approx(100 / 8)
    assert found.channels == pytest.approx(100 / 4)
    assert found.kernels_2d == pytest.approx(100 * 11 / 32)
    assert found.cols == pytest.approx(100 * 9 / 36)
    assert found.fine == pytest.approx(100 * zeros / 288)


def test_channels_of_a_grouped_convolution_belong_to_their_group() -> None:
    layer = filled(nn.Conv2d(8, 4, 1, groups=2, bias=False))
    with torch.no_grad():
        layer.weight[2:, 3] = 0  # input channel 7: the fourth of the second group
    (found,) = sparsity(layer)
    assert found.channels == pytest.approx(100 / 8)
    assert found.cols == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_is_seen_by_output_channel(groups: int) -> None:
    layer = filled(nn.ConvTranspose2d(4, 8, 2, groups=groups, bias=False))
    with torch.no_grad():
        layer.weight[:, 0] = 0  # output channel 0 of each group
    (found,) = sparsity(layer)
    assert found.filters_3d == pytest.approx(100 * groups / 8)
    assert found.channels == 0


def test_linear_layer_has_rows_and_columns_only() -> None:
    layer = filled(nn.Linear(5, 4))
    with torch.no_grad():
        layer.weight[1] = 0
        layer.weight[:, 2] = 0
    (found,) = sparsity(layer)
    assert (found.rows, found.cols) == (25.0, 20.0)
    assert (found.channels, found.kernels_2d, found.filters_3d) == (None, None, None)


def test_statistics_match_torch() -> None:
    layer = nn.Conv2d(3, 5, 3)
    (found,) = sparsity(layer)
    value = layer.weight.detach().double()
    assert found.std == pytest.approx(float(value.std()))
    assert found.mean == pytest.approx(float(value.mean()))
    assert found.abs_mean == pytest.approx(float(value.abs().mean()))


def test_weights_are_listed_once_and_vectors_not_at_all() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4))
    assert [tensor.name for tensor in sparsity(model)] == ["0.weight", "2.weight"]


def test_faults_are_named_and_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
        model[1].running_var[:] = math.inf
    assert nonfinite(model) == (NonFinite("0.weight", 1, 0, 6), NonFinite("1.running_var", 0, 2, 2))
    (found,) = sparsity(model)
    assert found.nnz_sparse == 6
    assert math.isnan(found.mean)


def test_a_sound_network_has_no_faults() -> None:
    assert nonfinite(nn.Linear(3, 2)) == ()
