"""The calls of a pass, and what flows between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cctool.quantization.network.calls import INPUT, CallSite, Flow, flow_of
from quantizing_toys import Functional, Lost, Residual, images, made


def flow(build: type[nn.Module]) -> Flow:
    return flow_of(made(build), (images(),))


def test_a_shared_module_has_a_place_for_each_time_it_is_passed() -> None:
    relus = [call.place for call in flow(Residual).calls if call.place.function == "relu"]
    assert relus == [CallSite("relu", "relu", 0), CallSite("relu", "relu", 1)]
    convolutions = [call for call in flow(Functional).calls if call.place.module == "twice"]
    assert [call.place.number for call in convolutions] == [0, 1]
    assert {call.weight for call in convolutions} == {"twice.weight"}


def test_values_are_followed_from_call_to_call() -> None:
    found = flow(Residual)
    by_key = {(call.place.module, call.place.key): number for number, call in enumerate(found.calls)}
    add = found.calls[by_key["", "add#0"]]
    assert add.sources == (by_key["bn2", "batch_norm#0"], by_key["relu", "relu#0"])
    assert found.calls[by_key["conv1", "conv2d#0"]].sources == (INPUT,)
    assert found.outputs == (by_key["fc", "linear#0"],)
    assert set(found.calls[by_key["relu", "relu#0"]].users) == {
        by_key["conv2", "conv2d#0"],
        by_key["", "add#0"],
    }


def test_a_result_in_place_counts_as_lost_only_where_the_network_drops_it() -> None:
    assert [call.place.function for call in flow(Lost).calls if call.lost] == ["relu"]
    assert not any(call.lost for call in flow(Residual).calls)


def test_what_depends_on_no_input_is_constant() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.conv.weight - self.conv.weight.mean()
            return nn.functional.conv2d(x, weight).mean((2, 3))

    calls = {call.place.function: call for call in flow_of(made(Standardised), (images(),)).calls}
    assert calls["sub"].constant
    assert not calls["conv2d"].constant
    assert calls["conv2d"].weight == "conv2d#0:weight"
    assert calls["conv2d"].weight_shape == (4, 3, 1, 1)


def test_the_network_stays_as_it_is() -> None:
    model, x = made(Residual), images()
    before, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    kept = x.clone()
    flow_of(model, (x,))
    assert torch.equal(model(x), before)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks
