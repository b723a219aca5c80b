"""Carrying out a plan: parameters, buffers, gradients, attributes, and what lies beside them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.base.errors import PruningError
from cctool.checkpoint.edits.thin import Cut
from cctool.graph.channels import couple
from cctool.options.prune.choices import NEEDS_DATA, PruneMethod
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.surgery import CutPlan, apply_cut, cut_tensor, plan_cut
from cctool.pruning.scores.evidence import Evidence, gather
from cctool.pruning.scores.units import score_context
from cctool.pruning.select.order import Candidates, Selection, select_counts
from criteria_toys import batches
from pruning_toys import mask


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))


def plan_for(model: nn.Module) -> tuple[CutPlan, Selection]:
    graph = couple(model, (torch.randn(1, 3, 8, 8),))
    scores = torch.tensor([5.0, 0, 4, 1, 3, 2])
    selection = select_counts(graph, Candidates({0: scores}, {0: 1}, {}), {0: 3}, PruneOptions())
    return plan_cut(model, graph, selection), selection


def test_plan_names_tensors_and_attributes() -> None:
    plan, _ = plan_for(net())
    planned = {name: [(c.dim, c.keep.tolist(), c.size) for c in cuts] for name, cuts in plan.tensors.items()}
    assert planned == {
        name: [(dim, [0, 2, 4], 6)]
        for name, dim in [
            ("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("1.running_mean", 0),
            ("1.running_var", 0), ("3.weight", 1),
        ]
    }  # fmt: skip
    assert plan.attributes == {"0": {"out_channels": 3}, "1": {"num_features": 3}, "3": {"in_channels": 3}}


def test_apply_shrinks_everything_and_keeps_the_kind() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    model.half()
    model[3].weight.grad = torch.ones_like(model[3].weight)
    model[1].running_mean.copy_(torch.arange(6.0))
    old = model[0].weight
    plan, _ = plan_for(net())
    apply_cut(model, plan)
    assert model[0].weight is not old
    assert torch.equal(model[0].weight, old[[0, 2, 4]])
    assert isinstance(model[0].weight, nn.Parameter)
    assert not model[0].weight.requires_grad
    assert model[3].weight.requires_grad
    assert model[0].weight.dtype == torch.float16
    assert model[3].weight.grad is not None
    assert model[3].weight.grad.shape == (2, 3, 3, 3)
    assert model[1].running_mean.tolist() == [0, 2, 4]
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels) == (3, 3, 3)
    assert "running_mean" in dict(model[1].named_buffers())


def test_the_plan_cuts_what_lies_beside_a_parameter() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    plan, _ = plan_for(net())
    moment = optimizer.state[model[3].weight]["exp_avg"]
    small = cut_tensor(moment, plan.tensors["3.weight"])
    assert torch.equal(small, moment[:, [0, 2, 4]])
    integers = torch.arange(6, dtype=torch.uint8)
    assert cut_tensor(integers, [Cut(0, torch.tensor([1, 5]), 6)]).tolist() == [1, 5]


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(PruningError, match="plan again"):
        cut_tensor(torch.zeros(5), [Cut(0, torch.tensor([0]), 6)])


def test_mask_zeroes_gamma_and_beta_and_what_reads_the_unit() -> None:
    model = net()
    nn.init.ones_(model[1].bias)
    graph = couple(model, (torch.randn(1, 3, 8, 8),))
    _, selection = plan_for(model)
    mask(model, graph, selection)
    for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
        assert not tensor[[1, 3, 5]].any()
        assert tensor[[0, 2, 4]].flatten(1 if tensor.ndim > 1 else 0).any(-1).all()
    assert not model[3].weight[:, [1, 3, 5]].any()
    assert model[1].running_var.all()


def test_thinned_network_trains_with_a_new_optimizer() -> None:
    model = net()
    plan, _ = plan_for(net())
    apply_cut(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = model[0].weight.detach().clone()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


def evidence(model: nn.Module, x: Tensor, y: Tensor, method: PruneMethod) -> Evidence | None:
    if method not in NEEDS_DATA:
        return None
    return gather(model, batches(x, y), len(x), method, loss=F.cross_entropy)


@pytest.mark.cuda
@pytest.mark.parametrize("method", list(PruneMethod))
def test_cuda_plans_and_cuts_as_the_cpu_does(method: PruneMethod) -> None:
    import copy

    from cctool.models.registry import build
    from cctool.pruning.cut.planner import thin
    from cctool.pruning.scores.units import SCORES

    # Evidence is a sum over images, which a GPU may add up in another order; weights are the same bits.
    rtol = 1e-3 if method in NEEDS_DATA else 1e-5
    torch.manual_seed(0)
    model = build("resnet20", {})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(1, 3, 32, 32)
    on_gpu = copy.deepcopy(model).cuda()
    pictures, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    seen = evidence(model, pictures, labels, method), evidence(on_gpu, pictures.cuda(), labels.cuda(), method)
    graphs = couple(model, (x,)), couple(on_gpu, (x.cuda(),))
    for a, b in zip(graphs[0].families, graphs[1].families, strict=True):
        assert (a.name, a.units) == (b.name, b.units)
        scores = [
            SCORES[method](family, score_context(network, 0, found))
            for family, network, found in ((a, model, seen[0]), (b, on_gpu, seen[1]))
        ]
        torch.testing.assert_close(scores[0], scores[1], rtol=rtol, atol=1e-6)
    options = PruneOptions(method=method, rate=0.5)
    results = [
        thin(network, (images,), options, evidence=found)
        for network, images, found in ((model, x, seen[0]), (on_gpu, x.cuda(), seen[1]))
    ]
    assert results[0].report.families == results[1].report.families
    for name, value in model.state_dict().items():
        assert on_gpu.state_dict()[name].is_cuda
        assert torch.equal(value, on_gpu.state_dict()[name].cpu()), name
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), on_gpu.eval()(x.cuda()).cpu(), rtol=1e-3, atol=1e-4)
