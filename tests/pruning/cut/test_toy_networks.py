"""Small networks, one hard case each: what is cut equals what is masked, what cannot be cut is named."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.base.errors import PruningError
from cctool.graph.channels import ChannelGraph, couple
from cctool.options.prune.choices import PruneMethod, Scope
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.planner import thin
from cctool.pruning.cut.report import PruneReport
from cctool.pruning.cut.surgery import mask
from masking_oracle import lost_channels, outputs, randomise, relative, zeroed

HALF = PruneOptions(method=PruneMethod.L2, rate=0.5, scope=Scope.LOCAL)
EXACT = replace(HALF, exact=True)


class Net(nn.Module):
    """Modules by name, and a forward given as a function of them."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(i: int, o: int, **kw: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **kw)


def head(model: Net, x: Tensor) -> Tensor:
    return model.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def check(model: nn.Module, x: Tensor, hooks: bool = True, options: PruneOptions = HALF) -> PruneReport:
    """Cut half, compare with both masked networks, train a step, cut again."""
    randomise(model)
    x = x.double()
    cut = copy.deepcopy(model)
    result = thin(cut, (x,), options)
    actual = outputs(cut, x)
    masked = copy.deepcopy(model)
    mask(masked, result.graph, result.selection)
    assert relative(outputs(masked, x), actual) < 1e-9
    if hooks:
        with zeroed(model, lost_channels(model, cut)):
            assert relative(outputs(model, x), actual) < 1e-9
    assert relative(outputs(model, x), actual) > 1e-3
    cut.train()(x).square().mean().backward()
    thin(cut, (x,), options)
    return result.report


def units(report: PruneReport) -> dict[str, tuple[int, int, int]]:
    return {family.name: (family.units, family.kept, family.width) for family in report.families}


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_residual_add_couples_both_ends() -> None:
    model = Net(
        lambda m, x: head(m, F.relu(m.b(F.relu(m.a(x))) + m.skip(x))),
        a=conv(3, 6), b=conv(6, 10), skip=nn.Conv2d(3, 10, 1), fc=nn.Linear(10, 4),
    )  # fmt: skip
    report = check(model, X)
    assert units(report) == {"a": (6, 3, 1), "b": (10, 5, 1)}
    assert ("skip.weight", 0) in report.families[1].members
    assert {f.parameter for f in report.frozen} == {"a.weight", "skip.weight", "fc.weight", "fc.bias"}
    reasons = {(f.parameter, f.dim): f.reason for f in report.frozen}
    assert reasons["a.weight", 1] == "the model's input"
    assert reasons["fc.weight", 0] == "the width of the model's output"


def test_concatenation_keeps_offsets() -> None:
    model = Net(
        lambda m, x: head(m, m.c(torch.cat([m.a(x), m.b(x), x], dim=1))),
        a=conv(3, 4), b=conv(3, 6), c=conv(13, 8), fc=nn.Linear(8, 4),
    )  # fmt: skip
    report = check(model, X)
    assert units(report) == {"a": (4, 2, 1), "b": (6, 3, 1), "c": (8, 4, 1)}
    assert [(f.dim, f.indices, f.of) for f in report.frozen if f.parameter == "c.weight"] == [(1, 3, 13)]


def test_grouped_convolution_keeps_the_same_count_in_every_group() -> None:
    model = Net(
        lambda m, x: head(m, m.b(F.relu(m.a(x)))),
        a=conv(3, 12), b=conv(12, 8, groups=4), fc=nn.Linear(8, 4),
    )  # fmt: skip
    report = check(model, X)
    assert units(report) == {"a": (3, 2, 4), "b": (2, 1, 4)}


def test_depthwise_loses_groups() -> None:
    model = Net(
        lambda m, x: head(m, m.c(F.relu(m.b(m.a(x))))),
        a=conv(3, 8), b=conv(8, 16, groups=8), c=conv(16, 6), fc=nn.Linear(6, 4),
    )  # fmt: skip
    cut = copy.deepcopy(model)
    thin(cut, (X,), HALF)
    assert (cut.b.groups, cut.b.in_channels, cut.b.out_channels) == (4, 4, 8)
    assert units(check(model, X))["a"] == (8, 4, 1)


def test_one_output_channel_is_not_taken_for_depthwise() -> None:
    model = Net(
        lambda m, x: torch.cat([m.gate(m.a(x)).mean((2, 3)), head(m, m.a(x))], dim=1),
        a=conv(3, 8), gate=conv(8, 1), fc=nn.Linear(8, 4),
    )  # fmt: skip
    report = check(model, X)
    assert units(report) == {"a": (8, 4, 1)}
    assert any(f.parameter == "gate.weight" and f.dim == 0 for f in report.frozen)


def test_single_channel_gate_is_spread_and_stays() -> None:
    model = Net(
        lambda m, x: head(m, m.a(x) * torch.sigmoid(m.gate(x))),
        a=conv(3, 8), gate=conv(3, 1), fc=nn.Linear(8, 4),
    )  # fmt: skip
    report = check(model, X)
    assert units(report) == {"a": (8, 4, 1)}
    frozen = {(f.parameter, f.dim): f for f in report.frozen}
    assert frozen["gate.weight", 0].op == "mul"


def test_flatten_gives_a_unit_many_columns() -> None:
    model = Net(lambda m, x: m.fc(m.a(x).flatten(1)), a=conv(3, 8), fc=nn.Linear(8 * 64, 4))
    check(model, X)
    graph = couple(model, (X.double(),))
    places = {(place.tensor, place.dim): place.indices.shape for place in graph.families[0].places}
    assert places["fc.weight", 1] == (8, 64)


def shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@pytest.mark.parametrize("native", [False, True])
def test_channel_shuffle(native: bool) -> None:
    mix = (lambda x: F.channel_shuffle(x, 2)) if native else (lambda x: shuffle(x, 2))
    model = Net(lambda m, x: head(m, m.b(mix(m.a(x)))), a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 4))
    assert units(check(model, X)) == {"a": (4, 2, 2), "b": (6, 3, 1)}


def by_chunk(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(2, dim=1)


def by_split(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(x.shape[1] // 2, 1)


def by_slice(x: Tensor) -> tuple[Tensor, ...]:
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


def by_unbind(x: Tensor) -> tuple[Tensor, ...]:
    return x.unflatten(1, (2, -1)).unbind(1)


@pytest.mark.parametrize("halves", [by_chunk, by_split, by_slice, by_unbind])
def test_halves_keep_equal_counts(halves: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        left, right = halves(m.a(x))
        return head(m, torch.sigmoid(left) * m.b(right))

    model = Net(forward, a=conv(3, 12), b=conv(6, 6), fc=nn.Linear(6, 4))
    assert units(check(model, X)) == {"a": (6, 3, 2)}


@pytest.mark.parametrize("wrong_batch", [False, True])
def test_width_written_into_a_view_is_blamed(wrong_batch: bool) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.b(F.relu(m.a(x)))).mean((2, 3))
        # two samples of half the width pass as one of the full width, without an error
        return m.fc(x.view(-1, 8) if wrong_batch else x.view(x.shape[0], 8))  # type: ignore[no-any-return]

    model = Net(forward, a=conv(3, 6), b=conv(6, 8), fc=nn.Linear(8, 4))
    report = check(model, X)
    assert units(report) == {"a": (6, 3, 1), "b": (8, 8, 1)}
    assert len(report.notes) == 1
    assert report.notes[0].startswith("b keeps its width: ")
    assert "view" in report.notes[0] or "shape" in report.notes[0] or "size" in report.notes[0]


def test_functional_calls_and_matrix_products() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 3, 3, 3))
            self.scale = nn.Parameter(torch.randn(8, 1, 1))
            self.m = nn.Parameter(torch.randn(8, 10))
            self.n = nn.Parameter(torch.randn(4, 10))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(x, self.w, padding=1) * self.scale
            return F.relu(x.mean((2, 3)) @ self.m) @ self.n.t()

    report = check(Functional(), X, hooks=False)
    assert [(family.units, family.kept) for family in report.families] == [(8, 4), (10, 5)]
    assert ("scale", 0) in report.families[0].members


def test_shared_module_ties_its_ends() -> None:
    model = Net(
        lambda m, x: head(m, F.relu(m.b(F.relu(m.b(m.a(x)))))),
        a=conv(3, 8), b=conv(8, 8), fc=nn.Linear(8, 4),
    )  # fmt: skip
    assert units(check(model, X)) == {"a": (8, 4, 1)}


def test_tied_weights_stay_tied() -> None:
    model = Net(
        lambda m, x: head(m, m.c(F.relu(m.b(F.relu(m.a(x)))))),
        a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), fc=nn.Linear(8, 4),
    )  # fmt: skip
    model.c.weight = model.b.weight
    cut = copy.deepcopy(model)
    result = thin(cut, (X,), HALF)
    assert cut.c.weight is cut.b.weight
    assert {"b.weight", "c.weight"} <= set(result.plan.tensors)
    check(model, X)


def test_group_norm_loses_whole_groups() -> None:
    model = Net(
        lambda m, x: head(m, F.relu(m.n(m.a(x)))), a=conv(3, 12), n=nn.GroupNorm(4, 12), fc=nn.Linear(12, 4)
    )
    cut = copy.deepcopy(model)
    thin(cut, (X,), HALF)
    assert (cut.n.num_groups, cut.n.num_channels, cut.a.out_channels) == (2, 6, 6)
    assert units(check(model, X, hooks=False)) == {"a": (4, 2, 3)}


def test_layer_norm_freezes_what_it_normalises_where_exactness_is_asked_for() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.n(m.a(x).mean((2, 3)))
        return m.fc(F.gelu(m.up(x)))  # type: ignore[no-any-return]

    model = Net(forward, a=conv(3, 8), n=nn.LayerNorm(8), up=nn.Linear(8, 12), fc=nn.Linear(12, 4))
    report = check(model, X, options=EXACT)
    assert units(report) == {"up": (12, 6, 1)}
    frozen = {(f.parameter, f.dim): f for f in report.frozen}
    assert frozen["a.weight", 0].op == "layer_norm"
    assert "statistics" in frozen["n.weight", 0].reason


def test_prelu_and_instance_norm_go_along() -> None:
    model = Net(
        lambda m, x: head(m, m.p(m.n(m.a(x))).square()),
        a=conv(3, 8), n=nn.InstanceNorm2d(8, affine=True), p=nn.PReLU(8), fc=nn.Linear(8, 4),
    )  # fmt: skip
    cut = copy.deepcopy(model)
    thin(cut, (X,), HALF)
    assert (cut.n.num_features, cut.p.num_parameters, len(cut.p.weight)) == (4, 4, 4)
    check(model, X, hooks=False)


def test_squeeze_and_excitation() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        gate = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))
        return head(m, x * gate)

    model = Net(forward, a=conv(3, 8), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), fc=nn.Linear(8, 4))
    assert units(check(model, X)) == {"a": (8, 4, 1), "down": (4, 2, 1)}


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_transposed_convolution(groups: int) -> None:
    model = Net(
        lambda m, x: head(m, F.relu(m.up(F.relu(m.a(x))))),
        a=conv(3, 8), up=nn.ConvTranspose2d(8, 8, 2, stride=2, groups=groups), fc=nn.Linear(8, 4),
    )  # fmt: skip
    report = check(model, X)
    expected = {
        1: {"a": (8, 4, 1), "up": (8, 4, 1)},
        2: {"a": (4, 2, 2), "up": (4, 2, 1)},
        8: {"a": (8, 4, 1)},
    }
    assert units(report) == expected[groups]


def test_pixel_shuffle_takes_runs() -> None:
    model = Net(
        lambda m, x: head(m, m.b(F.pixel_shuffle(m.a(x), 2))), a=conv(3, 16), b=conv(4, 6), fc=nn.Linear(6, 4)
    )
    assert units(check(model, X)) == {"a": (4, 2, 4), "b": (6, 3, 1)}


def test_padded_shortcut_freezes_only_the_padding() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        return head(m, F.pad(x, (0, 0, 0, 0, 2, 2)) + m.b(x))

    model = Net(forward, a=conv(3, 4), b=conv(4, 8), fc=nn.Linear(8, 4))
    report = check(model, X)
    assert units(report) == {"a": (4, 2, 1)}
    assert [(f.dim, f.indices) for f in report.frozen if f.parameter == "b.weight"] == [(0, 4)]


def test_attention_keeps_scores_and_cuts_the_mlp_where_exactness_is_asked_for() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = Net(lambda m, x: m.fc(m.layer(m.embed(x.flatten(2).mT)).mean(1)), embed=nn.Linear(3, 8),
                layer=layer, fc=nn.Linear(8, 4))  # fmt: skip
    report = check(model, X, options=EXACT)
    assert units(report) == {"layer.linear1": (16, 8, 1)}


def script(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
        return torch.jit.script(module)  # type: ignore[no-any-return]


def twice(x: Tensor) -> Tensor:
    return x * 2


def frozen_ops(graph: ChannelGraph, parameter: str) -> set[str]:
    return {f.op for f in graph.frozen if f.parameter == parameter and f.dim == 0}


def test_scripted_module_freezes_what_it_reads() -> None:
    model = Net(
        lambda m, x: head(m, m.b(m.s(m.a(x)))),
        a=conv(3, 8), s=script(nn.Sequential(nn.ReLU())), b=conv(8, 6), fc=nn.Linear(6, 4),
    )  # fmt: skip
    graph = couple(model, (X,))
    assert [family.name for family in graph.families] == ["b"]
    assert frozen_ops(graph, "a.weight") == {"script_module"}


def test_call_that_cannot_be_seen_freezes_all_before_it() -> None:
    scripted = script(twice)
    model = Net(
        lambda m, x: head(m, m.c(scripted(m.b(m.a(x))))),
        a=conv(3, 8), b=conv(8, 8), c=conv(8, 6), fc=nn.Linear(6, 4),
    )  # fmt: skip
    graph = couple(model, (X,))
    assert [family.name for family in graph.families] == ["c"]
    assert {f.reason for f in graph.frozen if f.parameter == "a.weight" and f.dim == 0} == {
        "an activation of unknown origin (scripted or opaque code) may depend on any channel"
    }
    check(model, X)


def test_function_without_a_rule_is_named() -> None:
    model = Net(
        lambda m, x: head(m, m.b(torch.sort(m.a(x), dim=1).values)),
        a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 4),
    )  # fmt: skip
    report = check(model, X)
    frozen = {(f.parameter, f.dim): (f.op, f.reason) for f in report.frozen}
    assert frozen["a.weight", 0] == ("sort", "no rule for `sort`")
    assert units(report) == {"b": (6, 3, 1)}


def test_auxiliary_head_of_training_mode_is_cut_along() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        return head(m, x) + m.aux(x.mean((2, 3))) if m.training else head(m, x)

    model = Net(forward, a=conv(3, 8), aux=nn.Linear(8, 4), fc=nn.Linear(8, 4))
    check(model, X, hooks=False)
    thin(model, (X.double(),), HALF)
    assert model.aux.in_features == 4


def test_unused_parameters_are_reported() -> None:
    model = Net(lambda m, x: head(m, m.a(x)), a=conv(3, 8), spare=nn.Linear(7, 2), fc=nn.Linear(8, 4))
    graph = couple(model, (X,))
    assert frozen_ops(graph, "spare.weight") == {"unused"}


def test_nothing_to_cut_is_an_error_with_the_reason() -> None:
    with pytest.raises(PruningError, match=r"every channel is frozen .*output"):
        thin(nn.Linear(3, 4), (torch.randn(2, 3),), HALF)


def test_network_that_fixes_its_batch_size_is_refused() -> None:
    model = Net(lambda m, x: head(m, m.a(x).view(1, 8, 8, 8)), a=conv(3, 8), fc=nn.Linear(8, 4))
    with pytest.raises(PruningError, match="does not run at batch sizes 3 and 5"):
        thin(model, (X[:1],), HALF)


def test_a_dead_signal_hides_no_mistake() -> None:
    """A constant a million times the signal: only the spread over the batch shows a wrong channel."""
    from cctool.pruning.cut.surgery import CutPlan, plan_cut
    from cctool.pruning.cut.verify import check as verify
    from cctool.pruning.scores.units import score_context
    from cctool.pruning.select.order import select

    torch.manual_seed(0)
    model = Net(lambda m, x: head(m, m.b(F.relu(m.a(x)))), a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 4))
    nn.init.constant_(model.fc.bias, 1e6)
    graph = couple(model, (X,))
    selection = select(model, graph, HALF, score_context(model))
    plan = plan_cut(model, graph, selection)
    assert not verify(model, graph, selection, plan, (X,)).failure
    (cut,) = [cut for cut in plan.tensors["b.weight"] if cut.dim == 1]
    gone = [index for index in range(8) if index not in cut.keep.tolist()]
    wrong = type(cut)(1, torch.tensor(gone), 8)
    others = tuple(cut for cut in plan.tensors["b.weight"] if cut.dim != 1)
    mistaken = CutPlan({**plan.tensors, "b.weight": (wrong, *others)}, plan.attributes)
    assert "differ by" in verify(model, graph, selection, mistaken, (X,)).failure
