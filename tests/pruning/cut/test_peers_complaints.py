"""What users of Torch-Pruning (TP) and NNI complain of, a test for each; numbers are those of the threads.

Oracles are closed formulas, networks cut by hand, and hooks (`hook_oracle.py`); none of them uses the graph.
"""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.base.errors import PruningError
from cctool.options.prune.choices import PruneMethod, Scope
from cctool.pruning.cut.planner import plan_thinning, thin
from cctool.pruning.cut.surgery import apply_cut, cut_tensor
from hook_oracle import HALF, check_exact, count, difference, distinct, lost_channels, masked, run

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ODDS = 1e-9  # of the spread over the batch, in float64


def conv(i: int, o: int, **keywords: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **keywords)


class Net(nn.Module):
    """Modules by name, and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def strongest(weight: Tensor, keep: int) -> Tensor:
    """Filters with the largest norms, ascending: what l2 keeps."""
    return weight.flatten(1).norm(dim=1).topk(keep).indices.sort().values


def frozen(report: Any) -> dict[tuple[str, int], str]:
    return {(f.parameter, f.dim): f.reason for f in report.frozen}


# ---- groups -----------------------------------------------------------------------------------------------
def test_tp126_tp179_a_convolution_of_one_output_channel_is_not_depthwise() -> None:
    """TP#126, TP#179: one output channel was taken for a depthwise convolution, and its inputs were lost."""
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 1))
    distinct(model)
    cut = copy.deepcopy(model)
    report = thin(cut, (X.double(),), HALF).report
    kept = strongest(model[0].weight, 4)
    by_hand = F.conv2d(X.double(), model[0].weight[kept], model[0].bias[kept], padding=1).relu()
    by_hand = F.conv2d(by_hand, model[2].weight[:, kept], model[2].bias, padding=1)
    assert difference([by_hand], run(cut, (X.double(),))) < ODDS
    assert (cut[2].in_channels, cut[2].out_channels, cut[2].groups) == (4, 1, 1)
    assert frozen(report)["2.weight", 0] == "the width of the model's output"


def test_tp126_a_convolution_of_one_input_channel_is_not_depthwise() -> None:
    """TP#126: a gray image's first convolution has one input channel a group, as a depthwise one has."""
    model = nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 2))
    cut, _ = check_exact(model, (X[:, :1],), below=0.41)
    assert [(m.in_channels, m.out_channels, m.groups) for m in cut if isinstance(m, nn.Conv2d)] == [
        (1, 4, 1),
        (4, 3, 1),
        (3, 2, 1),
    ]


@pytest.mark.parametrize(("width", "expansion"), [(8, 1), (8, 3), (7, 2), (5, 6)])
def test_tp328_groups_of_inverted_residuals_are_set(width: int, expansion: int) -> None:
    """TP#328: `groups` of MobileNet's blocks did not follow the channels, and the network no longer ran."""
    inner = width * expansion

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.out(x + m.project(F.relu6(m.depthwise(F.relu6(m.expand(x))))))  # type: ignore[no-any-return]

    model = Net(
        forward, stem=conv(3, width), expand=nn.Conv2d(width, inner, 1), project=nn.Conv2d(inner, width, 1),
        depthwise=conv(inner, inner, groups=inner), out=conv(width, 2),
    )  # fmt: skip
    cut, _ = check_exact(model, (X,), below=0.7)
    half = inner - inner // 2
    assert (cut.depthwise.groups, cut.depthwise.in_channels, cut.depthwise.out_channels) == (half, half, half)
    assert cut.depthwise.weight.shape == (half, 1, 3, 3)


def as_plain(layer: nn.Conv2d) -> Tensor:
    """The weight of the plain convolution that a grouped one is: blocks along the diagonal."""
    blocks = layer.weight.chunk(layer.groups)
    plain = torch.zeros(layer.out_channels, layer.in_channels, *layer.kernel_size, dtype=layer.weight.dtype)
    rows, columns = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    for n, block in enumerate(blocks):
        plain[n * rows : (n + 1) * rows, n * columns : (n + 1) * columns] = block
    return plain


@pytest.mark.parametrize("groups", [2, 4])
def test_tp9_a_grouped_convolution_loses_the_same_count_in_every_group(groups: int) -> None:
    """TP#9: grouped convolutions were not cut, or cut to counts that no grouped convolution can have."""
    model = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 8, groups=groups), nn.ReLU(), conv(8, 2))
    cut, _ = check_exact(model, (X,), below=0.55)
    assert (cut[2].groups, cut[2].in_channels, cut[2].out_channels) == (groups, 8, 4)
    rows = torch.isin(model[2].bias, cut[2].bias)
    columns = torch.isin(model[0].bias, cut[0].bias)
    for mask in (rows, columns):
        assert len(set(mask.view(groups, -1).sum(dim=1).tolist())) == 1
    # read as plain convolutions, the cut one is the block of kept rows and columns of the dense one
    assert torch.equal(as_plain(cut[2]), as_plain(model[2])[rows][:, columns])


@pytest.mark.parametrize("rate", [0.5, 0.99])
def test_nni4991_nni4864_no_layer_is_emptied_and_no_group_unbalanced(rate: float) -> None:
    """NNI#4991, #4864: depthwise layers raised EmptyLayerError and UnBalancedGroupError."""
    model = Net(
        lambda m, x: m.out(m.grouped(m.depthwise(m.stem(x)))), stem=conv(3, 8),
        depthwise=conv(8, 16, groups=8), grouped=conv(16, 12, groups=4), out=conv(12, 2),
    )  # fmt: skip
    distinct(model)
    dense = copy.deepcopy(model)
    x = X.double()
    thin(model, (x,), replace(HALF, rate=rate))
    assert all(min(p.shape) > 0 for p in model.parameters())
    assert model.depthwise.out_channels == 2 * model.depthwise.groups == 2 * model.stem.out_channels
    assert model.grouped.in_channels % 4 == model.grouped.out_channels % 4 == 0
    assert difference(masked(dense, lost_channels(dense, model), (x,)), run(model, (x,))) < ODDS


# ---- index mapping ----------------------------------------------------------------------------------------
def test_tp415_indices_of_nested_concatenations() -> None:
    """TP#415: in YOLOv9's ELAN blocks, chunks that are concatenated again mapped to the wrong indices."""

    def forward(m: Net, x: Tensor) -> Tensor:
        found = list(m.first(x).chunk(2, 1))
        found.append(m.second(found[-1]))
        found.append(m.third(torch.cat([found[-1], x], dim=1)))
        return m.out(F.relu(m.last(torch.cat(found, dim=1))))  # type: ignore[no-any-return]

    model = Net(
        forward, first=conv(3, 12), second=conv(6, 5), third=conv(8, 4), last=conv(21, 8), out=conv(8, 2)
    )
    cut, _ = check_exact(model, (X,), below=0.45)
    firsts, seconds, thirds = (
        torch.isin(getattr(model, name).bias, getattr(cut, name).bias)
        for name in ("first", "second", "third")
    )
    columns = torch.cat([firsts, seconds, thirds])
    rows = torch.isin(model.last.bias, cut.last.bias)
    assert torch.equal(cut.last.weight, model.last.weight[rows][:, columns])
    assert int(firsts[:6].sum()) == int(firsts[6:].sum()) == 3


@pytest.mark.parametrize(
    "flat",
    [
        lambda x: x.flatten(1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]),
        lambda x: torch.flatten(x, start_dim=1),
        lambda x: x.view(-1, x.shape[1:].numel()),
    ],
)
def test_tp125_tp219_tp393_columns_behind_a_flatten(flat: Callable[[Tensor], Tensor]) -> None:
    """TP#125, #219, #393: indices overflowed behind `view` and `flatten`, of maps that are not square too."""
    model = Net(
        lambda m, x: m.fc(flat(torch.cat([m.a(x), m.b(x)], dim=1))), a=conv(3, 4), b=conv(3, 6),
        fc=nn.Linear(10 * 40, 5),
    )  # fmt: skip
    wide = torch.randn(2, 3, 8, 5)
    cut, _ = check_exact(model, (wide,), below=0.52)
    channels = torch.cat([strongest(model.a.weight, 2), 4 + strongest(model.b.weight, 3)])
    columns = (channels[:, None] * 40 + torch.arange(40)).flatten()
    assert torch.equal(cut.fc.weight, model.fc.weight[:, columns])
    assert cut.fc.in_features == 200


# ---- widths that are written down -------------------------------------------------------------------------
def test_a_literal_in_a_view_keeps_its_width_with_a_note_and_the_rest_is_cut() -> None:
    """Cross-cutting item 3: `view(-1, 512)`, `view(-1, 512 * 4 * 4)` fold or break once the width changes."""
    literals = {16: lambda x: x.mean((2, 3)).view(-1, 16), 16 * 64: lambda x: x.view(-1, 16 * 8 * 8)}
    for features, flat in literals.items():
        model = Net(
            lambda m, x, flat=flat: m.fc(flat(m.b(F.relu(m.a(x))))), a=conv(3, 8), b=conv(8, 16),
            fc=nn.Linear(features, 4),
        )  # fmt: skip
        distinct(model)
        cut = copy.deepcopy(model)
        x = X.double()
        report = thin(cut, (x,), HALF).report
        assert [(f.name, f.kept) for f in report.families] == [("a", 4), ("b", 16)]
        (note,) = report.notes
        assert note.startswith("b keeps its width: ")
        assert difference(masked(model, lost_channels(model, cut), (x,)), run(cut, (x,))) < ODDS


class Remembering(nn.Module):
    """A decoder that remembers the shape of its features, as autoencoders do."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.shape = kind((16, 4, 4))
        self.width, self.flat = 16, 16 * 16
        self.code, self.features = nn.Linear(3, 24), nn.Linear(24, self.flat)
        self.up, self.back, self.out = nn.ConvTranspose2d(16, 16, 2, 2), conv(16, 16), nn.Linear(16 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(F.relu(self.code(x.mean((2, 3))))))
        x = F.relu(self.up(x.view(-1, *self.shape)))
        x = F.relu(self.back(x)).view(-1, self.width, 64)
        return self.out(x.reshape(-1, self.width * 64))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [tuple, list])
def test_attributes_that_remember_a_shape_follow(kind: type) -> None:
    """Cross-cutting item 3: `self.shape` goes stale (TP's README: to be mended by hand)."""
    cut, _ = check_exact(Remembering(kind), (X,), below=0.41)
    assert cut.shape == kind((8, 4, 4))
    assert type(cut.shape) is kind
    assert cut.width == 8
    assert (cut.features.out_features, cut.up.in_channels, cut.back.out_channels) == (8 * 16, 8, 8)


def test_an_unflatten_follows() -> None:
    """Cross-cutting item 3: the sizes that `nn.Unflatten` was given."""
    model = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8 * 16), nn.ReLU(), nn.Unflatten(1, (8, 4, 4)),
        conv(8, 8), nn.ReLU(), conv(8, 2),
    )  # fmt: skip
    cut, _ = check_exact(model, (X,), below=0.45)
    assert tuple(cut[4].unflattened_size) == (4, 4, 4)


@pytest.mark.parametrize("pieces", [2, 4])
def test_chunks_keep_equal_counts(pieces: int) -> None:
    """Cross-cutting item 3: `chunk(n)` splits elsewhere once the pieces differ."""

    def forward(m: Net, x: Tensor) -> Tensor:
        first, *others = m.a(x).chunk(pieces, dim=1)
        return m.out(m.b(first * torch.sigmoid(sum(others))))  # type: ignore[no-any-return]

    model = Net(forward, a=conv(3, 16), b=conv(16 // pieces, 8), out=conv(8, 2))
    cut, _ = check_exact(model, (X,), below=0.55)
    kept = torch.isin(model.a.bias, cut.a.bias).view(pieces, -1)
    assert bool((kept == kept[:1]).all())


def layer_norm_over(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def test_normalized_shape_follows() -> None:
    """Cross-cutting item 3: `normalized_shape` holds a width; statistics then run over what is kept."""
    model = Net(
        lambda m, x: m.out(m.norm(m.a(x.mean((2, 3))))), a=nn.Linear(3, 12), norm=nn.LayerNorm(12),
        out=nn.Linear(12, 4),
    )  # fmt: skip
    distinct(model)
    cut, x = copy.deepcopy(model), X.double()
    report = thin(cut, (x,), HALF).report
    assert cut.norm.normalized_shape == (6,)
    kept = strongest(model.a.weight, 6)
    by_hand = F.linear(x.mean((2, 3)), model.a.weight[kept], model.a.bias[kept])
    by_hand = layer_norm_over(by_hand, model.norm.weight[kept], model.norm.bias[kept])
    by_hand = F.linear(by_hand, model.out.weight[:, kept], model.out.bias)
    assert difference([by_hand], run(cut, (x,))) < ODDS
    assert len(report.statistics) == 1
    assert (report.statistics[0].op, report.statistics[0].module) == ("layer_norm", "norm")


# ---- nothing in silence -----------------------------------------------------------------------------------
def test_tp136_tp416_nothing_to_cut_is_an_error() -> None:
    """TP#136, #416: nothing was pruned, and nothing was said."""
    stuck = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 2))
    stuck.forward = lambda x: stuck[2](torch.sort(stuck[0](x), dim=1).values)  # type: ignore[method-assign]
    with pytest.raises(PruningError, match=r"every channel is frozen .*sort"):
        thin(stuck, (X,), HALF)
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 2))
    with pytest.raises(PruningError, match=r"nothing can be cut .*excluded"):
        thin(model, (X,), replace(HALF, exclude=("0",)))
    with pytest.raises(PruningError, match="no batch norm"):
        thin(model, (X,), replace(HALF, method=PruneMethod.SLIMMING, scope=None))


def test_tp136_a_rate_below_one_unit_is_noted() -> None:
    """TP#136: a rate that rounds to no channel leaves the network alone, and the report says so."""
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 2))
    report = thin(model, (X,), replace(HALF, rate=0.1)).report
    assert report.parameters_after == report.parameters_before == count(model)
    assert any("below one unit" in note for note in report.notes)


# ---- accuracy ---------------------------------------------------------------------------------------------
def test_tp347_the_lowest_hundredth_changes_little() -> None:
    """TP#347: accuracy fell off a cliff at tiny rates. Here one channel of a hundred hardly says anything."""
    model = nn.Sequential(conv(3, 100, bias=False), nn.BatchNorm2d(100), nn.ReLU(), conv(100, 4))
    distinct(model)
    with torch.no_grad():
        model[1].weight[37], model[1].bias[37] = 1e-7, 1e-7
        model[0].weight[37] *= 1e-7
    x = X.double()
    dense = run(model, (x,))
    for method in (PruneMethod.L1, PruneMethod.L2, PruneMethod.SLIMMING):
        cut = copy.deepcopy(model)
        thin(cut, (x,), replace(HALF, method=method, rate=0.01))
        assert cut[0].out_channels == 99
        assert not bool(torch.isin(model[1].weight[37], cut[1].weight))
        assert 0 < difference(dense, run(cut, (x,))) < 1e-5
    network = copy.deepcopy(model)
    strong = int(model[1].weight.abs().argmax())
    with torch.no_grad():
        network[1].weight[strong] = network[1].bias[strong] = 0
    assert difference(dense, run(network, (x,))) > 1e-3, "losing any channel must not change as little"


def test_nni2130_masked_is_thinned_where_beta_is_not_zero() -> None:
    """NNI#2130: the thinned network differed from the masked one by the constant that beta still emits."""
    model = nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2))
    distinct(model)
    nn.init.constant_(model[1].bias, 0.7)
    x, cut = X.double(), copy.deepcopy(model)
    thin(cut, (x,), HALF)
    gone = ~torch.isin(torch.arange(8), strongest(model[0].weight, 4))
    filters_alone, both = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        filters_alone[0].weight[gone] = 0
        both[0].weight[gone] = 0
        both[1].weight[gone] = both[1].bias[gone] = 0
    assert difference(run(both, (x,)), run(cut, (x,))) < ODDS
    # the constant in closed form: what each dead channel emits, read by the next layer, away from the border
    emitted = (
        0.7 - model[1].weight * model[1].running_mean / (model[1].running_var + 1e-5).sqrt()
    ).relu() * gone
    constant = (model[3].weight.sum((2, 3)) @ emitted).detach()
    inside = (run(filters_alone, (x,))[0] - run(cut, (x,))[0])[:, :, 2:-2, 2:-2]
    assert float(constant.abs().max()) > 0.01
    torch.testing.assert_close(inside, constant.view(1, 2, 1, 1).expand_as(inside))


# ---- the same again ---------------------------------------------------------------------------------------
def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def keeps(model: nn.Module, **options: Any) -> dict[str, list[list[int]]]:
    seed = options.pop("seed", 0)
    plan = plan_thinning(model, (X,), replace(HALF, **options), seed=seed).plan
    return {name: [cut.keep.tolist() for cut in cuts] for name, cuts in plan.tensors.items()}


@pytest.mark.parametrize("method", [PruneMethod.L2, PruneMethod.RANDOM])
def test_tp135_tp394_the_same_seed_gives_the_same_result(method: PruneMethod) -> None:
    """TP#135, #394: results were not reproducible. The state of torch's own generator plays no part."""
    model = small()
    torch.manual_seed(1)
    first = keeps(model, method=method, seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert keeps(model, method=method, seed=5) == first
    torch.manual_seed(1)
    keeps(model, method=method, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    if method is PruneMethod.RANDOM:
        assert keeps(model, method=method, seed=6) != first


def test_two_pruners_in_one_process_do_not_influence_each_other() -> None:
    """TP keeps state in its classes; here plans may be made in turns and carried out in any order."""
    a, b = small(0), Remembering(tuple)
    alone = copy.deepcopy(a), copy.deepcopy(b)
    for model in alone:
        thin(model, (X,), HALF)
    in_turns = copy.deepcopy(a), copy.deepcopy(b)
    first = plan_thinning(in_turns[0], (X,), HALF).plan
    other = plan_thinning(
        in_turns[0], (X,), replace(HALF, method=PruneMethod.L1, rate=0.25, scope=Scope.GLOBAL)
    ).plan
    second = plan_thinning(in_turns[1], (X,), HALF).plan
    apply_cut(in_turns[1], second)
    apply_cut(in_turns[0], first)
    for expected, found in zip(alone, in_turns, strict=True):
        assert {k: v.shape for k, v in expected.state_dict().items()} == {
            k: v.shape for k, v in found.state_dict().items()
        }
        assert all(torch.equal(v, found.state_dict()[k]) for k, v in expected.state_dict().items())
    assert {name: cuts[0].keep.numel() for name, cuts in other.tensors.items()} != {
        name: cuts[0].keep.numel() for name, cuts in first.tensors.items()
    }


# ---- what is left behind ----------------------------------------------------------------------------------
def test_tp65_nothing_is_left_on_the_modules() -> None:
    """TP#65: autograd nodes stayed on the modules, which could no longer be pickled or copied."""
    for network in (Remembering(list), small()):
        before = {name: {k: type(v) for k, v in vars(m).items()} for name, m in network.named_modules()}
        thin(network, (X,), HALF)
        assert {
            name: {k: type(v) for k, v in vars(m).items()} for name, m in network.named_modules()
        } == before
        for module in network.modules():
            for value in vars(module).values():
                items = value if isinstance(value, (tuple, list)) else [value]
                assert all(
                    type(item) is int for item in items if isinstance(item, int) and type(item) is not bool
                )
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert all(p.is_leaf and p.grad_fn is None for p in network.parameters())
        copied = pickle.loads(pickle.dumps(network))
        assert all(torch.equal(a, b) for a, b in zip(run(copied, (X,)), run(network, (X,)), strict=True))


def test_a_pass_that_raises_leaves_the_attributes_alone() -> None:
    """Cross-cutting item 4: no state of one run may reach the next, that of a failed one least of all."""
    network = Remembering(tuple)
    network.out = nn.Linear(3, 4)
    before = [{k: type(v) for k, v in vars(m).items()} for m in network.modules()]
    with pytest.raises(RuntimeError, match="shapes"):
        thin(network, (X,), HALF)
    assert [{k: type(v) for k, v in vars(m).items()} for m in network.modules()] == before
    assert all(type(item) is int for item in (*network.shape, network.width))


LOAD = """
import json, sys, torch, cctool
path, inputs, output = sys.argv[1:]
torch.load(path, weights_only=True)
model = cctool.load(path).model.eval()
with torch.no_grad():
    torch.save(model(torch.load(inputs)), output)
print(json.dumps([type(model).__module__, sum(p.numel() for p in model.parameters())]))
"""


def test_tp51_tp428_a_pruned_model_is_read_in_a_new_process_without_pickle(tmp_path: Path) -> None:
    """TP#51, #428: how to get the class definition of a pruned model, how to save masks."""
    from cctool.checkpoint.checkpoint import Checkpoint, save
    from cctool.checkpoint.edits.thin import thinned
    from cctool.checkpoint.spec import ModelSpec
    from cctool.models.registry import build
    from cctool.operations.registries import tables

    model = build("mobilenet_student", {"num_classes": 5})
    x = torch.randn(2, 3, 32, 32)
    plan = thin(model, (x,), HALF).plan
    attributes = [(module, key) for module, values in plan.attributes.items() for key in values]
    spec = ModelSpec(architecture="mobilenet_student", arguments={"num_classes": 5}, input_shape=(3, 32, 32))
    save(Checkpoint(model, thinned(spec, model, plan.tensors, attributes)), tmp_path / "cut.pt", tables())
    torch.save(x, tmp_path / "x.pt")
    line = [sys.executable, "-c", LOAD, *(str(tmp_path / name) for name in ("cut.pt", "x.pt", "y.pt"))]
    printed = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    assert json.loads(printed)[1] == count(model)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), run(model, (x,))[0])


# ---- the optimizer ----------------------------------------------------------------------------------------
def tensors_of_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Momentum, moments: what has the shape of the parameter."""
    state = optimizer.state[parameter]
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(8, 3, 8, 8, generator=generator).double()
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images), torch.arange(8) % 4).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    ],
)
def test_training_goes_on_with_the_optimizer_state_cut_along(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    """Cross-cutting item 4: after a cut, momentum and Adam's moments belonged to channels that were gone.

    The oracle is the dense network with the same units and their state set to zero by hand: these get no
    gradient, so that both go on alike.
    """
    dense = distinct(small())
    optimizer = make(dense.parameters())
    steps(dense, optimizer, 0, 3)
    cut = copy.deepcopy(dense)
    plan = thin(cut, (X.double(),), HALF).plan
    later = make(cut.parameters())
    by_name = dict(dense.named_parameters())
    for name, parameter in cut.named_parameters():
        cuts = plan.tensors.get(name, ())
        moved = {
            key: cut_tensor(value, cuts).clone()
            for key, value in tensors_of_state(optimizer, by_name[name]).items()
        }
        assert moved
        later.state[parameter] = {**copy.deepcopy(optimizer.state[by_name[name]]), **moved}

    kept = {"0": strongest(dense[0].weight, 4), "3": strongest(dense[3].weight, 6)}
    owned = {
        "0.weight": ("0", None), "0.bias": ("0", None), "1.weight": ("0", None), "1.bias": ("0", None),
        "3.weight": ("3", "0"), "3.bias": ("3", None), "4.weight": ("3", None), "4.bias": ("3", None),
        "8.weight": (None, "3"),
    }  # fmt: skip
    with torch.no_grad():
        for name, families in owned.items():
            for dim, family in enumerate(families):
                if family is not None:
                    for tensor in (by_name[name], *tensors_of_state(optimizer, by_name[name]).values()):
                        gone = [i for i in range(tensor.shape[dim]) if i not in kept[family].tolist()]
                        tensor.index_fill_(dim, torch.tensor(gone), 0)
    steps(dense, optimizer, 3, 6)
    steps(cut, later, 3, 6)
    for name, parameter in cut.named_parameters():
        expected = by_name[name].detach()
        for dim, family in enumerate(owned.get(name, ())):
            if family is not None:
                expected = expected.index_select(dim, kept[family])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9)
