"""The comparison of cut and masked networks: what it must notice, and that it leaves the model alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_toy_networks import Net, conv, head
from torch import Tensor, nn

from cctool.graph.channels import couple
from cctool.pruning.cut import masked_network as masked
from cctool.pruning.cut.masked_network import MaskedCalls, run
from cctool.pruning.cut.planner import plan_thinning, thin
from cctool.pruning.select.order import Selection
from hook_oracle import HALF, distinct
from pruning_toys import mask

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def looking(m: Net, x: Tensor) -> Tensor:
    """Code that looks at values does not run on the meta device."""
    x = F.relu(m.a(x))
    assert float(x.sum()) > 0
    return head(m, m.b(x))


def folding(m: Net, x: Tensor) -> Tensor:
    """Two samples of half the width pass for one of the full width, and values are looked at."""
    x = looking(m, x)
    return m.last(x.view(-1, 8))  # type: ignore[no-any-return]


def net(forward: object, **more: nn.Module) -> Net:
    torch.manual_seed(0)
    return Net(forward, a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 8), **more)  # type: ignore[arg-type]


def test_code_that_looks_at_values_is_verified_by_running_it() -> None:
    report = thin(net(looking), (X,), HALF).report
    assert [(f.name, f.kept) for f in report.families] == [("a", 4), ("b", 3)]
    assert report.error < 1e-5
    assert not report.notes


def test_a_width_written_into_code_that_looks_at_values_is_blamed() -> None:
    report = thin(net(folding, last=nn.Linear(8, 4)), (X,), HALF).report
    kept = {f.name: f.kept for f in report.families}
    assert kept == {"a": 4, "b": 3, "fc": 8}
    assert [note.split(":")[0] for note in report.notes] == ["fc keeps its width"]


def test_the_model_is_as_it_was() -> None:
    model = distinct(net(lambda m, x: head(m, m.b(F.relu(m.a(x)))))).train()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    plan_thinning(model, (X.double(),), HALF)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        for key, value in vars(module).items():
            assert type(value) is type(attributes[name][key])


@pytest.mark.parametrize("wide", [False, True])
def test_masked_calls_are_the_network_with_zeros_in_its_weights(wide: bool) -> None:
    model = distinct(net(lambda m, x: head(m, m.b(F.relu(m.a(x)))))).float().eval()
    result = plan_thinning(model, (X,), HALF)
    calls = MaskedCalls(model, result.graph, result.selection, wide=wide)
    (found,) = run(model, [X], calls).values()
    masked = copy.deepcopy(model)
    mask(masked, result.graph, result.selection)
    with torch.no_grad():
        expected = masked.double()(X.double()) if wide else masked(X)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert (model.float()(X) - found).abs().max() > 1e-3


def test_a_number_that_hides_a_width_is_blamed_by_what_comes_out() -> None:
    """`int` forgets what it is made of; shapes are right, numbers are not."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        return head(m, m.b(x * int(x.shape[1])))

    result = plan_thinning(net(forward), (X,), HALF)
    assert [(f.name, f.kept) for f in result.report.families] == [("a", 8), ("b", 3)]
    (note,) = result.report.notes
    assert note.startswith("a keeps its width: cut and masked outputs differ by")


def test_large_linear_layers_are_widened_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)
    )
    inputs = (torch.randn(4, 6),)
    graph = couple(model, inputs)
    kept = tuple(torch.arange(family.units) % 2 == 0 for family in graph.families)
    selection = Selection(kept, {})

    def outputs() -> torch.Tensor:
        return run(model, inputs, MaskedCalls(model, graph, selection, wide=True))["output"]

    whole = outputs()
    assert whole.dtype == torch.float64
    for large in (8, 40, 60):
        monkeypatch.setattr(masked, "_LARGE", large)
        assert torch.allclose(outputs(), whole, rtol=1e-12, atol=0)
    with torch.no_grad():
        assert not torch.allclose(whole.float(), model(*inputs))
