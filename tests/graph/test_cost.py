"""Counts against closed formulas worked out here, and against torch's own counter of products."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cctool.base.errors import ArchitectureError
from cctool.graph.cost import measure
from cctool.graph.cost_rules import FREE, RULES, Cost


def cost_of(model: nn.Module, *shape: int) -> Cost:
    return measure(model, shape).total


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (1, 1, 1, 2), (2, 1, 1, 8)],
    ids=["plain", "strided", "dilated", "grouped", "depthwise"],
)
def test_convolution(dimensions: int, stride: int, padding: int, dilation: int, groups: int) -> None:
    kernel, c_in, c_out = (3, 5, 2)[:dimensions], 8, 16
    module = getattr(nn, f"Conv{dimensions}d")(
        c_in, c_out, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    sizes = (11, 14, 9)[:dimensions]
    pixels = math.prod(
        out_size(size, k, stride, padding, dilation) for size, k in zip(sizes, kernel, strict=True)
    )
    expected = pixels * c_out * (c_in // groups) * math.prod(kernel)
    assert cost_of(module, c_in, *sizes) == Cost(macs=expected)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_transposed_convolution(dimensions: int, groups: int) -> None:
    kernel, c_in, c_out = (4, 3, 2)[:dimensions], 8, 12
    module = getattr(nn, f"ConvTranspose{dimensions}d")(
        c_in, c_out, kernel, stride=2, padding=1, groups=groups
    )
    sizes = (5, 6, 7)[:dimensions]
    expected = c_in * math.prod(sizes) * (c_out // groups) * math.prod(kernel)
    assert cost_of(module, c_in, *sizes) == Cost(macs=expected)


def test_linear_counts_every_position() -> None:
    assert cost_of(nn.Linear(10, 7), 10) == Cost(macs=70)
    assert cost_of(nn.Linear(10, 7), 4, 6, 10) == Cost(macs=4 * 6 * 70)


class WithRawParameter(nn.Module):
    def __init__(self, call: str) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(6, 5))
        self.kernel = nn.Parameter(torch.ones(4, 3, 3, 3))
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        calls = {
            "matmul": lambda: x @ self.matrix,
            "mm": lambda: torch.mm(x[0], self.matrix),
            "addmm": lambda: torch.addmm(torch.zeros(5), x[0], self.matrix),
            "einsum": lambda: torch.einsum("b...i,ij->b...j", x, self.matrix),
            "tensordot": lambda: torch.tensordot(x, self.matrix, dims=([2], [0])),
            "self-product": lambda: x @ x.transpose(1, 2),
            "bmm": lambda: torch.bmm(x, x.transpose(1, 2)),
            "baddbmm": lambda: torch.baddbmm(torch.zeros(1, 4, 4), x, x.transpose(1, 2)),
            "einsum of activations": lambda: torch.einsum("bij,bkj->bik", x, x),
        }
        return calls[self.call]()


@pytest.mark.parametrize("call", ["matmul", "mm", "addmm", "einsum", "tensordot"])
def test_product_with_a_raw_parameter_is_a_linear_layer(call: str) -> None:
    assert cost_of(WithRawParameter(call), 4, 6) == Cost(macs=4 * 6 * 5)


@pytest.mark.parametrize("call", ["self-product", "bmm", "baddbmm", "einsum of activations"])
def test_product_of_activations_has_its_own_column(call: str) -> None:
    assert cost_of(WithRawParameter(call), 4, 6) == Cost(matmul_macs=4 * 4 * 6)


def test_functional_convolution_belongs_to_the_module_that_calls_it() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(4, 3, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.kernel, padding=1).relu()

    found = measure(nn.Sequential(Functional()), (3, 8, 8))
    assert found.total == Cost(macs=4 * 64 * 27, activation_ops=4 * 64)
    assert [(c.module, c.weight) for c in found.calls] == [("0", "0.kernel"), ("0", None)]


def test_shared_module_counts_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    found = measure(Twice(), (6,))
    assert found.total.macs == 2 * 36
    assert [c.module for c in found.calls] == ["layer", "layer"]


def test_tied_weights_count_where_they_are_used() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    found = measure(nn.Sequential(first, second), (6,))
    assert [(c.module, c.cost.macs) for c in found.calls] == [("0", 36), ("1", 36)]


@pytest.mark.parametrize(
    ("length", "width", "heads"), [(5, 8, 2), (1, 4, 4)], ids=["two heads", "one position"]
)
def test_attention_projections_and_products(length: int, width: int, heads: int) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    found = measure(Attention(), (length, width))
    assert found.total.macs == 4 * length * width * width
    assert found.total.matmul_macs == 2 * length * length * width
    assert {c.module for c in found.calls if c.cost.macs} == {"attention", "attention.out_proj"}


def test_columns_of_the_other_kinds() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(4), nn.ReLU6(), nn.MaxPool2d(3, stride=2), nn.AvgPool2d(2), nn.Softmax(1), nn.Dropout()
    )
    # 4x11x11 -> 4x5x5 after the max pool of 3x3 windows -> 4x2x2 after the average pool of 2x2 windows.
    assert cost_of(model, 4, 11, 11) == Cost(
        norm_ops=484, activation_ops=484 + 16, pooling_ops=100 * 9 + 16 * 4
    )


def test_adaptive_pool_reads_overlapping_bins() -> None:
    # 5 columns in 3 bins: [0, 2), [1, 4), [3, 5) read 2 + 3 + 2; rows likewise.
    assert cost_of(nn.AdaptiveAvgPool2d(3), 2, 5, 5) == Cost(pooling_ops=2 * 7 * 7)


@pytest.mark.parametrize(("mode", "taps"), [("nearest", 1), ("bilinear", 4), ("bicubic", 16)])
def test_resampling_reads_its_taps(mode: str, taps: int) -> None:
    assert cost_of(nn.Upsample(scale_factor=2, mode=mode), 3, 4, 4) == Cost(pooling_ops=3 * 64 * taps)


def test_addition_is_elementwise_and_shapes_are_free() -> None:
    class Residual(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((x.flatten(1), (x + x).flatten(1)), 1)

    assert cost_of(Residual(), 3, 4, 4) == Cost(elementwise_ops=48)


def test_what_has_no_rule_is_named() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft2(torch.fft.fft2(x)).real

    found = measure(Spectrum(), (1, 4, 4))
    assert found.uncounted == {"fft_fft2": 2}
    assert found.total == Cost()


def test_rules_and_free_functions_do_not_overlap() -> None:
    assert not FREE & RULES.keys()


def test_an_input_that_does_not_fit_is_named() -> None:
    with pytest.raises(ArchitectureError, match=r"3x2x2.*--input"):
        measure(nn.Conv2d(3, 4, 5), (3, 2, 2))


PUBLISHED = {"resnet18": 1814.1, "mobilenet_v2": 300.8, "efficientnet_b0": 385.8}
"""Millions of convolution and linear MACs at 224x224; resnext50_32x4d has 4230.5 (below)."""


def products_of_torch(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Torch's counter gives two operations a MAC; it sees no products in the fused kernels of attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, *shape))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    operations = counter.get_total_flops()
    assert operations % 2 == 0
    return int(operations // 2)


def torchvision_network(name: str) -> nn.Module:
    from torchvision import models

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    assert cost_of(torchvision_network(name), 3, 224, 224).macs / 1e6 == pytest.approx(
        PUBLISHED[name], abs=0.05
    )


@pytest.mark.parametrize("name", ["densenet121", "googlenet", "shufflenet_v2_x0_5", "swin_t"])
def test_products_equal_torchs_counter(name: str) -> None:
    model = torchvision_network(name)
    found = measure(model, (3, 224, 224))
    assert found.total.macs + found.total.matmul_macs == products_of_torch(model, (3, 224, 224))
    assert not found.uncounted


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnext50_32x4d", "vit_b_16", "swin_v2_t", "maxvit_t", "inception_v3", "convnext_tiny"]
)
def test_products_equal_torchs_counter_on_larger_networks(name: str) -> None:
    model = torchvision_network(name)
    size = 299 if name == "inception_v3" else 224
    found = measure(model, (3, size, size))
    assert found.total.macs + found.total.matmul_macs == products_of_torch(model, (3, size, size))
    assert not found.uncounted
    if name == "resnext50_32x4d":
        assert found.total.macs / 1e6 == pytest.approx(4230.5, abs=0.05)
    if name == "vit_b_16":
        # 11,271 M without the attention's own projections, which counters by module do not see.
        assert found.total.macs / 1e6 == pytest.approx(11_271 + 12 * 4 * 197 * 768**2 / 1e6, abs=0.5)
        assert found.total.matmul_macs == 12 * 2 * 197**2 * 768


@pytest.mark.cuda
def test_counts_do_not_depend_on_the_device() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    assert measure(model.cuda(), (3, 8, 8)) == measure(model.cpu(), (3, 8, 8))


def test_a_network_that_takes_no_single_input_is_counted_on_two() -> None:
    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.convolution(x).mean((2, 3)).squeeze())

    assert measure(Squeezing().eval(), (3, 10, 10)).total.macs == 8 * 8 * 8 * 27
