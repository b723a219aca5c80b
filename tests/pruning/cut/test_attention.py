"""Layer norm and attention: widths are cut, statistics run over what is kept, and what was asked is exact."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import convnext, maxvit, swin_transformer, vision_transformer

from cctool.graph.channels import couple
from cctool.options.prune.choices import AttentionUnit
from cctool.pruning.cut.planner import thin
from cctool.pruning.cut.report import PruneReport
from hook_oracle import HALF, TOLERANCE, distinct
from masking_oracle import outputs, relative
from statistics_oracle import masked

IMAGE = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
EXACT = replace(HALF, exact=True)


def share(model: nn.Module, of: nn.Module) -> float:
    count = [sum(p.numel() for p in m.parameters()) for m in (model, of)]
    return count[0] / count[1]


def check(model: nn.Module, x: Tensor, below: float, queries: tuple[str, ...] = ()) -> PruneReport:
    """Cut half: smaller than asked, equal to the oracle's network, trainable, and cut again."""
    distinct(model)
    cut = copy.deepcopy(model)
    report = thin(cut, (x[:1],), HALF).report
    assert not report.notes
    assert share(cut, model) < below
    expected = outputs(masked(model, cut, queries).eval(), x)
    assert relative(expected, outputs(cut, x)) < TOLERANCE
    assert relative(outputs(model, x), outputs(cut, x)) > 1e-3
    cut.train()(x).square().mean().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in cut.parameters())
    before = share(cut, model)
    thin(cut, (x[:1],), HALF)
    assert share(cut, model) < before
    return report


def vit() -> nn.Module:
    return vision_transformer.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=4
    )


def swin(second: bool) -> nn.Module:
    extra = {
        "block": swin_transformer.SwinTransformerBlockV2,
        "downsample_layer": swin_transformer.PatchMergingV2,
    }
    return swin_transformer.SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=[2, 2], num_classes=4,
        **(extra if second else {}),
    )  # fmt: skip


def convolutional() -> nn.Module:
    setting = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
    return convnext.ConvNeXt(setting, num_classes=4, layer_scale=0.5)


def multi_axis() -> nn.Module:
    return maxvit.MaxVit(
        input_size=(16, 16), stem_channels=8, partition_size=2, block_channels=[8, 16], block_layers=[1, 1],
        head_dim=4, stochastic_depth_prob=0.0, num_classes=4,
    )  # fmt: skip


def test_vision_transformer() -> None:
    queries = tuple(f"encoder.layers.encoder_layer_{n}.self_attention" for n in (0, 1))
    report = check(vit(), IMAGE, 0.4, queries)
    ops = [found.op for found in report.statistics]
    assert (ops.count("layer_norm"), ops.count("scaled_dot_product_attention")) == (5, 2)
    assert all(found.families for found in report.statistics)
    assert {found.module for found in report.statistics if found.op == "layer_norm"} >= {"encoder.ln"}


def test_attributes_of_attention_follow() -> None:
    model = vit()
    report = thin(model, (IMAGE[:1].float(),), HALF).report
    attention = model.encoder.layers[0].self_attention
    assert attention.embed_dim == attention.in_proj_weight.shape[1] == 4
    assert model.hidden_dim == 4
    assert model.encoder.ln.normalized_shape == (4,)
    # a unit is one position in both heads, so that each keeps as many
    assert [(f.units, f.width) for f in report.families if f.name == "conv_proj"] == [(4, 2)]


def test_swin_divides_a_width_in_its_code() -> None:
    queries = tuple(f"features.{stage}.{block}.attn.qkv" for stage in (1, 3) for block in (0, 1))
    report = check(swin(second=False), IMAGE, 0.4, queries)
    factors = [found for found in report.statistics if found.op == "mul"]
    assert len(factors) == 4
    assert "number made of this width" in factors[0].reason


def test_swin_with_cosine_attention_has_no_scale() -> None:
    report = check(swin(second=True), IMAGE, 0.6)
    assert {found.op for found in report.statistics} == {"layer_norm"}


def test_convnext() -> None:
    report = check(convolutional(), IMAGE.repeat(1, 1, 2, 2), 0.35)
    assert {found.op for found in report.statistics} == {"layer_norm"}


def test_maxvit_by_einsum_and_attributes() -> None:
    model = multi_axis()
    report = check(model, IMAGE, 0.45)
    assert {found.op for found in report.statistics} == {"layer_norm"}
    cut = multi_axis()
    thin(cut, (IMAGE[:1].float(),), HALF)
    attention = cut.blocks[0].layers[0].layers.grid_attention.attn_layer[1]
    assert (attention.n_heads, attention.head_dim) == (2, 2)
    assert attention.to_qkv.out_features == 12


@pytest.mark.parametrize("make", [vit, lambda: swin(False), convolutional])
def test_exact_leaves_such_widths_alone_and_says_so(make: Callable[[], nn.Module]) -> None:
    model = distinct(make()).eval()
    x = IMAGE.repeat(1, 1, 2, 2) if isinstance(model, convnext.ConvNeXt) else IMAGE
    cut, loose = copy.deepcopy(model), copy.deepcopy(model)
    report = thin(cut, (x[:1],), EXACT).report
    assert not report.statistics
    assert any("exact results were asked for" in f.reason and f.op == "layer_norm" for f in report.frozen)
    assert relative(outputs(masked(model, cut), x), outputs(cut, x)) < TOLERANCE
    thin(loose, (x[:1],), HALF)
    assert share(loose, model) < share(cut, model) < 0.9


class Attention(nn.Module):
    """A block as timm writes it: heads and their width are attributes."""

    def __init__(self, width: int, heads: int, scale: str, inner: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.kind = heads, scale
        self.head_dim = (inner or width) // heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * heads * self.head_dim)
        self.proj = nn.Linear(heads * self.head_dim, width)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.kind == "fused":
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            factors = {
                "stored": self.scale,
                "root": 1 / math.sqrt(self.head_dim),
                "power": q.size(-1) ** -0.5,
            }
            scores = (q * factors[self.kind]) @ k.transpose(-2, -1)
            x = scores.softmax(dim=-1) @ v
        x = x.transpose(1, 2)
        return self.proj(x.flatten(2) if self.inner else x.reshape(b, n, c))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    def __init__(self, scale: str, inner: int | None = None) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 12, 4, stride=4), nn.LayerNorm(12)
        self.attention, self.fc = Attention(12, 2, scale, inner), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm(x))
        return self.fc(x.mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("inner", [None, 8])
@pytest.mark.parametrize("scale", ["fused", "stored", "root", "power"])
def test_scales_of_attention(scale: str, inner: int | None) -> None:
    """A stored scale stays, one that is computed from the width follows the kept width."""
    model = Transformer(scale, inner)
    report = check(model, IMAGE, 0.45, () if scale == "stored" else ("attention.qkv",))
    assert len(report.statistics) == (1 if scale == "stored" else 2)
    names = {family.name: (family.units, family.width) for family in report.families}
    assert names == ({"embed": (6, 2)} if inner is None else {"embed": (12, 1), "attention.qkv": (4, 6)})


def test_heads_and_their_width_follow_as_attributes() -> None:
    model = Transformer("fused", 8)
    thin(model, (IMAGE[:1].float(),), HALF)
    attention = model.attention
    assert (attention.num_heads, attention.head_dim, attention.qkv.out_features) == (2, 2, 12)


@pytest.mark.parametrize("weights", [False, True])
def test_multi_head_attention_with_and_without_weights(weights: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Conv2d(3, 12, 4, stride=4), nn.Linear(12, 4)
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).transpose(1, 2)
            return self.fc((x + self.attention(x, x, x, need_weights=weights)[0]).mean(1))  # type: ignore[no-any-return]

    check(Net(), IMAGE, 0.4, ("attention",))


def means(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def by_hand(x: Tensor) -> Tensor:
    deviation = x - x.sum(1, keepdim=True) / x.shape[1]
    return deviation / (deviation.square().sum(1, keepdim=True) / x.shape[1] + 1e-5).sqrt()


def spatial_attention(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x.mean(1, keepdim=True) + x.amax(1, keepdim=True))


def softmax(x: Tensor) -> Tensor:
    return x * x.softmax(dim=1)


def unit_length(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1) + x / (1 + x.norm(dim=1, keepdim=True))


def kept_only(function: Callable[[Tensor], Tensor], kept: Tensor, x: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    result[:, kept] = function(x[:, kept])
    return result


@pytest.mark.parametrize("function", [means, by_hand, spatial_attention, softmax, unit_length])
def test_statistics_over_channels(function: Callable[[Tensor], Tensor]) -> None:
    """Against the function of the kept channels alone, laid by hand into the dense network."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.b(self.function(self.a(x)))).mean((2, 3)))  # type: ignore[no-any-return]

    model = distinct(Net())
    cut = copy.deepcopy(model)
    report = thin(cut, (IMAGE[:1],), HALF).report
    assert [(f.name, f.units, f.kept) for f in report.families] == [("a", 8, 4), ("b", 6, 3)]
    kept = torch.isin(model.a.bias, cut.a.bias)
    other = masked(model, cut)
    other.function = lambda x: kept_only(function, kept, x)
    assert relative(outputs(other, IMAGE), outputs(cut, IMAGE)) < TOLERANCE
    assert bool(report.statistics) == (function is not unit_length)


def test_a_sum_that_zeros_do_not_leave_alone() -> None:
    """Sigmoids of masked channels are not 0: the sum is a statistic, which exact results do without."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.fc(F.relu(self.b(x * x.sigmoid().sum(1, keepdim=True))).mean((2, 3)))  # type: ignore[no-any-return]

    report = thin(distinct(Net()), (IMAGE[:1],), HALF).report
    assert [(f.name, f.kept) for f in report.families] == [("a", 4), ("b", 3)]
    assert [(found.op, found.families) for found in report.statistics] == [("sum", ("a",))]
    report = thin(distinct(Net()), (IMAGE[:1],), EXACT).report
    assert [(f.name, f.kept) for f in report.families] == [("a", 8), ("b", 3)]
    assert not report.statistics
    assert len(report.notes) == 1
    assert report.notes[0].startswith("a keeps its width: cut and masked outputs differ")


@pytest.mark.parametrize("groups", [1, 4])
def test_group_norm_of_one_group_is_a_layer_norm(groups: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.GroupNorm(groups, 12), nn.ReLU(), nn.Conv2d(12, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    distinct(model)
    cut = copy.deepcopy(model)
    report = thin(cut, (IMAGE[:1],), HALF).report
    assert (cut[1].num_groups, cut[1].num_channels) == (groups // 2 or 1, 6)
    assert bool(report.statistics) == (groups == 1)
    graph = couple(model, (IMAGE[:1],), exact=True)
    frozen = {(f.op, f.parameter) for f in graph.frozen}
    assert (("group_norm", "1.weight") in frozen) == (groups == 1)


@pytest.mark.cuda
@pytest.mark.parametrize("make", [vit, lambda: swin(False), lambda: swin(True), multi_axis])
def test_cuda_couples_and_cuts_as_the_cpu_does(make: Callable[[], nn.Module]) -> None:
    model = distinct(make()).eval()
    other = copy.deepcopy(model).cuda()
    results = thin(model, (IMAGE[:1],), HALF), thin(other, (IMAGE[:1].cuda(),), HALF)
    reports = [result.report for result in results]
    assert reports[0].families == reports[1].families
    assert reports[0].frozen == reports[1].frozen
    assert reports[0].statistics == reports[1].statistics
    assert max(report.error for report in reports) < 1e-5
    for name, value in model.state_dict().items():
        assert other.state_dict()[name].is_cuda
        assert torch.equal(value, other.state_dict()[name].cpu()), name
    assert relative(outputs(model, IMAGE), outputs(other, IMAGE.cuda()).cpu()) < 1e-6


class Heads(nn.Module):
    """Self-attention as most code writes it: queries, keys and values of so many heads from one layer."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner = heads, head_dim, heads * head_dim
        self.qkv = nn.Linear(dim, 3 * self.inner)
        self.proj = nn.Linear(self.inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, self.inner))


def without_heads(layer: nn.Module, kept: list[int], head_dim: int) -> Tensor:
    """Zero in the output layer what the other heads send: a head that nobody reads is gone."""
    gone = torch.ones(layer.weight.shape[1], dtype=torch.bool)
    for head in kept:
        gone[head * head_dim : (head + 1) * head_dim] = False
    return layer.weight.detach().masked_fill(gone, 0)


def test_whole_heads_go_and_what_is_left_computes_the_same() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), Heads(8, 4, 5), nn.Linear(8, 3)).double()
    x = torch.randn(2, 7, 6).double()
    options = replace(HALF, attention=AttentionUnit.HEADS, only=("1.qkv",), exact=True)
    cut = copy.deepcopy(net)
    thin(cut, (x[:1],), options)
    assert (cut[1].num_heads, cut[1].head_dim, cut[1].inner) == (2, 5, 10)
    rows = net[1].qkv.weight.detach().reshape(3, 4, 5, 8)
    kept = [
        h
        for h in range(4)
        if any(torch.equal(rows[0, h], cut[1].qkv.weight[5 * i : 5 * i + 5]) for i in (0, 1))
    ]
    assert len(kept) == 2
    assert torch.equal(cut[1].qkv.weight.reshape(3, 2, 5, 8), rows[:, kept])
    masked_net = copy.deepcopy(net)
    with torch.no_grad():
        masked_net[1].proj.weight.copy_(without_heads(net[1].proj, kept, 5))
    assert relative(outputs(masked_net, x), outputs(cut, x)) < TOLERANCE


def test_heads_and_positions_are_two_ways_to_cut_attention() -> None:
    net = nn.Sequential(nn.Linear(6, 8), Heads(8, 4, 6), nn.Linear(8, 3)).double()
    x = torch.randn(2, 7, 6).double()
    found = []
    for unit in AttentionUnit:
        cut = copy.deepcopy(net)
        thin(cut, (x[:1],), replace(HALF, attention=unit, only=("1.qkv",)))
        found.append((cut[1].num_heads, cut[1].head_dim, cut[1].inner))
    assert found == [(4, 3, 12), (2, 6, 12)]


def test_torchs_own_attention_loses_heads_with_the_embedding() -> None:
    net = vit()
    distinct(net)
    cut = copy.deepcopy(net).double().eval()
    report = thin(cut, (IMAGE[:1],), replace(HALF, attention=AttentionUnit.HEADS)).report
    layer = cut.encoder.layers[0].self_attention
    assert (layer.num_heads, layer.embed_dim) == (1, 4)
    assert report.error < TOLERANCE
    cut.train()(IMAGE).square().mean().backward()
