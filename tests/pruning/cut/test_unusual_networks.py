"""Forms that torch allows and few networks use: what is cut still equals what is masked."""

import pytest
import torch
import torch.nn.functional as F
from test_toy_networks import HALF, Net, check, conv, head
from torch import Tensor, nn

from cctool.base.errors import PruningError
from cctool.graph import rules
from cctool.graph.channels import couple
from cctool.pruning.cut.planner import thin

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def families(model: nn.Module) -> list[str]:
    return [family.name for family in couple(model, (X,)).families]


def test_arguments_by_keyword_are_read() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = torch.permute(input=m.a(x), dims=(0, 2, 3, 1))
        x = m.b(torch.movedim(input=x, source=3, destination=1))
        return m.fc(torch.mean(input=x, dim=(2, 3)))  # type: ignore[no-any-return]

    model = Net(forward, a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 4))
    assert families(model) == ["a", "b"]
    check(model, X)


def test_a_form_that_a_rule_does_not_read_freezes_what_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(ledger: object, event: object) -> None:
        raise IndexError

    monkeypatch.setitem(rules.RULES, "relu", unreadable)
    model = Net(lambda m, x: head(m, m.b(F.relu(m.a(x)))), a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 4))
    graph = couple(model, (X,))
    assert [family.name for family in graph.families] == ["b"]
    assert {item.op for item in graph.frozen if item.parameter == "a.weight"} == {"input", "relu"}


def test_in_place_views_leave_the_ids_of_others_alone() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        weights = F.prelu(m.gate(x.mean((2, 3))), m.slope.weight)
        same = weights.view_as(weights)
        weights.unsqueeze_(-1).unsqueeze_(-1)
        return m.fc((x * weights).mean((2, 3)) + same)  # type: ignore[no-any-return]

    model = Net(forward, a=conv(3, 8), gate=nn.Linear(8, 8), slope=nn.PReLU(8), fc=nn.Linear(8, 4))
    assert families(model) == ["a"]
    check(model, X)


def test_norms_without_scale_and_layers_without_bias() -> None:
    model = Net(
        lambda m, x: head(m, F.relu(m.n2(m.b(F.relu(m.n1(m.a(x))))))),
        a=conv(3, 8, bias=False), n1=nn.BatchNorm2d(8, affine=False),
        b=conv(8, 6, bias=False), n2=nn.BatchNorm2d(6, track_running_stats=True), fc=nn.Linear(6, 4),
    )  # fmt: skip
    assert families(model) == ["a", "b"]
    check(model, X)


def test_convolutions_of_one_and_three_dimensions() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.n3(m.c3(x.unsqueeze(1)))).mean(2).flatten(2)
        return m.fc(F.relu(m.n1(m.c1(x))).amax(-1))  # type: ignore[no-any-return]

    model = Net(
        forward, c3=nn.Conv3d(1, 8, (1, 3, 3)), n3=nn.BatchNorm3d(8), c1=nn.Conv1d(8, 6, 3),
        n1=nn.BatchNorm1d(6), fc=nn.Linear(6, 4),
    )  # fmt: skip
    assert families(model) == ["c3", "c1"]
    check(model, X)


def test_a_sequential_that_holds_one_module_twice_and_works_in_place() -> None:
    again = conv(8, 8)
    model = nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), again, nn.ReLU(inplace=True), again, nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    check(model, X, hooks=False)
    cut = thin(model, (X.double(),), HALF)
    assert model[2] is model[4]
    assert model[2].weight.shape[:2] == (model[2].in_channels,) * 2 == (4, 4)
    assert {"2.weight", "4.weight"} <= set(cut.plan.tensors)


def test_buffers_of_the_networks_width_go_along() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = conv(3, 8), nn.Linear(8, 4)
            self.register_buffer("scale", torch.rand(1, 8, 1, 1))
            self.register_buffer("shift", torch.rand(8), persistent=False)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            y = self.a(x)
            y *= self.scale
            y += self.shift.view(1, -1, 1, 1)
            return (self.fc(y.relu_().mean((2, 3))),)

    model = Scaled()
    thin(model, (X,), HALF)
    assert model.scale.shape == (1, 4, 1, 1)
    assert model.shift.shape == (4,)


def test_a_network_that_draws_at_each_call_ends_with_an_error() -> None:
    model = Net(lambda m, x: head(m, F.dropout(m.a(x))), a=conv(3, 8), fc=nn.Linear(8, 4))
    with pytest.raises(PruningError, match="differ"):
        thin(model, (X,), HALF)


def test_a_bare_squeeze_that_takes_no_single_input() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(F.relu(m.a(x)), 1).squeeze()
        return m.fc(F.relu(m.norm(m.b(x))))  # type: ignore[no-any-return]

    model = Net(forward, a=conv(3, 8), b=nn.Linear(8, 6), norm=nn.BatchNorm1d(6), fc=nn.Linear(6, 4))
    result = thin(model.eval(), (X,), HALF)
    assert [(family.name, family.kept) for family in result.report.families] == [("a", 4), ("b", 3)]
    assert result.report.error < 1e-5
