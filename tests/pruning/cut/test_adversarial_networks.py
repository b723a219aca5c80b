"""Networks as people write them, with what the rules of the graph are easily wrong about."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.base.networks import copied
from cctool.checkpoint.build import assemble
from cctool.graph.channels import couple
from cctool.pruning.cut.planner import plan_thinning, thin
from cctool.pruning.cut.verify import TOLERANCE
from hook_oracle import HALF, check_exact, count, distinct, run

Forward = Callable[..., Any]


def conv(i: int, o: int, **keywords: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **keywords)


class Net(nn.Module):
    """A network whose forward is a function of it and the inputs."""

    def __init__(self, forward: Forward, **modules: Any) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def images() -> Tensor:
    return torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(0))


def test_gated_linear_units() -> None:
    model = Net(
        lambda s, x: s.head(s.last(F.glu(s.second(s.gate(s.first(x))), dim=1)).mean((2, 3))),
        first=conv(3, 16),
        gate=nn.GLU(1),
        second=conv(8, 16),
        last=conv(8, 8),
        head=nn.Linear(8, 3),
    )
    check_exact(model, [images()], below=0.45)


def test_a_layer_norm_whose_shape_is_an_attribute_of_any_name() -> None:
    class Norm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight, self.sizes = nn.Parameter(torch.ones(width)), (width,)

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x.permute(0, 2, 3, 1), self.sizes, self.weight).permute(0, 3, 1, 2)

    model = nn.Sequential(conv(3, 8), Norm(8), conv(8, 6))
    report = thin(model, [images()], HALF).report
    assert not report.notes
    assert model[0].out_channels == 4
    assert model[1].sizes == (4,)


def gates_of(model: nn.Module, name: str) -> Tensor:
    return next(p for n, p in model.named_parameters() if n.endswith(name))


def zeroed_units(layer: nn.Module, lost: Tensor) -> None:
    """Set all that hidden units own in a recurrent layer or cell to zero, in every gate."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            hidden = layer.hidden_size
            for gate in range(weight.shape[0] // hidden):
                weight[lost + gate * hidden] = 0
            if name.startswith("weight_hh"):
                weight[:, lost] = 0


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "cells"])
def test_recurrent_layers_lose_hidden_units(kind: str) -> None:
    """The masked network is made by hand: zeros in all gates keep a hidden unit at zero."""

    def layers(s: Net, x: Tensor) -> Tensor:
        return s.head(s.recurrent(s.body(x).mean(2).transpose(1, 2))[0][:, -1])

    def cells(s: Net, x: Tensor) -> Tensor:
        hidden = torch.zeros(x.shape[0], s.width, dtype=x.dtype)
        for step in s.body(x).mean(2).permute(2, 0, 1):
            hidden = s.recurrent(step, hidden)
        return s.head(hidden)

    two = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    recurrent: nn.Module = {
        "lstm": lambda: nn.LSTM(8, 10, **two),
        "gru": lambda: nn.GRU(8, 10, **two),
        "rnn": lambda: nn.RNN(8, 10, batch_first=True),
        "cells": lambda: nn.GRUCell(8, 10),
    }[kind]()
    read = 20 if kind in ("lstm", "gru") else 10
    model = Net(cells if kind == "cells" else layers, body=conv(3, 8), recurrent=recurrent)
    model.head, model.width = nn.Linear(read, 3), 10
    distinct(model)
    cut = copy.deepcopy(model)
    assert not thin(cut, [images().double()], HALF).report.notes
    assert cut.recurrent.hidden_size == 5
    assert cut.recurrent.input_size == 4
    mine, theirs = (gates_of(net, "bias_hh_l0" if kind != "cells" else "bias_hh") for net in (model, cut))
    lost = (~torch.isin(mine[:10], theirs)).nonzero().flatten()
    assert len(lost) == 5
    masked = copy.deepcopy(model)
    zeroed_units(masked.recurrent, lost)
    channels = (~torch.isin(model.body.bias, cut.body.bias)).nonzero().flatten()
    with torch.no_grad():
        masked.body.weight[channels] = 0
        masked.body.bias[channels] = 0
    expected, actual = run(masked, [images().double()]), run(cut, [images().double()])
    assert torch.allclose(expected[0], actual[0], rtol=0, atol=1e-10)
    assert not torch.allclose(actual[0], run(model, [images().double()])[0], atol=1e-3)
    cut.train()(images().double()).square().mean().backward()
    thin(cut, [images().double()], HALF)
    assert cut.recurrent.hidden_size == 3


def test_recurrent_layers_compute_with_the_parameters_that_a_file_gives_them() -> None:
    model, other = nn.LSTM(5, 4), nn.LSTM(5, 4)
    assemble(other, dict(model.state_dict()))
    x = torch.randn(3, 2, 5)
    assert torch.equal(model(x)[0], other(x)[0])


def projected(s: Net, x: Tensor) -> Tensor:
    return s.head(s.recurrent(s.body(x).mean(2).transpose(1, 2))[0][:, -1])


def test_projections_of_recurrent_layers_are_named() -> None:
    model = Net(projected, body=conv(3, 8), recurrent=nn.LSTM(8, 6, proj_size=4, batch_first=True))
    model.head = nn.Linear(4, 3)
    frozen = {f.parameter: f.reason for f in couple(model, [images()[:1]]).frozen}
    assert "projections" in frozen["body.weight"]


def state(s: Net, x: Tensor) -> Tensor:
    y = s.first(x)
    hidden = y.new_zeros(y.size(0), s.width, y.size(2), y.size(3))
    for _ in range(2):
        hidden = torch.tanh(s.second(torch.cat([y, hidden], 1)))
    return s.head(hidden.mean((2, 3)))


def ones(s: Net, x: Tensor) -> Tensor:
    y = s.first(x)
    y = y * torch.full((y.shape[1],), 0.5, dtype=y.dtype).view(1, -1, 1, 1)
    return s.head(s.second(torch.cat([y, F.relu(y)], 1)).mean((2, 3)))


def test_constants_that_widths_size_follow() -> None:
    model = Net(state, first=conv(3, 6), second=conv(14, 8), head=nn.Linear(8, 3))
    model.width = 8
    cut, _ = check_exact(model, [images()], below=0.4)
    assert cut.width == 4
    model = Net(ones, first=conv(3, 8), second=conv(16, 8), head=nn.Linear(8, 3))
    check_exact(model, [images()], below=0.4)


def grown(s: Net, x: Tensor) -> Tensor:
    y, z = s.first(x), s.second(x)
    wide = torch.zeros(z.shape, dtype=z.dtype)
    wide[:, : y.size(1)] = y
    return s.head(s.last(wide + z).mean((2, 3)))


def masked_write(s: Net, x: Tensor) -> Tensor:
    y = s.first(x)
    y[y > 1] = 1.0
    other = torch.empty_like(y)
    other.copy_(y)
    other += s.second(x)[:, :8]
    return s.head(s.last(F.pad(other, (0, 0, 0, 0, 0, 4))).mean((2, 3)))


def shifted(s: Net, x: Tensor) -> Tensor:
    y = F.relu(s.second(x))
    fold = y.shape[1] // 4
    moved = torch.zeros_like(y)
    moved[:-1, :fold] = y[1:, :fold]
    moved[1:, fold : 2 * fold] = y[:-1, fold : 2 * fold]
    moved[:, 2 * fold :] = y[:, 2 * fold :]
    return s.head(s.last(moved).mean((2, 3)))


@pytest.mark.parametrize(("forward", "below"), [(grown, 0.4), (masked_write, 0.8), (shifted, 0.8)])
def test_writes_into_parts_of_tensors(forward: Forward, below: float) -> None:
    model = Net(forward, first=conv(3, 8), second=conv(3, 12), last=conv(12, 8), head=nn.Linear(8, 3))
    cut, _ = check_exact(model, [images()], below)
    assert cut.second.out_channels < 12


def test_a_write_into_a_buffer_leaves_the_dense_network_as_it_was() -> None:
    def counted(s: Net, x: Tensor) -> Tensor:
        s.calls += 1
        s.seen = s.seen + 1
        return s.head(s.second(s.first(x)).mean((2, 3)))

    model = Net(counted, first=conv(3, 8), second=conv(8, 8), head=nn.Linear(8, 3))
    model.register_buffer("calls", torch.zeros(()))
    model.register_buffer("seen", torch.zeros(()))
    model.eval()
    plan_thinning(model, [images()], HALF)
    assert float(model.calls) == 0
    assert float(model.seen) == 0


def test_slices_by_number_freeze_no_more_than_their_numbers() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.first(x)
        return s.head(s.second(y * torch.sigmoid(y[:, 1:2])).mean((2, 3))) + y[:, -1].mean((1, 2))[:, None]

    model = Net(forward, first=conv(3, 12), second=conv(12, 8), head=nn.Linear(8, 3))
    frozen = {(f.parameter, f.dim): f.indices for f in couple(model, [images()[:1]]).frozen}
    assert frozen["first.weight", 0] == 3  # channels 0, 1 and the last
    distinct(model)
    assert not thin(model, [images().double()], HALF).report.notes
    assert model.first.out_channels < 9


@pytest.mark.parametrize("way", ["expand", "repeat"])
def test_one_filter_for_every_channel(way: str) -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = F.relu(s.first(x))
        filters = (
            s.blur.expand(s.width, -1, -1, -1) if way == "expand" else s.blur.repeat(y.shape[1], 1, 1, 1)
        )
        groups = s.width if way == "expand" else y.shape[1]
        return s.head(s.second(F.conv2d(y, filters, padding=1, groups=groups)).mean((2, 3)))

    model = Net(forward, first=conv(3, 8), second=conv(8, 8), head=nn.Linear(8, 3))
    model.width = 8
    model.register_buffer("blur", torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16)
    check_exact(model, [images()], below=0.4)


def test_unpooling_and_windows() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y, indices = F.max_pool2d(s.first(x), 2, return_indices=True)
        y = F.max_unpool2d(s.second(y), indices, 2)
        windows = y.unfold(2, 3, 3).unfold(3, 5, 5)
        return s.head(s.last(windows.mean((4, 5))).mean((2, 3)))

    model = Net(forward, first=conv(3, 8), second=conv(8, 8), last=conv(8, 6), head=nn.Linear(6, 3))
    check_exact(model, [images()], below=0.4)


@pytest.mark.parametrize("kind", [dict, list])
def test_inputs_in_dicts_and_lists(kind: type) -> None:
    def forward(s: Net, given: Any) -> Tensor:
        image, extra = given.values() if isinstance(given, dict) else given
        return s.head(torch.cat([s.second(s.first(image)).mean((2, 3)), s.extra(extra)], 1))

    model = Net(forward, first=conv(3, 8), second=conv(8, 8), extra=nn.Linear(5, 6), head=nn.Linear(14, 3))
    tensors = {"image": images(), "extra": torch.randn(4, 5)}
    given: Any = tensors if kind is dict else list(tensors.values())
    before = count(model)
    assert thin(model, [given], HALF).report.error < TOLERANCE
    assert count(model) < 0.4 * before
    assert model(given).shape == (4, 3)


def test_attributes_that_refuse_to_be_copied() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        with s.lock:
            return s.head(s.second(s.first(x)).mean((2, 3)))

    model = Net(forward, first=conv(3, 8), second=conv(8, 8), head=nn.Linear(8, 3))
    model.lock = threading.Lock()
    lock = model.lock
    report = thin(model, [images()], HALF).report
    assert not report.notes
    assert model.first.out_channels == 4
    assert model.lock is lock


def test_widths_that_a_pass_stores_are_plain_numbers_afterwards() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.first(x)
        s.shape, s.width, s.scale = y.shape, y.size(1), y.size(1) ** -0.5
        return s.head(s.second(y).mean((2, 3)))

    model = Net(forward, first=conv(3, 8), second=conv(8, 8), head=nn.Linear(8, 3))
    couple(model, [images()[:1]])
    assert type(model.width) is int
    assert type(model.scale) is float
    assert [type(size) for size in model.shape] == [int] * 4


def test_copies_share_what_refuses_to_be_copied() -> None:
    model = nn.Sequential(conv(3, 8), conv(8, 8))
    model[1].lock, model[1].sizes = threading.Lock(), [1, 2]
    copy_of = copied(model)
    assert copy_of[1].lock is model[1].lock
    assert copy_of[1].sizes is not model[1].sizes
    assert copy_of[0].weight is not model[0].weight
    assert torch.equal(copy_of[0].weight, model[0].weight)
