"""Sensitivities against networks whose derivatives are known in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pywt
import scipy.fft
import torch
from torch import Tensor, nn

from cctool.base.errors import TransformError
from cctool.transforms.codec.allocate import MEDIAN, POWER, allocated_steps, measure_sensitivity
from cctool.transforms.codec.calibrate import calibrate
from cctool.transforms.codec.codec import CodecConfig
from cctool.transforms.codec.sites import Site
from cctool.transforms.codec.steps import NEVER, default_table
from cctool.transforms.codec.taps import CalibratedTap, set_taps


class Linear(nn.Module):
    """Tapped maps, then outputs that are a known linear function of them."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.tapped = nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Any:
        maps = self.tapped(x)
        return {"out": torch.einsum("oijk,nijk->no", self.weights, self.relu(maps))}


def tap(kernel: str, shape: tuple[int, int, int], **given: Any) -> CalibratedTap:
    config = CodecConfig(kernel=kernel, table=(4.0,), levels=2, **given)
    bases = {"channels": torch.linalg.qr(torch.randn(shape[0], shape[0])).Q} if config.channel_klt else {}
    return CalibratedTap(config, shape, "", torch.tensor([0.0, 1.0]), bases)


@pytest.mark.parametrize("channel_klt", [False, True])
def test_blocks_against_the_transform_of_the_weights(channel_klt: bool) -> None:
    torch.manual_seed(0)
    weights = torch.randn(3, 2, 8, 12, dtype=torch.float64).float()
    chosen = tap("dct", (2, 8, 12), channel_klt=channel_klt)
    model = Linear(weights)
    found = measure_sensitivity(model, {"tapped": chosen}, [torch.rand(64, 2, 8, 12) + 0.1] * 20)["tapped"]
    turned = weights.double()
    if channel_klt:
        turned = torch.einsum("dc,ochw->odhw", chosen.bases["channels"].double(), turned)
    sums, counts = torch.zeros(15).double(), torch.zeros(15).double()
    for left, width in ((0, 8), (8, 4)):
        block = scipy.fft.dctn(turned[..., left : left + width].numpy(), axes=(2, 3), norm="ortho")
        squares = torch.from_numpy(block).square().sum(0).mean(0)
        for i in range(8):
            for j in range(width):
                sums[i + j] += squares[i, j]
                counts[i + j] += 1
    # Random signs give the sum over outputs on average.
    assert torch.allclose(found.means(), sums / counts, rtol=0.25)
    assert torch.equal(found.shares(), 2 * counts)


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("kernel", ["haar", "bior2.2"])
def test_wavelets_against_the_synthesis_of_each_coefficient(kernel: str) -> None:
    torch.manual_seed(0)
    weights = torch.randn(1, 1, 8, 8)
    found = measure_sensitivity(Linear(weights), {"tapped": tap(kernel, (1, 8, 8))}, [torch.rand(1, 1, 8, 8)])
    zeros = pywt.wavedec2(torch.zeros(8, 8).numpy(), kernel, mode="periodization", level=2)

    def change(level: int, band: int, row: int, column: int) -> float:
        parts = [zeros[0].copy(), *([part.copy() for part in details] for details in zeros[1:])]
        (parts[0] if level == 0 else parts[level][band])[row, column] = 1
        maps = pywt.waverec2([parts[0], *map(tuple, parts[1:])], kernel, mode="periodization")
        return float((torch.from_numpy(maps).float() * weights[0, 0]).sum()) ** 2

    def mean(level: int, bands: int, size: int) -> float:
        values = [change(level, b, i, j) for b in range(bands) for i in range(size) for j in range(size)]
        return sum(values) / len(values)

    expected = [mean(2, 3, 4), mean(1, 3, 2), mean(0, 1, 2)]
    assert torch.allclose(found["tapped"].means(), torch.tensor(expected).double(), rtol=1e-3)
    assert found["tapped"].shares().tolist() == [48, 12, 4]


def test_frozen_networks_and_small_maps_are_measured_too() -> None:
    weights = torch.ones(1, 1, 3, 3)
    found = measure_sensitivity(Linear(weights), {"tapped": tap("dct", (1, 3, 3))}, [torch.ones(2, 1, 3, 3)])
    means = found["tapped"].means()
    # 3 x 3 ones have a mean coefficient of 3; the diagonals 5 to 14 of a block are as the last there is.
    assert float(means[0]) == pytest.approx(9)
    assert means[1:].abs().max() < 1e-9
    assert found["tapped"].shares().tolist() == [1, 2, 3, 2, 1] + [0] * 10


def test_outputs_that_say_nothing_are_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tapped = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.tapped(x).argmax(1)

    with pytest.raises(TransformError, match="allocate"):
        measure_sensitivity(Counting(), {"tapped": tap("dct", (2, 8, 8))}, [torch.rand(1, 2, 8, 8)])


def test_steps_by_hand() -> None:
    class Known:
        def __init__(self, means: list[float], shares: list[float]) -> None:
            self._means, self._shares = torch.tensor(means).double(), torch.tensor(shares).double()

        def means(self) -> Tensor:
            return self._means

        def shares(self) -> Tensor:
            return self._shares

    measured: Any = {"a": Known([4.0, 1.0], [10, 10]), "b": Known([0.25, 0.0], [5, 1])}
    found = allocated_steps(measured, {"a": 0.5, "b": 2.0})
    # s^2 E: 1, 0.25; 1, 0. The median of 26 coefficients is the largest of the 15 that have 1.
    assert found["a"].tolist() == pytest.approx([MEDIAN * 0.5, MEDIAN * 0.5 * 0.25 ** (-POWER / 2)])
    assert found["b"].tolist() == pytest.approx([MEDIAN * 2.0, math.inf])


def test_calibration_gives_what_matters_less_larger_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = [torch.randn(8, 1, 8, 8)]
    config = CodecConfig(kernel="dct", table=default_table("dct", 8, 3, 8).steps, calibrated=("table",))
    allocated = config.model_copy(update={"allocated": True})
    site = [Site("1", (4, 8, 8))]
    usual = calibrate(model, site, {"1": config}, images, "")["1"]
    found = calibrate(model, site, {"1": allocated}, images, "")["1"]
    # A mean over the map needs nothing but the blocks' means.
    assert found.codec.table[0] < NEVER
    assert all(step > 1000 * found.codec.table[0] for step in found.codec.table[1:])
    assert max(usual.codec.table) <= 2.01 * min(usual.codec.table)
    set_taps(model, {"1": found})
    assert calibrate(model, site, {"1": allocated}, images, "")["1"].codec == found.codec
    fixed = allocated.model_copy(update={"calibrated": ()})
    assert calibrate(model, site, {"1": fixed}, images, "")["1"].codec.table == fixed.table


def test_maps_that_never_vary_keep_their_table() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten())
    config = CodecConfig(kernel="dct", table=(4.0,) * 15, calibrated=("table",), allocated=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = calibrate(model, [Site("1", (4, 8, 8))], {"1": config}, [torch.randn(2, 1, 8, 8)], "")["1"]
    assert found.codec.table == default_table("dct", 8, 3, 8).steps
